"""The layout of square tiles' patches in InternVL's vision tower, from the number of tiles alone.

Every tile has the same grid of patches and is a sequence of its own: a class token, then its patches.
The tower takes patches in the order of the data side, those of one image token together; absolute
position embeddings say where each is, and the order in the sequence means nothing to its attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fastrm.data.patches import Grid
from fastrm_kernels import TreeLayout


@dataclass(frozen=True)
class TileLayout:
    """The order and attention of a pack's tiles of P patches each.

    Attributes:
        order: (P,) int64, number of each patch of a tile in rows and columns, in the order of the row of patches.
        tiles: layout of sequences of P + 1 tokens, one for each tile.
    """

    order: torch.Tensor
    tiles: TreeLayout

    @property
    def layouts(self) -> list[TreeLayout]:
        """All layouts that attention reads."""
        return [self.tiles]

    def to(self, device) -> "TileLayout":
        """Return the same layout with its tensors on `device`."""
        return replace(self, order=self.order.to(device, non_blocking=True), tiles=self.tiles.to(device))

    def pin_memory(self) -> "TileLayout":
        """Return the same layout with its tensors in page-locked memory."""
        return replace(self, order=self.order.pin_memory(), tiles=self.tiles.pin_memory())


@dataclass(frozen=True)
class TileShape:
    """The sizes of an InternVL config by which patches are laid out.

    Attributes:
        side: of a tile, in patches.
        merge: side of the square of patches that makes one image token.
    """

    side: int
    merge: int

    @staticmethod
    def from_config(config) -> "TileShape":
        """Return the shape of a stock InternVL model by its config."""
        vision = config.vision_config
        return TileShape(vision.image_size[0] // vision.patch_size[0], int(1 / config.downsample_ratio))

    def lay_out(self, grids: Sequence[Grid]) -> TileLayout:
        """Make the layout on the CPU for images with these grids, each of as many tiles as it has frames.

        Raises:
            ValueError: for a grid that is not one of whole tiles.
        """
        for _, rows, columns in grids:
            if (rows, columns) != (self.side, self.side):
                raise ValueError(
                    f"grid of {rows} x {columns} patches: the model reads tiles of {self.side} x {self.side}"
                )
        blocks = self.side // self.merge
        order = np.arange(self.side**2).reshape(blocks, self.merge, blocks, self.merge).transpose(0, 2, 1, 3)
        num_tiles = sum(frames for frames, _, _ in grids)
        return TileLayout(
            torch.from_numpy(order.reshape(-1).copy()), TreeLayout.from_lengths([self.side**2 + 1] * num_tiles)
        )
