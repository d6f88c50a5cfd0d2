"""Images: every form is read, and nothing beyond the limits; what is damaged or no file is named."""

import io
import os
import socket
import struct
import tarfile
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile

from fastrm.data.media.images import decode_image, image_size, read_bytes
from fastrm.data.record import ImageRef
from fastrm.errors import RecordError
from fastrm.limits import MediaLimits
from tests.helpers.image_files import LIMITS, WRITERS, code_of, encoded, png_header, write_tar, write_zip


@pytest.fixture(params=["file", "tar", "zip", "span", "data"])
def make_ref(request, tmp_path):
    """A function from encoded bytes to a reference of each form."""

    def make(data):
        if request.param == "data":
            return ImageRef(data=data)
        if request.param == "file":
            (tmp_path / "a.png").write_bytes(data)
            return ImageRef(path=str(tmp_path / "a.png"))
        if request.param == "span":
            (tmp_path / "blob").write_bytes(b"before" + data + b"after")
            return ImageRef(path=str(tmp_path / "blob"), span=(6, len(data)))
        path = WRITERS[request.param](tmp_path / f"a.{request.param}", {"./x/a.png": data, "b": b"?"})
        return ImageRef(path=path, member="x/a.png")

    return make


def test_every_form_gives_the_same_bytes_size_and_pixels(make_ref):
    data = encoded()
    ref = make_ref(data)
    assert read_bytes(ref, LIMITS) == data
    assert image_size(ref, LIMITS) == (20, 10)
    assert np.array_equal(decode_image(ref, LIMITS), Image.open(io.BytesIO(data)))


def test_byte_limit_holds_in_every_form(make_ref):
    data = encoded()
    ref = make_ref(data)
    assert read_bytes(ref, MediaLimits(max_image_bytes=len(data))) == data
    for function in (read_bytes, image_size, decode_image):
        assert code_of(function, ref, MediaLimits(max_image_bytes=len(data) - 1)) == "IMAGE_TOO_LARGE"


def test_byte_limit_is_checked_before_reading(tmp_path):
    path = tmp_path / "huge.png"
    with open(path, "wb") as file:
        file.truncate(2**40)  # sparse: reading it would fail for want of memory
    assert code_of(read_bytes, ImageRef(path=str(path))) == "IMAGE_TOO_LARGE"


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_allowed_formats_decode(image_format):
    ref = ImageRef(data=encoded(image_format))
    assert image_size(ref, LIMITS) == (20, 10)
    image = decode_image(ref, LIMITS)
    assert (image.mode, image.size) == ("RGB", (20, 10))


@pytest.mark.parametrize(
    "options", [{"lossless": True}, {"quality": 50}, {"quality": 50, "exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}]
)
def test_webp_size_is_right_for_each_kind_of_file(options):
    for size in [(1, 1), (300, 7), (16_383, 2)]:
        assert image_size(ImageRef(data=encoded("WEBP", size, **options)), LIMITS) == size


@pytest.mark.parametrize("image_format", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_other_formats_are_refused(image_format):
    assert code_of(image_size, ImageRef(data=encoded(image_format))) == "IMAGE_FORMAT"


@pytest.mark.parametrize("data", [b"", b"%!PS-Adobe", b"<svg/>", b"not an image"])
def test_other_bytes_are_refused(data):
    assert code_of(decode_image, ImageRef(data=data)) == "IMAGE_FORMAT"


def test_pixel_limit_is_checked_from_the_header():
    ref = ImageRef(data=png_header(21_600, 21_600))
    with pytest.raises(RecordError) as caught:
        decode_image(ref, LIMITS)
    assert caught.value.code == "IMAGE_TOO_LARGE"
    assert caught.value.message == (
        f'image "{ref}" is 21,600 x 21,600 (466.6 MP), limit 50 MP; raise data.max_image_pixels or fix the file'
    )


def test_pixel_limit_of_webp_is_checked_before_the_canvas_is_made(monkeypatch):
    monkeypatch.setattr("fastrm.data.media.images.WebPImageFile", lambda file: pytest.fail("decoder was made"))
    ref = ImageRef(data=encoded("WEBP", (300, 200)))
    assert code_of(image_size, ref, MediaLimits(max_image_pixels=59_999)) == "IMAGE_TOO_LARGE"


def test_pixel_limit_is_inclusive():
    ref = ImageRef(data=encoded(size=(20, 10)))
    assert image_size(ref, MediaLimits(max_image_pixels=200)) == (20, 10)
    assert code_of(image_size, ref, MediaLimits(max_image_pixels=199)) == "IMAGE_TOO_LARGE"


def test_pillow_bomb_limit_neither_interferes_nor_changes(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for image_format in ("PNG", "JPEG"):
            assert decode_image(ImageRef(data=encoded(image_format)), LIMITS).size == (20, 10)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_zero_size_is_refused():
    assert code_of(image_size, ImageRef(data=png_header(0, 5))) == "IMAGE_DAMAGED"


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_truncated_image_is_damaged(image_format, share):
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    data = encoded(image_format, (200, 200))
    ref = ImageRef(data=data[: int(len(data) * share)])
    assert code_of(decode_image, ref) == "IMAGE_DAMAGED"


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_flipped_bytes_never_raise_anything_else(image_format):
    data = encoded(image_format, (40, 40))
    rng = np.random.default_rng(1)
    for _ in range(200):
        broken = bytearray(data)
        for at in rng.integers(0, len(data), 4):
            broken[at] = rng.integers(256)
        try:
            decode_image(ImageRef(data=bytes(broken)), LIMITS)
        except RecordError as error:
            assert error.code in ("IMAGE_DAMAGED", "IMAGE_FORMAT", "IMAGE_TOO_LARGE")


def test_header_of_a_plain_file_is_read_without_its_pixels(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded("PNG", (100, 100)))
    with open(path, "ab") as file:
        file.truncate(2**30)
    assert image_size(ImageRef(path=str(path)), MediaLimits(max_image_bytes=2**31)) == (100, 100)


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.close()


@pytest.mark.parametrize("make", [os.mkdir, make_fifo, make_socket])
def test_only_regular_files_are_opened(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)  # a socket's name has a length limit
    make("thing.png")
    for function in (read_bytes, image_size):
        assert code_of(function, ImageRef(path="thing.png")) == "IMAGE_NOT_A_FILE"


def test_device_is_not_a_file():
    assert code_of(read_bytes, ImageRef(path="/dev/zero")) == "IMAGE_NOT_A_FILE"


@pytest.mark.parametrize("name", ["absent.png", "a.png/b.png", "x" * 5000, "nul\0.png", "\ud800.png"])
def test_missing_file_is_named(tmp_path, name):
    (tmp_path / "a.png").write_bytes(b"")
    assert code_of(read_bytes, ImageRef(path=str(tmp_path / name))) == "IMAGE_MISSING"


@pytest.mark.parametrize("kind", WRITERS)
def test_missing_archive_and_member(tmp_path, kind):
    archive = WRITERS[kind](tmp_path / f"a.{kind}", {"a.png": encoded()})
    assert code_of(read_bytes, ImageRef(path=archive, member="b.png")) == "IMAGE_MISSING"
    assert code_of(read_bytes, ImageRef(path=archive + "x", member="a.png")) == "IMAGE_MISSING"


@pytest.mark.parametrize("kind", WRITERS)
def test_broken_archive_is_damaged(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(b"not an archive" * 100)
    assert code_of(read_bytes, ImageRef(path=str(path), member="a.png")) == "IMAGE_DAMAGED"


def test_truncated_tar_member_is_damaged(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, {"a.png": encoded(size=(100, 100))})
    os.truncate(path, 4096)
    assert code_of(read_bytes, ImageRef(path=str(path), member="a.png")) == "IMAGE_DAMAGED"


def test_tar_links_and_folders(tmp_path):
    path = tmp_path / "a.tar"
    data = encoded()
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
        for name, kind in [
            ("hard.png", tarfile.LNKTYPE),
            ("soft.png", tarfile.SYMTYPE),
            ("d", tarfile.DIRTYPE),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.png"
            tar.addfile(info)
    assert read_bytes(ImageRef(path=str(path), member="hard.png"), LIMITS) == data
    for name in ("soft.png", "d"):
        assert code_of(read_bytes, ImageRef(path=str(path), member=name)) == "IMAGE_NOT_A_FILE"


def test_zip_folder_symlink_and_unbounded_method_are_refused(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("d/", b"")
        link = zipfile.ZipInfo("soft.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("lzma.png", encoded(), zipfile.ZIP_LZMA)
    for name in ("d", "soft.png"):
        assert code_of(read_bytes, ImageRef(path=str(path), member=name)) == "IMAGE_NOT_A_FILE"
    assert code_of(read_bytes, ImageRef(path=str(path), member="lzma.png")) == "IMAGE_DAMAGED"


def test_zip_member_larger_than_declared_is_damaged(tmp_path):
    path = tmp_path / "a.zip"
    write_zip(path, {"a.png": b"\0" * 10_000_000})
    declared = struct.pack("<I", 10_000_000)
    path.write_bytes(path.read_bytes().replace(declared, struct.pack("<I", 1000)))
    assert code_of(read_bytes, ImageRef(path=str(path), member="a.png")) == "IMAGE_DAMAGED"


@pytest.mark.parametrize("kind", WRITERS)
def test_replaced_archive_is_indexed_anew(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    for size in [(5, 5), (60, 50)]:
        ref = ImageRef(path=WRITERS[kind](path, {"a.png": encoded(size=size)}), member="a.png")
        assert image_size(ref, LIMITS) == size


@pytest.mark.parametrize("kind", WRITERS)
def test_archive_is_read_by_threads_and_forked_processes_at_once(tmp_path, kind):
    images = {f"{i}.png": encoded(size=(i + 1, 40)) for i in range(40)}
    path = WRITERS[kind](tmp_path / f"a.{kind}", images)

    def all_right():
        return all(
            read_bytes(ImageRef(path=path, member=name), LIMITS) == data
            for _ in range(20)
            for name, data in images.items()
        )

    assert all_right()  # the archive is open before the fork
    children = [fork_check(all_right) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(lambda _: all_right(), range(2)))
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


def fork_check(check):
    """Run a check in a forked process; its exit status is 0 if the check holds."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if check() else 2
        finally:
            os._exit(status)
    return child
