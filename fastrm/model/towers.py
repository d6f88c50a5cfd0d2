"""The vision tower of each family: from the patches of a pack to the features of its image tokens.

A tower knows its stock modules, the shape from which the layout of a pack's images is made (in a data worker), the
function that evaluates one of its blocks (layers.py), and what to do before and after the blocks. How
blocks run (compiled, recomputed in the backward pass) is decided by the runner, which passes `run`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import nn

from fastrm.data.patches import Grid, PatchFormat
from fastrm.data_config import DataConfig
from fastrm.model.attention import Attention, AttentionShape
from fastrm.model.compiled import mark_dynamic
from fastrm.model.families import QWEN_VL_FAMILIES, VISION_FAMILIES
from fastrm.model.layers import LayerKernels, rotation, tile_block, vision_block
from fastrm.model.vision import VisionLayout, VisionShape, project_patches, reorder, rotary
from fastrm.model.vision_tiles import TileLayout, TileShape

# (stock block, states, further arguments of the tower's block function) -> states
Run = Callable[..., torch.Tensor]


class VisionTower(ABC):
    """The vision side of one stock model. It holds no weights of its own.

    Attributes:
        module: the stock tower.
        projector: the stock module that makes image tokens of its states; inside the tower for Qwen.
        embedding: the stock module that multiplies pixels.
        blocks: the stock blocks, in order.
        shape: makes the layout of a pack's images from their grids: `shape.lay_out(grids)`.
        block: evaluates one block.
        kernels: how blocks compute; set by `set_kernels`.
    """

    module: nn.Module
    projector: nn.Module
    embedding: nn.Module
    blocks: nn.ModuleList
    shape: VisionShape | TileShape
    block: Callable
    kernels: LayerKernels

    def set_kernels(self, impl: str, traced: bool, norm: Callable, gate: Callable) -> None:
        """Set the implementation of attention, RMSNorm and SwiGLU of all blocks; `traced` as of `Attention`."""
        attention = Attention(impl, AttentionShape.of_vision(self.module.config), False, traced)
        self.kernels = LayerKernels(attention, self._rotation(), norm, gate)

    def parameters(self) -> set[nn.Parameter]:
        """Return the parameters of tower and projector."""
        return {*self.module.parameters(), *self.projector.parameters()}

    @abstractmethod
    def features(self, pixel_values: torch.Tensor, layout, run: Run, dtype: Callable) -> torch.Tensor:
        """Return features (image tokens, D) of all images of a pack, each encoded once.

        Args:
            pixel_values: (N, values of a patch) float.
            layout: of the images, on the same device.
            run: evaluates one block.
            dtype: (states) -> dtype in which their matrix products come out.
        """

    @property
    @abstractmethod
    def blank(self) -> tuple[Grid, int]:
        """The grid of the smallest image, and the values of a patch."""

    @property
    @abstractmethod
    def plain_patches(self) -> PatchFormat:
        """The format of a still image's patches, with values as they are."""

    @abstractmethod
    def largest_image(self, data: DataConfig) -> tuple[int, str]:
        """Return the tokens of the largest image that the data may hold, and the key that bounds it."""

    @abstractmethod
    def num_rows(self, num_tokens: int) -> int:
        """Return the rows that go through the blocks for an image of so many tokens."""

    @abstractmethod
    def num_attention_pairs(self, num_tokens: int) -> int:
        """Return the query-key pairs of such an image over all blocks; windows at its edge count as full ones."""

    @abstractmethod
    def grid_of(self, num_tokens: int) -> Grid:
        """Return the grid of an image of at most so many tokens, or of the smallest one."""

    def _rotation(self) -> Callable | None:
        return None


class QwenTower(VisionTower):
    """The tower of Qwen2-VL and Qwen2.5-VL: images of any size, windows, rotary positions, a merger at its end."""

    block = staticmethod(vision_block)

    def __init__(self, model: nn.Module):
        self.module, self.projector = model.visual, model.visual.merger
        self.embedding, self.blocks = model.visual.patch_embed, model.visual.blocks
        self._config = model.config.vision_config
        self.shape = VisionShape.from_config(self._config)

    def features(self, pixel_values, layout: VisionLayout, run, dtype) -> torch.Tensor:
        visual = self.module
        # Reordered before the embedding: a compiled block that gets a view is traced once more.
        pixel_values = reorder(pixel_values, layout.order, self.shape.merge)
        hidden = project_patches(visual.patch_embed.proj, pixel_values)  # (N, D of the tower)
        cos, sin = rotary(visual, layout.positions)
        attention, product = self.kernels.attention, dtype(hidden)
        whole = attention.arguments(layout.images, product)
        windows = None if layout.windows is None else attention.arguments(layout.windows, product)
        if attention.traced:
            mark_dynamic(cos, sin, whole, windows)
        for number, block in enumerate(self.blocks):
            arguments = whole if number in self.shape.whole else windows
            hidden = run(block, hidden, cos, sin, arguments, self.kernels)
        features = self.projector(hidden)
        return features if layout.restore is None else features.index_select(0, layout.restore)

    @property
    def blank(self) -> tuple[Grid, int]:
        vision = self._config
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return (1, vision.spatial_merge_size, vision.spatial_merge_size), values

    @property
    def plain_patches(self) -> PatchFormat:
        vision = self._config
        return _plain(vision.patch_size, self.shape.merge, vision.temporal_patch_size, vision.in_channels)

    def largest_image(self, data: DataConfig) -> tuple[int, str]:
        return data.max_pixels // (self._config.patch_size * self.shape.merge) ** 2, "data.max_pixels"

    def num_rows(self, num_tokens: int) -> int:
        return num_tokens * self.shape.merge**2

    def num_attention_pairs(self, num_tokens: int) -> int:
        rows, whole = self.num_rows(num_tokens), len(self.shape.whole)
        window = min(rows, (self.shape.window * self.shape.merge) ** 2)
        return rows * (whole * rows + (len(self.blocks) - whole) * window)

    def grid_of(self, num_tokens: int) -> Grid:
        # With all the tokens if some sides at most twice as long as the other have them; else as square as may be.
        square = max(1, math.isqrt(num_tokens))
        even = (rows for rows in range(square, 0, -1) if num_tokens % rows == 0 and num_tokens <= 2 * rows**2)
        rows = next(even, square)
        return 1, rows * self.shape.merge, max(1, num_tokens // rows) * self.shape.merge

    def _rotation(self) -> Callable:
        return rotation(self.module.blocks[0].attn)


class InternTower(VisionTower):
    """The tower of InternVL: square tiles with a class token and absolute positions; its projector stands outside."""

    block = staticmethod(tile_block)

    def __init__(self, model: nn.Module):
        self.module, self.projector = model.vision_tower, model.multi_modal_projector
        self.embedding, self.blocks = self.module.embeddings.patch_embeddings, self.module.encoder.layer
        self._config = model.config.vision_config
        self.shape = TileShape.from_config(model.config)

    def features(self, pixel_values, layout: TileLayout, run, dtype) -> torch.Tensor:
        num_patches, merge = layout.order.shape[0], self.shape.merge
        hidden = self._embed(pixel_values, layout.order)  # (tiles * (P + 1), D of the tower)
        tiles = self.kernels.attention.arguments(layout.tiles, dtype(hidden))
        if self.kernels.attention.traced:
            mark_dynamic(tiles)
        for block in self.blocks:
            hidden = run(block, hidden, tiles, self.kernels)
        hidden = self.module.layernorm(hidden)
        patches = hidden.unflatten(0, (-1, num_patches + 1))[:, 1:]  # without the class token
        # Pixel shuffle: the patches of a token stand together, row by row.
        return self.projector(patches.reshape(-1, merge**2 * hidden.shape[-1]))

    def _embed(self, pixel_values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """Return class token and patches of all tiles with their positions, (tiles * (P + 1), D)."""
        stock = self.module.embeddings
        projection, positions = stock.patch_embeddings.projection, stock.position_embeddings
        patches = project_patches(projection, pixel_values)
        patches = patches.unflatten(0, (-1, order.shape[0]))  # (tiles, P, D)
        hidden = torch.cat((stock.cls_token.expand(patches.shape[0], -1, -1), patches), dim=1)
        if positions is not None:
            hidden = hidden + torch.cat((positions[:, :1], positions[:, 1:].index_select(1, order)), dim=1)
        # A compiled block that gets a view is traced once more.
        return hidden.flatten(0, 1).clone()

    @property
    def blank(self) -> tuple[Grid, int]:
        vision, side = self._config, self.shape.side
        return (1, side, side), vision.num_channels * vision.patch_size[0] * vision.patch_size[1]

    @property
    def plain_patches(self) -> PatchFormat:
        return _plain(self._config.patch_size[0], self.shape.merge, 1, self._config.num_channels)

    def largest_image(self, data: DataConfig) -> tuple[int, str]:
        tiles = data.max_tiles + (data.max_tiles > 1)  # with the thumbnail
        return tiles * self._tile_tokens, "data.max_tiles"

    def num_rows(self, num_tokens: int) -> int:
        patches = num_tokens * self.shape.merge**2
        return patches + patches // self.shape.side**2  # with a class token for each tile

    def num_attention_pairs(self, num_tokens: int) -> int:
        return len(self.blocks) * self.num_rows(num_tokens) * (self.shape.side**2 + 1)

    def grid_of(self, num_tokens: int) -> Grid:
        return max(1, num_tokens // self._tile_tokens), self.shape.side, self.shape.side

    @property
    def _tile_tokens(self) -> int:
        return (self.shape.side // self.shape.merge) ** 2


def _plain(side: int, merge: int, frames: int, channels: int) -> PatchFormat:
    return PatchFormat(side, merge, frames, 1.0, (0.0,) * channels, (1.0,) * channels)


TOWERS: dict[str, Callable[[nn.Module], VisionTower]] = {  # of every family of VISION_FAMILIES
    **dict.fromkeys(QWEN_VL_FAMILIES, QwenTower), "internvl": InternTower,
}  # fmt: skip


def make_tower(model: nn.Module) -> VisionTower | None:
    """Make the tower of a stock base model; None for a text model."""
    family = model.config.model_type
    return TOWERS[family](model) if family in VISION_FAMILIES else None
