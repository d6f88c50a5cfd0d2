"""Pixels of images are those of the stock loaders and processors: orientations, modes, animations."""

import io
from inspect import signature

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from fastrm.data.media.images import decode_image, encode_png, image_size, to_rgb
from fastrm.data.record import ImageRef
from tests.helpers.image_files import LIMITS, RNG_SEED, encoded


def test_first_frame_of_an_animation_is_decoded():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for image_format in ("PNG", "WEBP"):
        buffer = io.BytesIO()
        options = {"lossless": True} if image_format == "WEBP" else {}
        frames[0].save(buffer, image_format, save_all=True, append_images=frames[1:], **options)
        assert decode_image(ImageRef(data=buffer.getvalue()), LIMITS).getpixel((0, 0)) == (255, 0, 0)


ORIENTATION = 0x0112


def oriented(kind, orientation):
    """A file of 20 x 10 pixels that says its orientation in one of the ways that Pillow knows."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    xmp = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'
    if kind == "JPEG with XMP":
        return encoded("JPEG", (20, 10), xmp=xmp.encode())
    if not kind.startswith("PNG"):
        return encoded(kind, (20, 10), exif=exif)
    info = PngInfo()
    if kind == "PNG with XMP":
        info.add_itxt("XML:com.adobe.xmp", xmp)
        return encoded("PNG", (20, 10), pnginfo=info)
    if kind == "PNG with a raw profile":
        data = exif.tobytes()
        info.add_text("Raw profile type exif", f"\nexif\n{len(data):8}\n{data.hex()}\n", zip=True)
        return encoded("PNG", (20, 10), pnginfo=info)
    early = encoded("PNG", (20, 10), exif=exif)
    return early if kind == "PNG" else chunk_last(early, b"eXIf")


def chunk_last(png, kind):
    """The file with the chunk of this kind moved behind its pixels."""
    start = png.index(kind) - 4
    stop = start + 12 + int.from_bytes(png[start : start + 4], "big")
    rest, end = png[:start] + png[stop:], len(png) - 12 - (stop - start)
    return rest[:end] + png[start:stop] + rest[end:]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "kind", ["JPEG", "WEBP", "PNG", "PNG, late", "PNG with XMP", "PNG with a raw profile", "JPEG with XMP"]
)
def test_images_are_turned_as_stock_loaders_turn_them(tmp_path, kind, orientation):
    from transformers.image_utils import load_image

    file = tmp_path / "image"
    file.write_bytes(oriented(kind, orientation))
    stock, ref = load_image(str(file)), ImageRef(path=str(file))
    assert stock.size == ((10, 20) if orientation > 4 else (20, 10))
    assert image_size(ref, LIMITS) == stock.size
    assert np.array_equal(decode_image(ref, LIMITS), stock)
    with Image.open(file) as image:  # as the Python interface takes it
        assert np.array_equal(decode_image(ImageRef(data=encode_png(image)), LIMITS), stock)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_there_is_not_turns_nothing(orientation):
    ref = ImageRef(data=oriented("JPEG", orientation))
    assert image_size(ref, LIMITS) == decode_image(ref, LIMITS).size == (20, 10)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0nothing", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12"]
)
def test_exif_data_that_cannot_be_read_turns_nothing(exif):
    ref = ImageRef(data=encoded("JPEG", (20, 10), exif=exif))
    assert image_size(ref, LIMITS) == decode_image(ref, LIMITS).size == (20, 10)


@pytest.mark.parametrize("profile", ["zz zz", "4d4d"], ids=["no hexadecimal", "no TIFF"])
def test_a_raw_profile_that_cannot_be_read_turns_nothing(profile):
    """Pillow raises for these, where it takes broken EXIF data of other files for none."""
    info = PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n  8\n{profile}")
    ref = ImageRef(data=encoded("PNG", (20, 10), pnginfo=info))
    assert image_size(ref, LIMITS) == decode_image(ref, LIMITS).size == (20, 10)


def test_only_a_png_that_tells_of_itself_late_is_decoded_for_its_size(monkeypatch):
    decoded = []
    load = PngImageFile.load
    monkeypatch.setattr(PngImageFile, "load", lambda image: (decoded.append(image), load(image))[1])
    info = PngInfo()
    info.add_text("date:create", "2024")
    for data in (oriented("PNG", 6), chunk_last(encoded("PNG", pnginfo=info), b"tEXt"), encoded("PNG", (300, 300))):
        image_size(ImageRef(data=data), LIMITS)
    assert not decoded
    image_size(ImageRef(data=oriented("PNG, late", 6)), LIMITS)
    assert decoded


def images_of_every_mode():
    rng = np.random.default_rng(RNG_SEED)
    rgba = Image.fromarray(rng.integers(0, 256, (9, 11, 4), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 2**16, (9, 11), dtype=np.uint16))
    palette = rgba.convert("RGB").quantize(16)
    yield from (
        ("RGBA", rgba, {}),
        ("LA", rgba.convert("LA"), {}),
        ("RGB", rgba.convert("RGB"), {}),
        ("RGB-color-key", rgba.convert("RGB"), {"transparency": rgba.convert("RGB").getpixel((3, 3))}),
        ("L", rgba.convert("L"), {}),
        ("L-key", rgba.convert("L"), {"transparency": 7}),
        ("1", rgba.convert("1"), {}),
        ("P", palette, {}),
        ("P-key", palette, {"transparency": 3}),
        ("P-alphas", palette, {"transparency": bytes(range(0, 256, 16))}),
        ("I;16", deep, {}),
        ("I;16-key", deep, {"transparency": 5}),
    )


def stock_transforms():
    transforms = pytest.importorskip("transformers.image_transforms")
    if "return_numpy" not in signature(transforms.convert_to_rgb).parameters:
        pytest.skip("transformers before 5.21 drops the alpha channel instead of compositing onto white")
    return transforms


@pytest.mark.parametrize("image, options", [pytest.param(i, o, id=n) for n, i, o in images_of_every_mode()])
def test_pixels_are_those_of_the_stock_conversion(image, options):
    transforms = stock_transforms()
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    stock = transforms.convert_to_rgb(Image.open(io.BytesIO(buffer.getvalue())), return_numpy=True)
    ours = decode_image(ImageRef(data=buffer.getvalue()), LIMITS)
    assert ours.mode == "RGB"
    assert np.array_equal(ours, stock)


def test_stock_processor_sees_the_same_patches():
    stock_transforms()
    processors = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    processor = processors.Qwen2VLImageProcessorPil()
    for data in (encoded("PNG", (60, 90), "RGBA"), encoded("JPEG", (60, 90), "CMYK")):
        stock = processor(Image.open(io.BytesIO(data)), return_tensors="np")["pixel_values"]
        ours = processor(decode_image(ImageRef(data=data), LIMITS), return_tensors="np")["pixel_values"]
        assert np.array_equal(ours, stock)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "I", "F", "HSV"])
def test_encode_png_keeps_the_pixels_of_every_mode(mode):
    rgb = Image.fromarray(np.random.default_rng(RNG_SEED).integers(0, 256, (5, 6, 3), dtype=np.uint8))
    image = rgb.convert("L").convert(mode) if mode in "IF" else rgb.convert(mode)
    assert np.array_equal(decode_image(ImageRef(data=encode_png(image)), LIMITS), to_rgb(image))
