"""Images of a row: from the forms that datasets use to `ImageRef`. Nothing is opened here.

A path in a row is data, not a command: it may only name a file below the images folder or a member
of the images archive, and URLs are never fetched.
"""

import base64
import binascii
import os
import posixpath
import re
from collections.abc import Callable
from functools import partial

from PIL import Image

from fastrm.data.images import encode_png
from fastrm.data.record import ImageRef
from fastrm.data.sources.values import bad_row
from fastrm.errors import DataError, RecordError

Resolve = Callable[[str], ImageRef]  # from the path that a row names

MAX_PATH_CHARS = 4096  # longer "paths" are base64 without its prefix
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_DATA_URI = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)


def path_resolver(images: str) -> Resolve:
    """The resolver for an images folder, or a .tar or .zip archive.

    Raises:
        DataError: it does not exist or is neither.
    """
    if os.path.isdir(images):
        return in_folder(images)
    if not os.path.exists(images):
        raise DataError(f'images "{images}" does not exist; name a folder or a .tar or .zip archive')
    if images.lower().endswith((".tar", ".zip")):
        return partial(_in_archive, os.path.abspath(images))
    raise DataError(
        f'images "{images}" is not a folder and not a .tar or .zip archive; '
        "unpack it, or (for .tar.gz) decompress it, since single images are read from it"
    )


def in_folder(folder: str) -> Resolve:
    """A resolver for paths below a folder, by name: symbolic links in the folder are the owner's."""
    base = os.path.abspath(folder)
    return partial(_in_folder, base, os.path.join(base, ""))


def any_path(path: str) -> ImageRef:
    """A resolver for local callers, who may name every file that they can read."""
    _check_path(path)
    return ImageRef(path=os.path.abspath(path))


def no_path(path: str) -> ImageRef:
    """A resolver for callers from outside, who must send the bytes."""
    raise RecordError("IMAGE_PATH", f"image path {path[:80]!r} is refused: send the image's bytes")


def image_refs(value: object, resolve: Resolve, name: str) -> list[ImageRef]:
    """The images of a field: null, an empty text or list is none, anything else one or a list.

    Raises:
        RecordError: BAD_ROW, IMAGE_PATH or BAD_BASE64.
    """
    if value is None or (isinstance(value, str) and not value):
        return []
    if isinstance(value, (list, tuple)):
        return [image_ref(item, resolve, f"{name}[{i}]") for i, item in enumerate(value)]
    return [image_ref(value, resolve, name)]


def row_images(row: dict, resolve: Resolve) -> list[ImageRef]:
    """The images of a row's `images`, or else its `image`; raises as `image_refs` does."""
    name = "images" if "images" in row else "image"
    return image_refs(row.get(name), resolve, name)


def image_ref(value: object, resolve: Resolve, name: str) -> ImageRef:
    """One image: a path, a base64 data URI, bytes, ``{"bytes", "path"}`` (bytes win) or a Pillow image."""
    if isinstance(value, dict):
        key = next((key for key in ("bytes", "path", "url") if value.get(key) is not None), "bytes")
        # JSON cannot hold bytes: text under that key is base64 that wants to be a data URI.
        if (key == "bytes") != isinstance(value.get(key), bytes):
            raise bad_row(f"{name}.{key}", value.get(key), "bytes" if key == "bytes" else "a path or data URI")
        value = value[key]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str) and value:
        return _data_uri(value, name) if value[:5].lower() == "data:" else resolve(value)
    if isinstance(value, bytes) and value:
        return ImageRef(data=value)
    if isinstance(value, Image.Image):
        return ImageRef(data=_encoded(value, name))
    raise bad_row(name, value, 'an image: path, data URI, bytes or {"bytes", "path"}, not empty')


def _encoded(image: Image.Image, name: str) -> bytes:
    try:
        return encode_png(image)
    except (OSError, ValueError) as error:
        raise RecordError("IMAGE_DAMAGED", f'"{name}" cannot be decoded: {error}; replace the image') from error


def _data_uri(uri: str, name: str) -> ImageRef:
    match = _DATA_URI.match(uri)
    if match is None:
        raise RecordError("BAD_BASE64", f'"{name}" is a data URI but not base64; write data:image/png;base64,...')
    try:
        data = base64.b64decode(uri[match.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise RecordError("BAD_BASE64", f'"{name}" is not valid base64: {error}; encode it again') from error
    if not data:
        raise RecordError("BAD_BASE64", f'"{name}" is an empty data URI; encode it again')
    return ImageRef(data=data)


def _check_path(path: str) -> None:
    if len(path) > MAX_PATH_CHARS:
        reason = f'has {len(path):,} characters; put "data:image/png;base64," before base64'
    elif "\0" in path or not _encodes(path):
        reason = "holds a NUL or a lone surrogate; correct the name"
    elif _URL.match(path):
        reason = "is a URL, which is never fetched; download the image"
    else:
        return
    raise RecordError("IMAGE_PATH", f"image path {path[:80]!r} {reason}")


def _encodes(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _in_folder(base: str, prefix: str, path: str) -> ImageRef:
    _check_path(path)
    # Normalised by name before it is opened, so what is opened is what was checked.
    full = os.path.normpath(os.path.join(base, path))
    if not full.startswith(prefix):
        raise RecordError(
            "IMAGE_PATH", f'image path "{path}" leaves the images folder "{base}"; set `images` to its folder'
        )
    return ImageRef(path=full)


def _in_archive(archive: str, path: str) -> ImageRef:
    _check_path(path)
    member = posixpath.normpath(path)
    if member.startswith("/") or member.split("/", 1)[0] in (".", ".."):
        raise RecordError("IMAGE_PATH", f'image path "{path}" is not inside the archive "{archive}"')
    return ImageRef(path=archive, member=member)
