"""Qwen3-VL (dense): what is known of its models.

The tower is that of Qwen2-VL with learned positions besides the rotary ones, which are interpolated to each image's
grid, and without windows. States behind some of its blocks, the deepstack features, are merged like the last ones and
added to the media tokens' states behind the first decoder layers. The language model is Qwen3's with M-RoPE, whose
three axes are interleaved in each head.
Source: Qwen3-VL (arXiv 2511.21631), section 2, and transformers' class.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from fastrm.data.media.format import FormatSettings, Grid
from fastrm.data.media.qwen3_vl import Qwen3VLFormat, load_qwen3_vl_format
from fastrm.errors import ConfigError
from fastrm.model.compiled import mark_dynamic
from fastrm.model.layers import AttentionShape
from fastrm.model.text import KNOWN_TEXT, rope_parameters
from fastrm.model.vision.qwen2_vl import (
    Qwen2VLFamily,
    QwenTower,
    VisionLayout,
    VisionShape,
    check_qwen_vision,
    merger_size,
    patch_places,
    rotary,
    tower_costs,
)
from fastrm.model.vision.tower import MediaFeatures, Passes, project_patches
from fastrm_kernels import TreeLayout

# The section of a config without one, as transformers reads it.
MROPE_SECTION = (24, 20, 20)
_CORNERS = 4


@dataclass(frozen=True)
class PlacedLayout:
    """The attention and the two kinds of positions of a pack's N patches.

    Attributes:
        plain: rotary positions and attention, as of a tower without windows.
        corners: (N, 4) int64, the learned positions around each patch, by their number in the table.
        weights: (N, 4) float32, their shares.
    """

    plain: VisionLayout
    corners: torch.Tensor
    weights: torch.Tensor

    @property
    def layouts(self) -> list[TreeLayout]:
        """All layouts that attention reads."""
        return self.plain.layouts

    def to(self, device) -> "PlacedLayout":
        """Return the same layout with its tensors on `device`."""
        corners, weights = (part.to(device, non_blocking=True) for part in (self.corners, self.weights))
        return replace(self, plain=self.plain.to(device), corners=corners, weights=weights)

    def pin_memory(self) -> "PlacedLayout":
        """Return the same layout with its tensors in page-locked memory."""
        corners, weights = self.corners.pin_memory(), self.weights.pin_memory()
        return replace(self, plain=self.plain.pin_memory(), corners=corners, weights=weights)


@dataclass(frozen=True)
class PlacedShape(VisionShape):
    """The sizes of a vision config by which patches are laid out and placed.

    Attributes:
        side: of the square table of learned positions.
    """

    side: int

    @staticmethod
    def from_config(config) -> "PlacedShape":
        """Return the shape of a stock model by its vision config."""
        side = int(config.num_position_embeddings**0.5)
        return PlacedShape(config.spatial_merge_size, 0, tuple(range(config.depth)), side)

    def lay_out(self, grids: Sequence[Grid]) -> PlacedLayout:
        """Make the `PlacedLayout` of these grids."""
        corners, weights = zip(*(_corners(grid, self.merge, self.side) for grid in grids), strict=True)
        return PlacedLayout(
            VisionLayout.build(grids, self),
            torch.from_numpy(np.concatenate(corners)),
            torch.from_numpy(np.concatenate(weights)),
        )


def _corners(grid: Grid, merge: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the four learned positions around each patch, and their shares, (patches, 4) each.

    The table is stretched over the image with its corners on the image's; between its points positions are interpolated
    linearly, in float32 like stock.
    """
    _, rows, columns = grid
    places = patch_places(grid, merge)
    taps = [_taps(places[:, axis], length, side) for axis, length in enumerate((rows, columns))]
    (row, row_share), (column, column_share) = taps
    corners = row[:, :, None] * side + column[:, None, :]
    shares = row_share[:, :, None] * column_share[:, None, :]
    return corners.reshape(-1, _CORNERS), shares.reshape(-1, _CORNERS)


def _taps(places: np.ndarray, length: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the two points of the table's axis around each place of `length`, and their shares, (N, 2) each."""
    points = places.astype(np.float32) * np.float32(side - 1) / np.float32(max(length - 1, 1))
    around = np.floor(points)[:, None] + np.arange(2, dtype=np.float32)
    return np.clip(around, 0, side - 1).astype(np.int64), 1 - np.abs(points[:, None] - around)


class Qwen3VLTower(QwenTower):
    """The tower of Qwen3-VL: images of any size, learned and rotary positions, mergers behind several blocks."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        visual = model.visual
        self.projector = nn.ModuleList([visual.merger, visual.deepstack_merger_list])
        self.shape = PlacedShape.from_config(self._config)

    @staticmethod
    def heads(vision_config) -> AttentionShape:
        heads = vision_config.num_heads
        return AttentionShape(heads, heads, vision_config.hidden_size // heads)

    def features(self, pixel_values, layout: PlacedLayout, run, dtype) -> MediaFeatures:
        visual, attention = self.module, self.kernels.attention
        hidden = project_patches(visual.patch_embed.proj, pixel_values)  # (N, D of the tower)
        learned = (visual.pos_embed(layout.corners) * layout.weights[:, :, None]).sum(1)
        hidden = hidden + learned.to(hidden.dtype)
        cos, sin = rotary(visual, layout.plain.positions)
        images = attention.arguments(layout.plain.images, dtype(hidden))
        if attention.traced:
            mark_dynamic(cos, sin, images)
        taken, deep = list(self._config.deepstack_visual_indexes), []
        for number, block in enumerate(self.blocks):
            hidden = run(block, hidden, cos, sin, images, self.kernels)
            if number in taken:
                deep.append(visual.deepstack_merger_list[taken.index(number)](hidden))
        return MediaFeatures(visual.merger(hidden), tuple(deep))


class Qwen3VLFamily(Qwen2VLFamily):
    """The family of Qwen3-VL without experts; see `VisionFamily`."""

    tower = Qwen3VLTower
    file_names: ClassVar = {}
    loaded_names: ClassVar = {}

    def check(self, config) -> None:
        check_qwen_vision(config, MROPE_SECTION)
        vision, text = config.vision_config, config.get_text_config()
        # transformers interleaves the axes whatever this key says.
        if not rope_parameters(text).get("mrope_interleaved", True):
            raise ConfigError("qwen3_vl: mrope_interleaved is false, only true is supported")
        side = int(vision.num_position_embeddings**0.5)
        if side**2 != vision.num_position_embeddings:
            raise ConfigError(
                f"qwen3_vl: vision_config.num_position_embeddings is {vision.num_position_embeddings}, wanted a square"
            )
        taken = list(vision.deepstack_visual_indexes)
        if taken != sorted(set(taken)) or not all(0 <= number < vision.depth for number in taken):
            raise ConfigError(
                f"qwen3_vl: vision_config.deepstack_visual_indexes is {taken}, wanted rising numbers of its "
                f"{vision.depth} blocks"
            )

    def gated_activations(self, config) -> set[str]:
        return set()

    def load_format(self, config, tokenizer, folder: str | None, settings: FormatSettings) -> Qwen3VLFormat:
        return load_qwen3_vl_format(config.vision_config, tokenizer, folder, settings)

    def media_costs(self, config, tower: Passes, projector: Passes) -> dict[str, int]:
        vision, hidden = config.vision_config, config.get_text_config().hidden_size
        width = vision.hidden_size
        # A merger behind the last block, and one for the features that are added behind each of the first layers.
        mergers = (1 + len(vision.deepstack_visual_indexes)) * merger_size(vision, width, hidden)
        per_token, pair = tower_costs(vision, (width, 2, width * vision.intermediate_size), mergers, tower, projector)
        return {"per_media_token": per_token, "per_media_pair": vision.depth * pair}

    def keep_first_blocks(self, vision_config, count: int) -> None:
        vision_config.depth = min(count, vision_config.depth)
        kept = [number for number in vision_config.deepstack_visual_indexes if number < vision_config.depth]
        # Behind the last decoder layer features change nothing that is read at an anchor.
        vision_config.deepstack_visual_indexes = kept[: count - 1] or [0]

    def image_processor(self, tokenizer, folder: str | None, limits: Mapping[str, int]) -> None:
        return None

    def fixed_in_vllm(self, config) -> None:
        return None


QWEN3_VL = Qwen3VLFamily("qwen3_vl", "Qwen3VL", KNOWN_TEXT["qwen3"], {
    "deepstack_visual_indexes", "intermediate_size", "num_position_embeddings", "out_hidden_size",
})  # fmt: skip
