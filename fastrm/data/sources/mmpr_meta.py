"""The files of MMPR by its meta.json: subset -> {root, annotation, repeat_time, ...}.

Annotations are in `annotations.zip` or unpacked in `annotations/`; images in `images.zip`, in its parts
(`images.zip_aa`, ...) or unpacked in `images/`. The paths in meta.json begin with the place that the authors'
own folder had, which we cut off in front of "annotations" and "images" [ours]. `repeat_time`, how often InternVL's
trainer uses a subset in an epoch, becomes the repeat of its file; one below 1 is the share that it uses of it.
"""

import math
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from fastrm.data.media.archives import archive_exists
from fastrm.data.sources.files import read_json
from fastrm.data.sources.media import Resolve, in_archive_folder, in_folder, path_resolver
from fastrm.data.sources.reader import SourceFile
from fastrm.data.sources.values import unique_keys
from fastrm.errors import DataError, RecordError

_ANNOTATIONS, _IMAGES = "annotations", "images"


def mmpr_files(root: Path, images: str | None, open_file: Callable[..., SourceFile]) -> list[SourceFile]:
    """Return the annotation files of all subsets, in the order of meta.json.

    Raises:
        DataError: if meta.json, an annotation or the images are missing or malformed.
    """
    meta_file = root / "meta.json"
    if not meta_file.is_file():
        raise DataError(
            f'set "mmpr": "{meta_file}" is missing; wanted meta.json, annotations and images of the hub set'
        )
    try:
        meta = read_json(str(meta_file), unique_keys)
    except RecordError as error:
        raise DataError(f'"{meta_file}": {error.message}') from None
    if not isinstance(meta, dict) or not meta:
        raise DataError(f'"{meta_file}" is not an object of subsets; download it again')
    return [_subset_file(root, name, subset, images, open_file) for name, subset in meta.items()]


def _subset_file(root: Path, name: str, subset: object, images: str | None, open_file) -> SourceFile:
    where = f'"{root / "meta.json"}": subset "{name}"'
    if not isinstance(subset, dict) or not all(isinstance(subset.get(key), str) for key in ("root", "annotation")):
        raise DataError(f'{where} has no "root" and "annotation"; download the file again')
    repeat = subset.get("repeat_time", 1)
    if isinstance(repeat, bool) or not isinstance(repeat, (int, float)) or not 0 < repeat < math.inf:
        raise DataError(
            f"{where} has repeat_time {repeat!r}, wanted a number above 0; correct it, or remove the subset"
        )
    file = _annotation_file(root, _below(subset["annotation"], _ANNOTATIONS, where), where)
    resolve = (
        path_resolver(images) if images is not None else _subset_images(root, _below(subset["root"], _IMAGES, where))
    )
    return open_file(file, resolve, repeat=float(repeat))


def _below(path: str, folder: str, where: str) -> str:
    """Return a path of meta.json from the folder of this name on."""
    parts = PurePosixPath(path).parts
    if folder not in parts or ".." in parts:
        raise DataError(f'{where} has the path "{path}", wanted one below "{folder}"')
    return "/".join(parts[parts.index(folder) :])


def _annotation_file(root: Path, path: str, where: str) -> str:
    if (root / path).is_file():
        return str(root / path)
    archive = root / f"{_ANNOTATIONS}.zip"
    if archive_exists(str(archive)):
        return f"{archive}!{path}"
    raise DataError(f'{where}: neither "{root / path}" nor "{archive}" is there; download the annotations')


def _subset_images(root: Path, path: str) -> Resolve:
    archive = root / f"{_IMAGES}.zip"
    if not (root / _IMAGES).is_dir() and archive_exists(str(archive)):
        return in_archive_folder(str(archive), path)
    return in_folder(str(root / path))
