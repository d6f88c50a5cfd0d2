"""Qwen2-VL and Qwen2.5-VL: what is known of their models.

The stock forward pass computes windows, positions and sequence lengths from a tensor of grids and reads
them back from the device. Here they are a `VisionLayout`, made from Python integers before the pack
goes to the device, so that nothing waits for it. The weights and the modules are the stock ones.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from fastrm.data.media.format import FormatSettings, Grid, PatchFormat
from fastrm.data.media.qwen2_vl import QwenFormat, load_qwen_format
from fastrm.data_config import DataConfig
from fastrm.errors import ConfigError
from fastrm.model.compiled import mark_dynamic
from fastrm.model.layers import AttentionShape, LayerKernels, apply_mlp, apply_norm, rotation
from fastrm.model.text import TEXT_KEYS, check_activation, rope_parameters
from fastrm.model.vision.tower import MediaFeatures, Passes, VisionTower, plain_patches, project_patches
from fastrm_kernels import TreeLayout

# The section of a config without one, as transformers reads it.
MROPE_SECTION = (16, 24, 24)


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
        if not _has_windows(config):
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
        positions = np.concatenate([patch_places(grid, shape.merge) for grid in grids])
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


def patch_places(grid: Grid, merge: int) -> np.ndarray:
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


def qwen_block(block: nn.Module, hidden, cos, sin, arguments, kernels: LayerKernels) -> torch.Tensor:
    """Run a block of the tower of a Qwen-VL model: (N, D) -> (N, D)."""
    attention = block.attn
    states = attention.qkv(apply_norm(block.norm1, hidden, kernels))
    query, key, value = states.view(states.shape[0], 3, attention.num_heads, -1).unbind(1)
    query, key = kernels.rotate(query, key, cos, sin)
    mixed = kernels.attention.attend(query, key, value, arguments, attention.scaling)
    hidden = hidden + attention.proj(mixed.flatten(1))
    return hidden + apply_mlp(block.mlp, apply_norm(block.norm2, hidden, kernels), kernels)


class QwenTower(VisionTower):
    """The tower of Qwen2-VL and Qwen2.5-VL: images of any size, windows, rotary positions, a merger at its end."""

    block = staticmethod(qwen_block)

    def __init__(self, model: nn.Module):
        self.module, self.projector = model.visual, model.visual.merger
        self.embedding, self.blocks = model.visual.patch_embed, model.visual.blocks
        self._config = model.config.vision_config
        self.shape = VisionShape.from_config(self._config)

    @staticmethod
    def heads(vision_config) -> AttentionShape:
        # Qwen2-VL's hidden_size is the width of the tower's output, its own width is embed_dim.
        width = getattr(vision_config, "embed_dim", vision_config.hidden_size)
        return AttentionShape(vision_config.num_heads, vision_config.num_heads, width // vision_config.num_heads)

    def features(self, pixel_values, layout: VisionLayout, run, dtype) -> MediaFeatures:
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
        return MediaFeatures(features if layout.restore is None else features.index_select(0, layout.restore))

    @property
    def blank(self) -> tuple[Grid, int]:
        vision = self._config
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return (1, vision.spatial_merge_size, vision.spatial_merge_size), values

    @property
    def plain_patches(self) -> PatchFormat:
        vision = self._config
        return plain_patches(vision.patch_size, self.shape.merge, vision.temporal_patch_size, vision.in_channels)

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


def check_qwen_vision(config, default_section: Sequence[int]) -> None:
    """Refuse patches, rotary embeddings and activations of a Qwen-VL model that are read otherwise here.

    Args:
        default_section: the mrope_section of a config without one, as transformers reads it.

    Raises:
        ConfigError: naming the key and its value.
    """
    vision = config.vision_config
    if vision.in_channels != 3:
        raise ConfigError(
            f"{config.model_type}: vision_config.in_channels is {vision.in_channels}, only 3 is supported: images are "
            "read as red, green and blue"
        )
    for name in ("patch_size", "temporal_patch_size"):
        if not isinstance(getattr(vision, name), int):
            raise ConfigError(
                f"{config.model_type}: vision_config.{name} is {getattr(vision, name)!r}, only one number is supported"
            )
    rope_type = rope_parameters(vision).get("rope_type", "axial")
    if rope_type != "axial":
        raise ConfigError(f"{config.model_type}: vision_config's rope_type is {rope_type!r}, only 'axial' is supported")
    check_activation(config.model_type, "vision_config.hidden_act", vision.hidden_act)
    text = config.get_text_config()
    section = rope_parameters(text).get("mrope_section", default_section)
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads > 0 else 0)
    if head_dim > 0 and 2 * sum(section) != head_dim:  # transformers refuses other sizes
        raise ConfigError(
            f"{config.model_type}: mrope_section of rope_parameters is {list(section)}, for heads of "
            f"{2 * sum(section)}; heads have {head_dim}: add the section that the model was trained with"
        )


def _media_costs(config, tower: Passes, projector: Passes) -> dict[str, int]:
    vision, hidden = config.vision_config, config.get_text_config().hidden_size
    windows = _has_windows(vision)
    # Qwen2-VL calls the tower's width embed_dim, and has an MLP of two matrices instead of three.
    width = vision.hidden_size if windows else vision.embed_dim
    product = width * (vision.intermediate_size if windows else int(width * vision.mlp_ratio))
    sizes = width, (3 if windows else 2), product
    per_token, pair = tower_costs(vision, sizes, merger_size(vision, width, hidden), tower, projector)
    full_blocks = len(vision.fullatt_block_indexes) if windows else vision.depth
    return {
        "per_media_token": per_token,
        "per_media_pair": full_blocks * pair,
        "per_window_pair": (vision.depth - full_blocks) * pair,
        "window": vision.window_size // vision.spatial_merge_size // vision.patch_size if windows else 0,
    }


def merger_size(vision, width: int, hidden: int) -> int:
    """Return the parameters of a merger's matrices, from a tower of `width` to a language model of `hidden`."""
    merged = vision.spatial_merge_size**2 * width
    return merged * (merged + hidden)


def tower_costs(
    vision, sizes: tuple[int, int, int], mergers: int, tower: Passes, projector: Passes
) -> tuple[int, int]:
    """Return FLOPs of a Qwen-VL tower for an image token, and those of a pair of image tokens in one block.

    Args:
        vision: the vision config.
        sizes: the tower's width, the number of its MLP's matrices, and the parameters of each.
        mergers: the parameters of all matrices of the projector.
    """
    width, matrices, product = sizes
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * width
    # Pixels need no gradient, and only blocks are repeated.
    embed = Passes(tower.trained, reached=False, repeated=False)
    block = tower.matrices(4 * width**2 + matrices * product, last=product)
    merged = vision.spatial_merge_size**2  # patches of one token
    per_token = merged * (embed.matrices(patch, last=0) + vision.depth * block) + projector.matrices(mergers, last=0)
    return per_token, merged**2 * tower.attention(width)


def _has_windows(vision_config) -> bool:
    """Return whether blocks see windows: Qwen2.5-VL's do, whatever keys a Qwen2-VL config holds."""
    return vision_config.model_type.startswith("qwen2_5_vl")


# Keys of a Qwen-VL config that name its media tokens, and the tokens.
QWEN_TOKENS = {
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
}  # fmt: skip
_VISION_KEYS = {
    "depth", "hidden_act", "hidden_size", "in_channels", "in_chans", "num_heads", "patch_size", "rope_parameters",
    "spatial_merge_size", "spatial_patch_size", "temporal_patch_size",
}  # fmt: skip


class Qwen2VLFamily:
    """The family of Qwen2-VL or that of Qwen2.5-VL, from which Qwen3-VL's is derived; see `VisionFamily`.

    Args:
        model_type, stem: as of `VisionFamily`.
        text_keys, vision_keys: keys of its text config, and those of its vision config that not all of them have.
    """

    tower = QwenTower
    chat_layout = "qwen"
    media_tokens = QWEN_TOKENS
    has_axes = True
    no_pixel_limits = ""
    # Published checkpoints have these names, which every stock class of every version knows; AutoModel does not know
    # `model.visual.*`.
    file_names: ClassVar = {"model.visual.": "visual.", "model.language_model.": "model."}
    loaded_names: ClassVar = {
        r"^visual\.": "model.visual.", r"^model\.(?!visual\.|language_model\.)": "model.language_model.",
    }  # fmt: skip

    def __init__(self, model_type: str, stem: str, text_keys: Collection[str], vision_keys: Collection[str]):
        self.model_type, self.stem = model_type, stem
        media, vision = {*QWEN_TOKENS, "vision_token_id"}, {*_VISION_KEYS, *vision_keys}
        self.keys = {model_type: media, f"{model_type}_text": text_keys, f"{model_type}_vision": vision}

    def check(self, config) -> None:
        check_qwen_vision(config, MROPE_SECTION)

    def gated_activations(self, config) -> set[str]:
        return {config.vision_config.hidden_act} if _has_windows(config.vision_config) else set()

    def load_format(self, config, tokenizer, folder: str | None, settings: FormatSettings) -> QwenFormat:
        return load_qwen_format(
            config.vision_config, tokenizer, folder, settings.video, min_pixels=settings.min_pixels,
            max_pixels=settings.max_pixels, image_mean=settings.image_mean, image_std=settings.image_std,
        )  # fmt: skip

    def media_costs(self, config, tower: Passes, projector: Passes) -> dict[str, int]:
        return _media_costs(config, tower, projector)

    def keep_first_blocks(self, vision_config, count: int) -> None:
        vision_config.depth = min(count, vision_config.depth)
        if _has_windows(vision_config):  # one block with windows, and one with whole images
            vision_config.fullatt_block_indexes = [vision_config.depth - 1]

    def image_processor(self, tokenizer, folder: str | None, limits: Mapping[str, int]):
        from fastrm.model.vision.qwen_processor import make_processor  # imports much, for policies alone

        return make_processor(tokenizer, folder, limits)

    def fixed_in_vllm(self, config) -> dict[str, tuple]:
        theta = rope_parameters(config.vision_config).get("rope_theta", 10000.0)
        found = {"vision_config's rope_theta": (theta, 10000.0)}
        if not _has_windows(config.vision_config):
            found["vision_config.hidden_act"] = (config.vision_config.hidden_act, "quick_gelu")
        return found

    def add_vllm_files(self, folder: Path, config, tokenizer) -> None:
        """Write nothing: vLLM reads images by the files that are there."""


QWEN2_VL = Qwen2VLFamily("qwen2_vl", "Qwen2VL", TEXT_KEYS, {"embed_dim", "mlp_ratio"})
QWEN2_5_VL = Qwen2VLFamily("qwen2_5_vl", "Qwen2_5_VL", TEXT_KEYS, {
    "fullatt_block_indexes", "intermediate_size", "out_hidden_size", "tokens_per_second", "window_size",
})  # fmt: skip
