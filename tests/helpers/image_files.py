"""Small images in bytes and in archives, good and bad, for the tests of readers."""

import io
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from fastrm.errors import RecordError
from fastrm.limits import MediaLimits

LIMITS = MediaLimits()
RNG_SEED = 0


def encoded(image_format="PNG", size=(20, 10), mode="RGB", **options):
    pixels = np.random.default_rng(RNG_SEED).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, image_format, **options)
    return buffer.getvalue()


def png_header(width, height):
    """A PNG that declares its size and holds no pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def code_of(function, ref, limits=LIMITS):
    with pytest.raises(RecordError) as caught:
        function(ref, limits)
    return caught.value.code


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def write_zip(path, members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return str(path)


WRITERS = {"tar": write_tar, "zip": write_zip}
