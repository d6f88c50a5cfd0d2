"""Images as the vision tower takes them: bytes in the data workers, the stock processor's values on the device.

A worker resizes an image and cuts it into patches of bytes. Their float values, and the copies that a still
image makes of its one frame, are computed where the training step runs: an eighth of the bytes of float32
patches of two frames goes through the workers' queue and to the device. A byte of a channel has one of 256
values. They are a table, made as the stock processor computes them and then looked up, so that the result is
equal to the bit on every device, whatever its rounding of a division.

Patches are cut in the worker, not on the device. Images differ in size, so a device would launch several
kernels for each of them; cut, they are one tensor and one lookup for all. A worker spends 6 % of its
time on it, and five times as much on resizing (bench/test_input_pipeline.py).
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from fastrm.errors import ConfigError

Grid = tuple[int, int, int]  # frames, rows and columns of patches

NUM_BYTE_VALUES = 256


@dataclass(frozen=True)
class PatchFormat:
    """How one stock Qwen2-VL image processor makes patches of RGB images. Hashable and picklable.

    Attributes:
        side: of a patch, in pixels.
        merge: side of the square of patches that makes one image token.
        frames: copies of a still image that the tower sees as one patch in time.
        resample: Pillow's filter for resizing.
        scale: what bytes are multiplied by first.
        mean, std: of each channel, subtracted and divided by then.
    """

    side: int
    merge: int
    frames: int
    resample: Image.Resampling
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @staticmethod
    def of(processor) -> "PatchFormat":
        """The format of a stock image processor, PIL variant, with its settings of now.

        Raises:
            ConfigError: if it does not resize.
        """
        if not processor.do_resize or processor.resample is None:
            raise ConfigError(
                f"image processor: do_resize is {processor.do_resize} and resample is {processor.resample}, wanted "
                "true and a filter, since sides must be multiples of a patch; correct preprocessor_config.json"
            )
        normalize = processor.do_normalize
        return PatchFormat(
            side=processor.patch_size,
            merge=processor.merge_size,
            frames=processor.temporal_patch_size,
            resample=Image.Resampling(processor.resample),
            scale=processor.rescale_factor if processor.do_rescale else 1.0,
            mean=tuple(processor.image_mean) if normalize else (0.0, 0.0, 0.0),
            std=tuple(processor.image_std) if normalize else (1.0, 1.0, 1.0),
        )

    def cut(self, image: Image.Image, height: int, width: int) -> tuple[np.ndarray, Grid]:
        """Resize an RGB image to `height` x `width` image tokens and cut it.

        Returns:
            Patches (N, 3 * side^2) uint8, those of one image token together, and the image's grid.
        """
        side, merge = self.side, self.merge
        # The stock processor resizes with the same call of Pillow.
        pixels = np.asarray(image.resize((width * merge * side, height * merge * side), self.resample))
        pixels = pixels.reshape(height, merge, side, width, merge, side, -1)
        # Image tokens row by row, the rows and columns of patches in one, its channels, rows and columns of pixels.
        pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 4, 6, 2, 5))
        return pixels.reshape(height * width * merge**2, -1), (1, height * merge, width * merge)

    def normalize(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches (N, 3 * side^2) uint8 -> (N, 3 * frames * side^2) float32 on their device, equal to the stock values.

        Waits for the device once in a process, to copy the table there.
        """
        num_patches, channels = patches.shape[0], len(self.mean)
        table = _byte_values(self.scale, self.mean, self.std, patches.device)  # (channels * 256,)
        first = torch.arange(0, table.numel(), NUM_BYTE_VALUES, dtype=torch.int32, device=patches.device)
        places = patches.view(num_patches, channels, 1, self.side**2).int() + first.view(-1, 1, 1)
        values = table.index_select(0, places.flatten()).view(places.shape)
        return values.expand(-1, -1, self.frames, -1).reshape(num_patches, -1)


@functools.cache
def _byte_values(scale: float, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """(channels * 256,) float32: every byte of every channel through the stock processor's arithmetic."""
    # Its order of rounding: the product in float64, difference and quotient in float32.
    scaled = (np.arange(NUM_BYTE_VALUES, dtype=np.float64) * scale).astype(np.float32)
    values = (scaled - np.array(mean, dtype=np.float32)[:, None]) / np.array(std, dtype=np.float32)[:, None]
    return torch.from_numpy(values.ravel()).to(device)
