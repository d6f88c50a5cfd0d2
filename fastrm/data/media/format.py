"""The interface between media and tokens: a model family's treatment of an image or a video, and of its patches.

    ref --measure--> MediaSize     counting: headers alone, nothing is decoded
    ref --cut------> Patches       a pack: decoded, resized, bytes for the vision tower
    part, placeholders, runs       what stands for it in the conversation
    positions        where its tokens are for the rotary embedding

One object of one family does all of it, so that template, packing and loader know no family.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

from fastrm.data.media.videos import VideoSettings
from fastrm.data.record import MediaRef
from fastrm.limits import MediaLimits

Grid = tuple[int, int, int]  # frames, rows and columns of patches

NUM_BYTE_VALUES = 256


class MediaSize(NamedTuple):
    """The tokens of an image or a video: `frames` planes of `height` x `width`.

    Attributes:
        frames: 1 for a still image; for a video its patches in time; for an image cut into tiles, the tiles.
            The blocks of a vision tower see each plane by itself.
        height, width: of one plane, in merged patches, which are tokens.
        seconds: from one plane of a video to the next; 0 for an image.
        times: of a video's planes in seconds, where the conversation says them; empty otherwise.
    """

    frames: int
    height: int
    width: int
    seconds: float = 0.0
    times: tuple[float, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.frames * self.height * self.width


@dataclass(frozen=True)
class MediaSpan:
    """A run of tokens of one image or video in a conversation: [start, start + num_tokens).

    Attributes:
        size: of the whole medium.
        planes: the numbers of the planes whose tokens these are; None: all of the medium.
    """

    start: int
    size: MediaSize
    ref: MediaRef
    planes: range | None = None

    @property
    def num_planes(self) -> int:
        return self.size.frames if self.planes is None else len(self.planes)

    @property
    def first_token(self) -> int:
        """The number of the first of these tokens among all of the medium."""
        return 0 if self.planes is None else self.planes.start * self.size.height * self.size.width

    @property
    def num_tokens(self) -> int:
        return self.num_planes * self.size.height * self.size.width

    @property
    def stop(self) -> int:
        return self.start + self.num_tokens


class MediaRun(NamedTuple):
    """A run of a medium's planes in a conversation, and what is written around it.

    Attributes:
        text: in front of it; no special tokens.
        opening, closing: ids of special tokens, behind the text and behind the run.
        planes: the numbers of its planes; None: all of the medium.
    """

    text: str = ""
    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()
    planes: range | None = None


@dataclass(frozen=True)
class PatchFormat:
    """The way in which a model family cuts patches of RGB pixels and normalises them. Hashable and picklable.

    A data worker resizes an image and cuts it into patches of bytes. Their float values, and the copies that a still
    image makes of its one frame, are computed where the training step runs: an eighth of the bytes of float32 patches
    of two frames goes through the workers' queue and to the device (a quarter for a video, whose patches hold two
    frames of their own). A byte of a channel has one of 256 values. They are a table, made as the stock processor
    computes them and then looked up, so that the result is equal to the bit on every device, whatever its rounding of
    a division.

    Patches are cut in the worker, not on the device. Images differ in size, so a device would launch several kernels
    for each of them; cut, they are one tensor and one lookup for all. A worker spends 6 % of its time on it, and five
    times as much on resizing (bench/data/test_input_pipeline.py).

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


class Patches(NamedTuple):
    """A decoded image or video: `values` as `PatchFormat.cut` makes them, and the grid they lie in."""

    values: np.ndarray
    grid: Grid


@dataclass(frozen=True)
class FormatSettings:
    """The settings of media that a configuration or a caller gives; None keeps that of the model's files.

    A family does not look at those that mean nothing to it.

    Attributes:
        min_pixels, max_pixels: of an image, where images keep their shape.
        max_tiles: of an image that is cut into tiles, the thumbnail not counted.
        image_mean, image_std: of each channel.
        video: how videos are sampled and resized.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    max_tiles: int | None = None
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    video: VideoSettings | None = None


class VisionFormat(ABC):
    """A model family's way to read images and videos. Picklable: it goes to the data workers.

    A family's format promises:

    - `measure` reads headers (for a video, its container's; for a folder of frames, its listing) and is a pure
      function of the file; the grid that `cut` returns is (frames, merge * height, merge * width) of it.
    - `cut` returns patches (N, channels * stored frames * side^2) uint8: planes one after another, in each the
      image tokens row by row, the merge^2 patches of one image token together. Token k of the medium is the
      vision tower's k-th merged feature; its tokens follow one another in one run, or in those of `runs`.
    - `cut` raises IMAGE_CHANGED or VIDEO_CHANGED if the file has become another since it was measured.

    Attributes:
        placeholders: id of the special token that the chat template writes once for a medium of this kind, and
            that then stands once for every token of it. A kind that is missing is refused by name.
        opening, closing: special tokens that are put around a medium's tokens, where the template does not.
        processor: the stock image processor.
        stock_options: with which the stock processor of the whole model calls it.
    """

    placeholders: Mapping[type[MediaRef], int]
    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()
    processor: Any
    stock_options: Mapping[str, Any] = MappingProxyType({})

    @property
    @abstractmethod
    def patch_format(self) -> PatchFormat:
        """The layout of patches and their normalisation, with the processor's present settings."""

    @abstractmethod
    def part(self, ref: MediaRef) -> dict:
        """Return the entry of the chat template's content list for a medium."""

    @abstractmethod
    def measure(self, ref: MediaRef, limits: MediaLimits) -> MediaSize:
        """Return the tokens of a medium.

        Raises:
            RecordError: the codes of `images.image_size` and `videos.open_video`, and IMAGE_ASPECT or
                VIDEO_ASPECT for a shape that the family refuses.
        """

    @abstractmethod
    def cut(self, ref: MediaRef, size: MediaSize, limits: MediaLimits) -> Patches:
        """Decode a medium that was measured as `size`.

        Raises:
            RecordError: the codes of `measure`, and of decoding; IMAGE_CHANGED or VIDEO_CHANGED.
        """

    def runs(self, ref: MediaRef, size: MediaSize) -> Sequence[MediaRun]:
        """Return the runs of tokens in whose place the chat template writes the medium's placeholder."""
        return (MediaRun("", self.opening, self.closing),)

    @abstractmethod
    def positions(self, num_tokens: int, spans: Sequence[MediaSpan]) -> np.ndarray | None:
        """Return positions (3, num_tokens) int64 of a conversation with media; None: numbered from 0 on all axes."""

    @property
    def stock_reads_videos_alike(self) -> bool:
        """True if this transformers gives a video's tokens the positions that they have here."""
        return True

    def stock_times(self, spans: Sequence[MediaSpan]) -> dict[str, torch.Tensor]:
        """Return the stock model's arguments for the times of videos, besides their patches and grids."""
        return {}

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the stock processors' files, from which the format can be loaded again."""
