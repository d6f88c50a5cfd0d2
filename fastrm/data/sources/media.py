"""Conversion of a row's images and videos, in the forms that data sets use, to `MediaRef`. Nothing is decoded here.

A path in a row is data, not a command: it may only name a file below the media folder or a member
of an archive, and URLs are never fetched.
"""

import base64
import binascii
import os
import posixpath
import re
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.parse import unquote

from PIL import Image

from fastrm.data.media.archive_members import BadArchive
from fastrm.data.media.archives import ARCHIVE_SUFFIXES, archive_exists, member_names
from fastrm.data.media.images import encode_png
from fastrm.data.record import ImageRef, MediaRef, VideoRef
from fastrm.data.sources.values import bad_row
from fastrm.errors import DataError, RecordError, looked_for

# A function from a row's path, and optionally the kind of medium (ImageRef by default), to the medium.
Resolve = Callable[..., MediaRef]

MEDIA_KEYS = ("images", "image", "videos", "video")  # keys of a row in any layout
MAX_PATH_CHARS = 4096  # longer "paths" are base64 without its prefix
# Pillow reads a file when its pixels are first asked for; two threads that ask at once would mix their reads.
_LOADING = threading.Lock()
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_DATA_URI = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
_MAX_NAME_CHARS = 1024  # a longer text is no file name, whatever its ending
_SUFFIXES = {
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif"), "image"),
    **dict.fromkeys((".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v"), "video"),
    **dict.fromkeys((".wav", ".mp3", ".flac", ".ogg", ".m4a"), "audio"),
}
# The first bytes of encoded media.
_IMAGE_HEADS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*")
_HEAD_CHARS = 32  # characters of base64 for 24 bytes, enough to tell the kind of a file
_HEAD = re.compile(r"[A-Za-z0-9+/]{32}")


def path_resolver(images: str) -> Resolve:
    """Return the resolver for a media folder or a .tar or .zip archive; an archive in parts is named without them.

    Raises:
        DataError: if it does not exist or is neither.
    """
    if os.path.isdir(images):
        return in_folder(images)
    if not archive_exists(images):
        where = looked_for(images)
        raise DataError(f'images "{images}" does not exist{where}; name a folder or a .tar or .zip archive')
    if images.lower().endswith(ARCHIVE_SUFFIXES):
        return partial(_in_archive, os.path.abspath(images), "")
    raise DataError(
        f'images "{images}" is not a folder and not a .tar or .zip archive; '
        "unpack it, or (for .tar.gz) decompress it, since single images are read from it"
    )


def in_folder(folder: str) -> Resolve:
    """Return a resolver for paths below a folder, checked by name: symbolic links are followed."""
    base = os.path.abspath(folder)
    return partial(_in_folder, base, os.path.join(base, ""))


def in_archive_folder(archive: str, folder: str) -> Resolve:
    """Return a resolver for paths below a folder of an archive."""
    return partial(_in_archive, os.path.abspath(archive), posixpath.normpath(folder))


def in_archives(folder: str) -> Resolve:
    """Return a resolver for a folder of archives: the first component of a path names the archive.

    ``long/1.jpg`` is member ``long/1.jpg``, or ``1.jpg`` if the archive lacks that folder, of `long.zip` or
    `long.tar`, in the folder or in its folder `long`. Where there is no such archive it is a file.
    """
    base = os.path.abspath(folder)
    archives = {}
    for path in sorted([*Path(base).glob("*"), *Path(base).glob("*/*")]):
        is_own = path.parent == Path(base) or path.stem == path.parent.name
        if is_own and path.name.lower().endswith(ARCHIVE_SUFFIXES):
            archives.setdefault(path.stem, (str(path), _has_own_folder(str(path), path.stem)))
    return partial(_in_archives, in_folder(base), archives)


def _has_own_folder(archive: str, name: str) -> bool:
    """Return whether the members of an archive, judged by the first, lie in a folder of its name."""
    try:
        return next(iter(member_names(archive)), "").startswith(f"{name}/")
    except (BadArchive, OSError) as error:
        raise DataError(f'archive "{archive}" cannot be read: {error}; make it again') from error


def any_path(path: str, kind: type[MediaRef] = ImageRef) -> MediaRef:
    """Resolve a path for local callers, who may name every file that they can read."""
    _check_path(path, kind)
    return kind(path=os.path.abspath(path))


def file_kind(text: str) -> str | None:
    """Return ``image``, ``video`` or ``audio`` by the ending of a file name or URL; None for another text."""
    if len(text) > _MAX_NAME_CHARS or "\n" in text:
        return None
    name = text.partition("?")[0].partition("#")[0] if _URL.match(text) else text
    return _SUFFIXES.get(os.path.splitext(name.rstrip())[1].lower())


def media_kind(data: str | bytes | bytearray) -> str | None:
    """Return ``image``, ``video`` or ``audio`` for a data URI, base64 or bytes by how they begin; else None."""
    if isinstance(data, str):
        if data[:5].lower() == "data:":
            kind = data[5:11].lower().partition("/")[0]
            return kind if kind in ("image", "video", "audio") else None
        if not _HEAD.match(data):
            return None
        data = base64.b64decode(data[:_HEAD_CHARS])
    if data.startswith(_IMAGE_HEADS):
        return "image"
    if data[:4] == b"RIFF":
        return {b"WEBP": "image", b"WAVE": "audio", b"AVI ": "video"}.get(bytes(data[8:12]))
    return "video" if data[4:8] == b"ftyp" or data[:4] == b"\x1a\x45\xdf\xa3" else None


def media_refs(value: object, resolve: Resolve, name: str, kind: type[MediaRef]) -> list[MediaRef]:
    """Read the images or videos of a field: null, an empty text or list is none, anything else one or a list.

    Raises:
        RecordError: BAD_ROW, IMAGE_PATH, VIDEO_PATH or BAD_BASE64.
    """
    if value is None or (isinstance(value, str) and not value):
        return []
    if isinstance(value, (list, tuple)):
        return [media_ref(item, resolve, f"{name}[{i}]", kind) for i, item in enumerate(value)]
    return [media_ref(value, resolve, name, kind)]


def image_refs(value: object, resolve: Resolve, name: str) -> list[MediaRef]:
    """Read the images of a field, as `media_refs`."""
    return media_refs(value, resolve, name, ImageRef)


def row_media(row: dict, resolve: Resolve) -> list[MediaRef]:
    """Read the images of a row's `images` or `image`, then its videos likewise.

    Raises:
        RecordError: as `media_refs`; UNREAD_MEDIA if a row has both and the second names others.
    """
    found = []
    for kind in (ImageRef, VideoRef):
        one, many = kind.noun, f"{kind.noun}s"
        single, refs = (media_refs(row.get(name), resolve, name, kind) for name in (one, many))
        if refs and any(ref not in refs for ref in single):
            raise RecordError("UNREAD_MEDIA", f'"{one}" holds one that "{many}" does not; put all into "{many}"')
        found += refs or single
    return found


def media_ref(value: object, resolve: Resolve, name: str, kind: type[MediaRef]) -> MediaRef:
    """Read one image or video: a path, base64 data URI, bytes, ``{"bytes", "path"}`` or Pillow image.

    Of ``{"bytes", "path"}`` the bytes are read.
    """
    if isinstance(value, dict):
        key = next((key for key in ("bytes", "path", "url") if value.get(key) is not None), "bytes")
        # JSON cannot hold bytes: text under that key is base64 without the head of a data URI.
        if (key == "bytes") != isinstance(value.get(key), bytes):
            raise bad_row(f"{name}.{key}", value.get(key), "bytes" if key == "bytes" else "a path or data URI")
        value = value[key]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str) and value:
        if value[:5].lower() == "data:":
            return _data_uri(value, name, kind)
        return resolve(_local_path(value, kind), kind)
    if isinstance(value, bytes) and value:
        return kind(data=value)
    if kind is ImageRef and isinstance(value, Image.Image):
        return ImageRef(data=encoded(value, name))
    if kind is ImageRef and hasattr(value, "shape"):
        raise bad_row(name, value, "an image; make one of an array of pixels by PIL.Image.fromarray")
    article = "an" if kind is ImageRef else "a"
    raise bad_row(name, value, f'{article} {kind.noun}: path, data URI, bytes or {{"bytes", "path"}}, not empty')


def _local_path(path: str, kind: type[MediaRef]) -> str:
    """Return the path that a file URL stands for, or the path itself.

    Raises:
        RecordError: IMAGE_PATH or VIDEO_PATH for a file URL of another host, and for base64.
    """
    if path[:7].lower() == "file://":
        host, slash, rest = path[7:].partition("/")
        if host not in ("", "localhost") or not slash:
            raise _path_error(
                path[:80], kind, "is a file URL with a host; write file:///FOLDER/FILE, or the path alone"
            )
        return unquote(slash + rest)
    if media_kind(path) is not None:
        raise _path_error(path[:40], kind, f'is base64; put "data:{kind.noun}/...;base64," in front of it')
    return path


def encoded(image: Image.Image, name: str) -> bytes:
    """Return the PNG of a Pillow image.

    Raises:
        RecordError: IMAGE_DAMAGED if its pixels cannot be read, naming the field.
    """
    try:
        with _LOADING:
            image.load()
        return encode_png(image)
    except MemoryError:
        raise
    except Exception as error:  # a picture that Pillow has not read yet may raise anything that its decoder raises
        raise RecordError("IMAGE_DAMAGED", f'"{name}" cannot be decoded: {error}; replace the image') from error


def _data_uri(uri: str, name: str, kind: type[MediaRef]) -> MediaRef:
    match = _DATA_URI.match(uri)
    if match is None:
        raise RecordError("BAD_BASE64", f'"{name}" is a data URI but not base64; write data:image/png;base64,...')
    return kind(data=decode_base64(uri[match.end() :], name))


def decode_base64(text: str, name: str) -> bytes:
    """Decode a text in base64 to bytes.

    Raises:
        RecordError: BAD_BASE64.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RecordError("BAD_BASE64", f'"{name}" is not valid base64: {error}; encode it again') from error
    if not data:
        raise RecordError("BAD_BASE64", f'"{name}" is an empty data URI; encode it again')
    return data


def _check_path(path: str, kind: type[MediaRef]) -> None:
    if len(path) > MAX_PATH_CHARS:
        reason = f'has {len(path):,} characters; put "data:image/png;base64," before base64'
    elif "\0" in path or not _encodes(path):
        reason = "holds a NUL or a lone surrogate; correct the name"
    elif _URL.match(path):
        reason = f"is a URL, which is never fetched; download the {kind.noun}"
    else:
        return
    raise _path_error(path[:80], kind, reason)


def _path_error(path: str, kind: type[MediaRef], reason: str) -> RecordError:
    return RecordError(f"{kind.noun.upper()}_PATH", f"{kind.noun} path {path!r} {reason}")


def _encodes(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _in_folder(base: str, prefix: str, path: str, kind: type[MediaRef] = ImageRef) -> MediaRef:
    _check_path(path, kind)
    # The path is normalised before the check, so that the file that is opened is the one that was checked.
    full = os.path.normpath(os.path.join(base, path))
    if not full.startswith(prefix):
        raise _path_error(path, kind, f'leaves the {kind.noun}s folder "{base}"; set `images` to its folder')
    return kind(path=full)


def _in_archive(archive: str, folder: str, path: str, kind: type[MediaRef] = ImageRef) -> MediaRef:
    _check_path(path, kind)
    return kind(path=archive, member=posixpath.join(folder, _inner_path(path, kind, archive)))


def _in_archives(
    files: Resolve, archives: dict[str, tuple[str, bool]], path: str, kind: type[MediaRef] = ImageRef
) -> MediaRef:
    _check_path(path, kind)
    first, _, rest = posixpath.normpath(path).partition("/")
    if first not in archives or not rest:
        return files(path, kind)
    archive, has_folder = archives[first]
    member = _inner_path(path, kind, archive)
    return kind(path=archive, member=member if has_folder else rest)


def _inner_path(path: str, kind: type[MediaRef], archive: str) -> str:
    member = posixpath.normpath(path)
    if member.startswith("/") or member.split("/", 1)[0] in (".", ".."):
        raise _path_error(path, kind, f'is not inside the archive "{archive}"; correct the path')
    return member
