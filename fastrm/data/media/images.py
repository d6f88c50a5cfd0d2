"""Decoding of an `ImageRef` to pixels: bounded reads, an allowlist of formats, limits before decoding.

Images come from strangers. Only JPEG, PNG and WebP are parsed; bytes are counted before they are
read and pixels, from the header, before they are decoded. Pillow's own bomb limit, a global that
other code may rely on, is neither used nor changed: its plugins are called directly, below the
check in ``Image.open``.
"""

import io
import os
import stat
import struct
from contextlib import contextmanager
from typing import BinaryIO

from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from fastrm.data.media.archive_members import BadArchive
from fastrm.data.media.archives import ArchiveError, read_member
from fastrm.data.record import ImageRef, MediaRef, VideoRef
from fastrm.errors import FastrmError, RecordError
from fastrm.limits import MediaLimits

HEADER_BYTES = 30  # enough to tell the three formats apart and to size a WebP
_PNG = b"\x89PNG\r\n\x1a\n"
# The PNG texts that may hold the orientation, and the length of the longest name.
_PNG_KEYS = (b"Raw profile type exif", b"XML:com.adobe.xmp")
_PNG_KEY_BYTES = 22
_MOST_CHUNKS = 10_000  # writers make fewer of 64 MB
# Transposes by EXIF orientation; 1 is upright. Those from 5 on exchange width and height.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_LYING = (5, 6, 7, 8)
_FIND_IT = "check the path and the images folder"


def read_bytes(ref: ImageRef, limits: MediaLimits) -> bytes:
    """Read the encoded bytes of an image; the size is checked before anything is read.

    Raises:
        RecordError: IMAGE_MISSING, IMAGE_NOT_A_FILE, IMAGE_TOO_LARGE, or IMAGE_DAMAGED for an archive
            that cannot be read.
    """
    with open_bytes(ref, limits) as file:
        return file.read(_max_bytes(ref, limits))


def image_size(ref: ImageRef, limits: MediaLimits) -> tuple[int, int]:
    """Return width and height in pixels of the image that `decode_image` returns, from the header alone.

    A PNG whose EXIF or XMP data comes after its pixels, or that is cut into very many chunks, has to be decoded for
    that; both are rare.

    Raises:
        RecordError: those of `read_bytes`; IMAGE_FORMAT, IMAGE_DAMAGED or IMAGE_TOO_LARGE.
    """
    with open_bytes(ref, limits) as file:
        image = _open_image(file, ref, limits)
        with naming_damage(ref):
            if isinstance(image, PngImageFile) and _tells_of_itself_late(file):
                image.load()
            width, height = image.size
            return (height, width) if _orientation(image) in _LYING else (width, height)


def decode_image(ref: ImageRef, limits: MediaLimits) -> Image.Image:
    """Decode the first frame of an image to RGB, as the stock image processor sees it.

    Pixels are those of transformers' ``convert_to_rgb``: transparency is composited onto white. The
    image is turned as its EXIF orientation says, as ``transformers.image_utils.load_image`` and
    ``datasets.Image`` do before the processor.

    Raises:
        RecordError: those of `image_size`; a truncated file is IMAGE_DAMAGED.
    """
    with open_bytes(ref, limits) as file:
        image = _open_image(file, ref, limits)
        with naming_damage(ref):
            return to_rgb(upright(image))


def upright(image: Image.Image) -> Image.Image:
    """Return the image turned as its EXIF or XMP orientation says: the pixels of ``PIL.ImageOps.exif_transpose``.

    That function also writes the EXIF data again, which fails where it is not well formed, and copies an image that is
    upright already.
    """
    image.load()  # a PNG may hold its orientation after the pixels
    method = _TURNS.get(_orientation(image))
    return image if method is None else image.transpose(method)


def _orientation(image: Image.Image) -> int:
    """Return the orientation from 1 (upright) to 8, by what has been read of the file; 1 if it is missing or bad."""
    try:
        # PngImageFile.getexif would decode the image to find out whether more follows.
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow's TIFF parser raises many kinds: SyntaxError, struct.error, KeyError ...
        return 1


def _tells_of_itself_late(file: BinaryIO) -> bool:
    """Return whether a PNG file may have EXIF or XMP data after its pixels, by the heads of its chunks.

    True without a look at all chunks if there are very many.
    """
    place, is_late = file.tell(), False
    file.seek(len(_PNG))
    try:
        for _ in range(_MOST_CHUNKS):
            head = file.read(8 + _PNG_KEY_BYTES)
            num_bytes, kind = int.from_bytes(head[:4], "big"), head[4:8]
            if not kind.isalpha() or kind == b"IEND":
                return False
            is_late |= kind == b"IDAT"
            if is_late and (kind == b"eXIf" or head[8:].split(b"\0")[0] in _PNG_KEYS):
                return True
            file.seek(num_bytes + 4 - (len(head) - 8), os.SEEK_CUR)  # 4: the checksum
        return True
    finally:
        file.seek(place)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow image to RGB pixels, transparency composited onto white.

    As transformers does since 5.21. Earlier versions drop the alpha channel, which shows whatever
    colour clear pixels happen to have; here the pixels do not depend on the installed version.
    """
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(background, image)
    # Pillow would copy an image that is RGB already.
    return image if image.mode == "RGB" else image.convert("RGB")


def encode_png(image: Image.Image) -> bytes:
    """Encode an image as PNG bytes whose decoded pixels are exactly `to_rgb(upright(image))`."""
    buffer = io.BytesIO()
    to_rgb(upright(image)).save(buffer, "PNG", compress_level=1, exif=b"")
    return buffer.getvalue()


def _open_image(file: BinaryIO, ref: ImageRef, limits: MediaLimits) -> Image.Image:
    """Parse the header and check format and size; the pixels stay encoded."""
    header = file.read(HEADER_BYTES)
    file.seek(0)
    plugin = _plugin(header)
    if plugin is None:
        raise RecordError("IMAGE_FORMAT", f'image "{ref}" is not a JPEG, PNG or WebP file; convert it to one')
    if plugin is WebPImageFile:
        # Creating the WebP decoder allocates the canvas, so its size is checked first.
        _check_pixels(_webp_size(header, ref), ref, limits)
    with naming_damage(ref):
        image = plugin(file)
    _check_pixels(image.size, ref, limits)
    return image


def _plugin(header: bytes) -> type | None:
    if header.startswith(b"\xff\xd8\xff"):
        return JpegImageFile
    if header.startswith(_PNG):
        return PngImageFile
    if header.startswith(b"RIFF") and header[8:12] == b"WEBP":
        return WebPImageFile
    return None


def _webp_size(header: bytes, ref: ImageRef) -> tuple[int, int]:
    """Return the canvas size of any of the three kinds of WebP file (RFC 9649, section 2)."""
    kind, body = header[12:16], header[20:]
    if len(body) == 10 and kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if len(body) == 10 and kind == b"VP8 ":
        width, height = struct.unpack("<HH", body[6:10])
        return width & 0x3FFF, height & 0x3FFF
    if len(body) >= 5 and kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    raise RecordError("IMAGE_DAMAGED", f'image "{ref}" has no valid WebP header; fix or remove the file')


def _check_pixels(size: tuple[int, int], ref: ImageRef, limits: MediaLimits) -> None:
    width, height = size
    if width <= 0 or height <= 0:
        raise RecordError("IMAGE_DAMAGED", f'image "{ref}" is {width} x {height} pixels; fix the file')
    if width * height > limits.max_image_pixels:
        raise RecordError(
            "IMAGE_TOO_LARGE",
            f'image "{ref}" is {width:,} x {height:,} ({width * height / 1e6:.1f} MP), '
            f"limit {limits.max_image_pixels / 1e6:g} MP; raise data.max_image_pixels or fix the file",
        )


@contextmanager
def naming_damage(ref: MediaRef):
    """Name the image in any exception of a decoder: on hostile bytes it can be of any kind."""
    try:
        yield
    except (RecordError, FastrmError, MemoryError):
        raise
    except Exception as error:
        raise media_error(ref, "DAMAGED", f"cannot be decoded: {error}; fix or remove the file") from error


def media_error(ref: MediaRef, problem: str, text: str) -> RecordError:
    """Return the error for an image or a video that cannot be used: IMAGE_... or VIDEO_..., its name, then the text."""
    return RecordError(f"{ref.noun.upper()}_{problem}", f'{ref.noun} "{ref}" {text}')


def open_bytes(ref: MediaRef, limits: MediaLimits) -> BinaryIO:
    """Open a seekable file over the encoded bytes. A plain file is read lazily, the others at once.

    Raises:
        RecordError: as `read_bytes`, VIDEO_... for a video.
    """
    if ref.data is not None:
        _check_bytes(len(ref.data), ref, limits)
        return io.BytesIO(ref.data)
    with naming_missing(ref):
        if ref.span is not None:
            return io.BytesIO(_read_span(ref, limits))
        if ref.member is None:
            return _open_file(ref, limits)
        return io.BytesIO(_read_member(ref, limits))


def _read_member(ref: MediaRef, limits: MediaLimits) -> bytes:
    with naming_archive(ref):
        return read_member(ref.path, ref.member, lambda num_bytes: _check_bytes(num_bytes, ref, limits))


@contextmanager
def naming_archive(ref: MediaRef):
    """Name the image or video in an error of its archive, or of its member of it."""
    try:
        yield
    except BadArchive as error:
        text = f'archive "{ref.path}" cannot be read: {error}; make it again'
        raise RecordError(f"{ref.noun.upper()}_DAMAGED", text) from error
    except ArchiveError as error:
        hint = {"MISSING": f"; {_FIND_IT}", "NOT_A_FILE": f"; name {_a(ref)} file"}.get(error.problem, "")
        raise media_error(ref, error.problem, error.text + hint) from error


def _open_file(ref: MediaRef, limits: MediaLimits) -> BinaryIO:
    # Checked before opening: opening a fifo blocks, and opening a device can act on it.
    status = os.stat(ref.path)
    if not stat.S_ISREG(status.st_mode):
        raise _not_a_file(ref)
    _check_bytes(status.st_size, ref, limits)
    return open(ref.path, "rb")


def _read_span(ref: MediaRef, limits: MediaLimits) -> bytes:
    offset, num_bytes = ref.span
    _check_bytes(num_bytes, ref, limits)
    with open(ref.path, "rb") as file:
        file.seek(offset)
        data = file.read(num_bytes)
    if len(data) != num_bytes:
        raise media_error(ref, "DAMAGED", "is cut short: the file ends inside it; make it again")
    return data


@contextmanager
def naming_missing(ref: MediaRef):
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise media_error(ref, "MISSING", f"cannot be opened: {reason}; {_FIND_IT}") from error
    except ValueError as error:  # a path that no file system can hold
        code = f"{ref.noun.upper()}_MISSING"
        raise RecordError(code, f"{ref.noun} {str(ref)!r} cannot be opened: {error}") from error


def _not_a_file(ref: MediaRef) -> RecordError:
    return media_error(ref, "NOT_A_FILE", f"is not a regular file; name {_a(ref)} file")


def _a(ref: MediaRef) -> str:
    return f"an {ref.noun}" if ref.noun == "image" else f"a {ref.noun}"


def _check_bytes(num_bytes: int, ref: MediaRef, limits: MediaLimits) -> None:
    limit = _max_bytes(ref, limits)
    if num_bytes > limit:
        raise media_error(
            ref,
            "TOO_LARGE",
            f"has {num_bytes:,} bytes, limit {limit:,}; raise data.max_{ref.noun}_bytes or fix the file",
        )


def _max_bytes(ref: MediaRef, limits: MediaLimits) -> int:
    return limits.max_video_bytes if isinstance(ref, VideoRef) else limits.max_image_bytes
