"""Images as InternVL reads them: square tiles and a thumbnail; equal to the stock processor's values to the bit.

An image is resized to a grid of 1 to `max_patches` tiles whose shape is nearest to its own, and cut into
them row by row. If there are several, the whole image follows as one more tile, the thumbnail. Each tile
is a plane of patches that the tower sees by itself. The rule for the grid is the stock processor's
own function, which calls tiles "patches"; here a patch is the square of 14 pixels that the tower embeds.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from fastrm.data.media.format import MediaSize, MediaSpan, Patches, PatchFormat, VisionFormat
from fastrm.data.media.images import decode_image, image_size, media_error
from fastrm.data.media.processor_files import ProcessorSettings, image_settings
from fastrm.data.record import ImageRef, MediaRef
from fastrm.data.tokenizer import special_id
from fastrm.errors import ConfigError
from fastrm.limits import MediaLimits

# The normalisation in the published checkpoints' preprocessor_config.json.
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class InternVLFormat(VisionFormat):
    """The format of InternVL: tiles of one size, their tokens between <img> and </img>; it reads no videos.

    Args:
        processor: a stock GotOcr2 image processor, PIL variant. It cuts tiles whatever its own
            `crop_to_patches` says, as the stock InternVL processor has it do.
        image_token: id of <IMG_CONTEXT>.
        opening, closing: ids of <img> and </img>.
        patch: side of a patch in pixels.
        merge: side of the square of patches that makes one image token.

    Attributes:
        side: of a tile in pixels.

    Raises:
        ConfigError: for a processor that does not resize to square tiles of whole image tokens.
    """

    stock_options: ClassVar = {"crop_to_patches": True}

    def __init__(self, processor, image_token: int, opening: int, closing: int, patch: int, merge: int):
        side = processor.size["height"]
        if not processor.do_resize or processor.resample not in tuple(Image.Resampling):
            raise ConfigError(
                f"image processor: do_resize is {processor.do_resize} and resample is {processor.resample!r}, wanted "
                "true and a filter, since all tiles have one size; correct preprocessor_config.json"
            )
        if processor.size["width"] != side or side % (patch * merge):
            raise ConfigError(
                f"image processor: size is {side} x {processor.size['width']}, wanted squares of a multiple of "
                f"{patch * merge} pixels; correct preprocessor_config.json"
            )
        processor.crop_to_patches = True
        self.processor = processor
        self.placeholders = {ImageRef: image_token}
        self.opening, self.closing = (opening,), (closing,)
        self._patch, self._merge = patch, merge
        self.side = side

    @property
    def patch_format(self) -> PatchFormat:
        processor = self.processor
        return PatchFormat(
            side=self._patch,
            merge=self._merge,
            frames=1,
            scale=processor.rescale_factor if processor.do_rescale else 1.0,
            mean=tuple(processor.image_mean) if processor.do_normalize else (0.0, 0.0, 0.0),
            std=tuple(processor.image_std) if processor.do_normalize else (1.0, 1.0, 1.0),
        )

    def part(self, ref: MediaRef) -> dict:
        return {"type": "image"}

    def measure(self, ref: MediaRef, limits: MediaLimits) -> MediaSize:
        return self._size(*image_size(ref, limits))

    def cut(self, ref: MediaRef, size: MediaSize, limits: MediaLimits) -> Patches:
        image = decode_image(ref, limits)
        if self._size(*image.size) != size:
            # The conversation was tokenised for the size that the file had when it was measured.
            raise media_error(ref, "CHANGED", "has another size than when it was first read")
        return Patches(*self.patch_format.cut(self._tiles(image)))

    def positions(self, num_tokens: int, spans: Sequence[MediaSpan]) -> None:
        return None

    def save(self, folder: Path) -> None:
        self.processor.save_pretrained(folder)

    def _size(self, width: int, height: int) -> MediaSize:
        columns, rows = self._canvas(width, height)
        num_tiles = columns * rows
        tokens = self.side // (self._patch * self._merge)
        return MediaSize(num_tiles + (num_tiles > 1), tokens, tokens)

    def _canvas(self, width: int, height: int) -> tuple[int, int]:
        """Return the columns and rows of tiles for an image of this many pixels."""
        processor = self.processor
        if processor.max_patches == 1:
            return 1, 1
        # The rule of the stock processor itself, from the module that its class comes from.
        stock = sys.modules[type(processor).__module__]
        return stock.get_optimal_tiled_canvas(
            (height, width), (self.side, self.side), processor.min_patches, processor.max_patches
        )

    def _tiles(self, image: Image.Image) -> np.ndarray:
        """Return tiles (tiles, side, side, 3) uint8, row by row, then the thumbnail if there are several."""
        side, (columns, rows) = self.side, self._canvas(*image.size)
        # The stock processor resizes with the same calls of Pillow.
        resample = Image.Resampling(self.processor.resample)
        canvas = np.asarray(image.resize((columns * side, rows * side), resample))
        tiles = canvas.reshape(rows, side, columns, side, -1).swapaxes(1, 2).reshape(rows * columns, side, side, -1)
        if len(tiles) == 1:
            return tiles
        thumbnail = np.asarray(image.resize((side, side), resample))
        return np.concatenate((tiles, thumbnail[None]))


def load_internvl_format(
    config, tokenizer, folder: str | None, *, max_tiles: int | None = None,
    image_mean: list[float] | None = None, image_std: list[float] | None = None,
) -> InternVLFormat:  # fmt: skip
    """Load the format of a model folder, or of a config alone; an argument that is not None replaces its setting.

    As for Qwen, the PIL variant of the stock image processor is used on every machine. Without a folder the
    normalisation is that of the published checkpoints.

    Args:
        config: of a stock InternVL model.
        folder: where preprocessor_config.json is, a folder or a hub id; None: the published settings.
        max_tiles: of an image, the thumbnail not counted.

    Raises:
        ConfigError: if the tokenizer has not all of <IMG_CONTEXT>, <img> and </img>, if the processor's settings
            are missing or its class refuses them, or its tiles are not those of the model.
    """
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    side = config.vision_config.image_size[0]
    if folder is not None:
        processor = _tile_processor(image_settings(folder), GotOcr2ImageProcessorPil)
    else:
        processor = GotOcr2ImageProcessorPil(
            size={"height": side, "width": side}, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD
        )
    processor.max_patches = max_tiles or processor.max_patches
    processor.image_mean = image_mean or processor.image_mean
    processor.image_std = image_std or processor.image_std
    ids = {token: special_id(tokenizer, token) for token in ("<IMG_CONTEXT>", "<img>", "</img>")}
    for token, number in ids.items():
        if number is None:
            raise ConfigError(f"the tokenizer has no special token {token}; wanted that of the model's family")
    merge = int(1 / config.downsample_ratio)
    form = InternVLFormat(processor, *ids.values(), config.vision_config.patch_size[0], merge)
    if form.side != side:
        raise ConfigError(
            f"image processor: tiles of {form.side} pixels, the model has positions for {side}; correct size in "
            "preprocessor_config.json"
        )
    return form


def _tile_processor(settings: ProcessorSettings, kind: type):
    processor = settings.make(kind)
    if not all(isinstance(processor.size.get(side), int) for side in ("height", "width")):
        raise settings.refuse("size", f"is {settings.values.get('size')}, wanted the height and width of a tile")
    return processor
