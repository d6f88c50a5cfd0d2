"""Patches for the vision tower: bytes in the data workers, the stock processor's float values on the device.

A worker resizes an image and cuts it into patches of bytes. Their float values, and the copies that a still
image makes of its one frame, are computed where the training step runs: an eighth of the bytes of float32
patches of two frames goes through the workers' queue and to the device (a quarter for a video, whose patches
hold two frames of their own). A byte of a channel has one of 256 values. They are a table, made as the stock
processor computes them and then looked up, so that the result is equal to the bit on every device, whatever
its rounding of a division.

Patches are cut in the worker, not on the device. Images differ in size, so a device would launch several
kernels for each of them; cut, they are one tensor and one lookup for all. A worker spends 6 % of its
time on it, and five times as much on resizing (bench/test_input_pipeline.py).
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch

Grid = tuple[int, int, int]  # frames, rows and columns of patches

NUM_BYTE_VALUES = 256


@dataclass(frozen=True)
class PatchFormat:
    """The way in which a model family cuts patches of RGB pixels and normalises them. Hashable and picklable.

    Attributes:
        side: of a patch, in pixels.
        merge: side of the square of patches that makes one image token.
        frames: of a video that the tower sees as one patch in time; a still image is as many copies of itself.
        scale: what bytes are multiplied by first.
        mean, std: of each channel, subtracted and divided by then.
    """

    side: int
    merge: int
    frames: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @staticmethod
    def from_processor(processor) -> "PatchFormat":
        """Return the format of a stock Qwen2-VL image processor with its present settings."""
        normalize = processor.do_normalize
        return PatchFormat(
            side=processor.patch_size,
            merge=processor.merge_size,
            frames=processor.temporal_patch_size,
            scale=processor.rescale_factor if processor.do_rescale else 1.0,
            mean=tuple(processor.image_mean) if normalize else (0.0, 0.0, 0.0),
            std=tuple(processor.image_std) if normalize else (1.0, 1.0, 1.0),
        )

    def cut(self, pixels: np.ndarray, stored: int = 1) -> tuple[np.ndarray, Grid]:
        """Cut resized frames.

        Args:
            pixels: (planes * stored, height, width, 3) uint8, sides multiples of `merge * side`.
            stored: frames of a plane that are kept: 1 for a still image, `frames` for a video.

        Returns:
            Patches (N, 3 * stored * side^2) uint8, plane by plane, those of one token together, and their grid.
        """
        side, merge = self.side, self.merge
        height, width = pixels.shape[1] // (merge * side), pixels.shape[2] // (merge * side)
        planes = pixels.reshape(-1, stored, height, merge, side, width, merge, side, pixels.shape[-1])
        # Axes: planes, rows and columns of tokens, rows and columns of patches in one, channels, frames, rows, columns.
        patches = np.ascontiguousarray(planes.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7))
        grid = len(planes), height * merge, width * merge
        return patches.reshape(grid[0] * grid[1] * grid[2], -1), grid

    def normalize(self, patches: torch.Tensor) -> torch.Tensor:
        """Convert patches (N, 3 * stored * side^2) uint8 to the stock values (N, 3 * frames * side^2) float32.

        The values are equal to the stock processor's to the bit. The first call in a process waits for the patches'
        device, to copy the table there.
        """
        num_patches, channels, area = patches.shape[0], len(self.mean), self.side**2
        stored = patches.shape[1] // (channels * area)
        table = _byte_values(self, stored > 1, patches.device)  # (channels * 256,)
        first = torch.arange(0, table.numel(), NUM_BYTE_VALUES, dtype=torch.int32, device=patches.device)
        places = patches.view(num_patches, channels, stored, area).int() + first.view(-1, 1, 1)
        values = table.index_select(0, places.flatten()).view(places.shape)
        if stored < self.frames:
            values = values.expand(-1, -1, self.frames, -1)
        return values.reshape(num_patches, -1)


@functools.cache
def _byte_values(form: PatchFormat, of_video: bool, device: torch.device) -> torch.Tensor:
    """Return the values (channels * 256,) float32 of every byte of every channel by a stock processor's arithmetic.

    The image processor multiplies in float64, then subtracts and divides in float32. The video processor
    divides mean and deviation by the scale first, all in float32.
    """
    mean, std = np.array(form.mean, dtype=np.float32)[:, None], np.array(form.std, dtype=np.float32)[:, None]
    values = np.arange(NUM_BYTE_VALUES)
    if of_video:
        factor = np.float32(1.0 / form.scale)
        values = (values.astype(np.float32) - mean * factor) / (std * factor)
    else:
        values = ((values.astype(np.float64) * form.scale).astype(np.float32) - mean) / std
    return torch.from_numpy(values.ravel()).to(device)
