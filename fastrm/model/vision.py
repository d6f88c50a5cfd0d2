"""The vision towers of Qwen2-VL and Qwen2.5-VL, driven by the sizes of the images.

The stock forward computes windows, positions and sequence lengths from a tensor of grids and reads
them back from the device. Here they are a `VisionLayout`, made from Python integers before the pack
goes to the device, so that nothing waits for it. The weights and the modules are the stock ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fastrm.data.patches import Grid
from fastrm.model.families import has_windows
from fastrm_kernels import TreeLayout


@dataclass(frozen=True)
class VisionShape:
    """The sizes of a vision config by which patches are laid out.

    Attributes:
        merge: side of the square of patches that makes one image token.
        window: side of an attention window in image tokens; 0 if every block sees whole images.
        whole: numbers of the blocks that see whole images.
    """

    merge: int
    window: int
    whole: tuple[int, ...]

    @staticmethod
    def from_config(config) -> "VisionShape":
        """Return the shape of a stock model by its vision config."""
        merge = config.spatial_merge_size
        if not has_windows(config):
            return VisionShape(merge, 0, tuple(range(config.depth)))
        window = config.window_size // merge // config.patch_size
        return VisionShape(merge, window, tuple(config.fullatt_block_indexes))

    def lay_out(self, grids: Sequence[Grid]) -> "VisionLayout":
        """Make the `VisionLayout` of these grids."""
        return VisionLayout.build(grids, self)


@dataclass(frozen=True)
class VisionLayout:
    """The order, positions and attention of a pack's N patches.

    Attributes:
        order: (N / merge^2,) int64, image tokens in the order of the windows; None if that is their own.
        restore: (N / merge^2,) int64, the inverse of `order`.
        positions: (N, 2) float32, row and column of each patch, in that order.
        images: layout of whole images, frame by frame.
        windows: layout of the windows; None without.
    """

    order: torch.Tensor | None
    restore: torch.Tensor | None
    positions: torch.Tensor
    images: TreeLayout
    windows: TreeLayout | None

    @staticmethod
    def build(grids: Sequence[Grid], shape: VisionShape) -> "VisionLayout":
        """Make the layout on the CPU for images with these grids, one after another in the row of patches."""
        positions = np.concatenate([_positions(grid, shape.merge) for grid in grids])
        images = TreeLayout.from_lengths([rows * columns for frames, rows, columns in grids for _ in range(frames)])
        if not shape.window:
            return VisionLayout(None, None, torch.from_numpy(positions), images, None)
        orders, lengths, first = [], [], 0
        for frames, rows, columns in grids:
            order, counts = _windows(frames, rows // shape.merge, columns // shape.merge, shape.window)
            orders.append(order + first)
            lengths += [count * shape.merge**2 for count in counts]
            first += order.size
        order = np.concatenate(orders)
        positions = positions.reshape(order.size, -1, 2)[order].reshape(-1, 2)
        return VisionLayout(
            torch.from_numpy(order),
            torch.from_numpy(np.argsort(order)),
            torch.from_numpy(np.ascontiguousarray(positions)),
            images,
            TreeLayout.from_lengths(lengths),
        )

    @property
    def layouts(self) -> list[TreeLayout]:
        """All layouts that attention reads."""
        return [layout for layout in (self.images, self.windows) if layout is not None]

    def to(self, device) -> "VisionLayout":
        """Return the same layout with its tensors on `device`."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True), lambda layout: layout.to(device))

    def pin_memory(self) -> "VisionLayout":
        """Return the same layout with its tensors in page-locked memory."""
        return self._with(torch.Tensor.pin_memory, TreeLayout.pin_memory)

    def _with(self, change_tensor: Callable, change_layout: Callable) -> "VisionLayout":
        changed = {
            name: (change_tensor if isinstance(value, torch.Tensor) else change_layout)(value)
            for name, value in vars(self).items()
            if value is not None
        }
        return replace(self, **changed)


def _positions(grid: Grid, merge: int) -> np.ndarray:
    """Return row and column (patches, 2); patches of one image token stand together, tokens row by row."""
    frames, rows, columns = grid
    place = np.indices((rows, columns), dtype=np.float32)
    place = place.reshape(2, rows // merge, merge, columns // merge, merge).transpose(1, 3, 2, 4, 0)
    return np.tile(place.reshape(-1, 2), (frames, 1))


def _windows(frames: int, rows: int, columns: int, side: int) -> tuple[np.ndarray, list[int]]:
    """Return the image tokens of one image, window by window, and the number in each; edge windows are smaller."""
    tokens = np.arange(frames * rows * columns).reshape(frames, rows, columns)
    windows = [
        tokens[frame, top : top + side, left : left + side].ravel()
        for frame in range(frames)
        for top in range(0, rows, side)
        for left in range(0, columns, side)
    ]
    return np.concatenate(windows), [window.size for window in windows]


def project_patches(projection: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Apply a tower's first convolution, whose stride is its kernel: (N, channels * frames * patch^2) -> (N, D)."""
    # Autocast rounds the pixels itself; rounding them to float16 weights first would round twice.
    if not torch.is_autocast_enabled(pixel_values.device.type):
        pixel_values = pixel_values.to(projection.weight.dtype)
    return F.linear(pixel_values, projection.weight.flatten(1), projection.bias)


def rotary(visual: nn.Module, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin (N, K) float32: the first half of a head turns by row and column, the second alike."""
    angles = positions[:, :, None] * visual.rotary_pos_emb.inv_freq.float()  # (N, 2, K / 4)
    angles = angles.flatten(1).repeat(1, 2)
    return angles.cos(), angles.sin()


def reorder(rows: torch.Tensor, order: torch.Tensor | None, merge: int) -> torch.Tensor:
    """Reorder patches (N, D) into the order of the windows."""
    if order is None:
        return rows
    return rows.view(order.shape[0], merge**2, -1).index_select(0, order).view(rows.shape)
