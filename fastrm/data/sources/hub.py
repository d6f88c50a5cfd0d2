"""Data sets on the Hugging Face hub: their files, downloaded once into the hub's cache and read from there.

`datasets` says which files a configuration and split have. The rows are read by files.py, not by
`datasets`, which wants one type for each column: in published preference data an image is a text here and a
list there, and rows can be read by range only from files that are here.
"""

import re
from pathlib import Path

from fastrm.data.sources.files import SUFFIXES
from fastrm.errors import DataError
from fastrm.hub_errors import explain

PREFIX = "hub:"
_SPEC = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:/(?P<config>[\w.-]+))?(?::(?P<split>\w+))?")


def hub_files(spec: str) -> list[str]:
    """Return the local data files of ``owner/name[/config][:split]``.

    The default is the only configuration, and `train`.

    Raises:
        DataError: if the spec is malformed, there is no such split, its files are of another format, or the hub
            cannot be reached.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise DataError(f'data source "{PREFIX}{spec}": wanted hub:owner/name, hub:owner/name/config or ...:split')
    split = match["split"] or "train"
    urls = repository_files(match["repo"], match["config"])
    if split not in urls:
        raise DataError(f'data source "{PREFIX}{spec}" has no split {split}; wanted one of {", ".join(urls)}')
    other = [url for url in urls[split] if not url.lower().endswith(SUFFIXES)]
    if other:
        raise DataError(f'data source "{PREFIX}{spec}" has "{other[0]}"; wanted files in {", ".join(SUFFIXES)}')
    return [_download(url) for url in urls[split]]


def repository_files(path: str, config: str | None = None) -> dict[str, list[str]]:
    """Return the data files of each split of a data set as `datasets` names them: hub URLs or local paths.

    Raises:
        DataError: `datasets` cannot find the set or the configuration.
    """
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(path, config)
    except Exception as error:  # the network, the hub and the repository's card fail in many ways
        raise _unreachable(path, error) from error
    return {str(split): [str(file) for file in files] for split, files in (builder.config.data_files or {}).items()}


def hub_folder(repo: str, patterns: tuple[str, ...]) -> str:
    """Return a local folder with the files of a data set that match one of the patterns, laid out as on the hub.

    Raises:
        DataError: the hub cannot be reached and the files are not in its cache, or none matches.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(repo, repo_type="dataset", allow_patterns=list(patterns))
    except Exception as error:  # the network and the hub fail in many ways
        raise _unreachable(repo, error) from error
    if not any(file.is_file() for file in Path(folder).rglob("*")):
        raise DataError(f'data set "{repo}" has no file like {" or ".join(patterns)}; it may have changed on the hub')
    return folder


def _download(url: str) -> str:
    if "://" not in url:
        return url
    from huggingface_hub import HfFileSystem, hf_hub_download

    try:
        file = HfFileSystem().resolve_path(url)
        return hf_hub_download(file.repo_id, file.path_in_repo, repo_type="dataset", revision=file.revision)
    except Exception as error:
        raise _unreachable(url, error) from error


def _unreachable(name: str, error: Exception) -> DataError:
    return DataError(
        f'data set "{name}" cannot be read from the hub: {explain(name, error, "dataset")}; without access to the hub '
        "copy the set's files to this machine and set `path` to their folder"
    )
