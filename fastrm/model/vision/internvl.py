"""InternVL2.5 and InternVL3: what is known of their models.

Every tile has the same grid of patches and is a sequence of its own: a class token, then its patches.
The tower takes patches in the order of the data side, those of one image token together; absolute
position embeddings say where each is, and the order in the sequence means nothing to its attention.
The layout of a pack's tiles follows from their number alone.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from fastrm.data.media.format import FormatSettings, Grid, PatchFormat
from fastrm.data.media.internvl import InternVLFormat, load_internvl_format
from fastrm.data.tokenizer import special_id
from fastrm.data_config import DataConfig
from fastrm.errors import ConfigError
from fastrm.json_files import to_json
from fastrm.model.compiled import mark_dynamic
from fastrm.model.layers import AttentionShape, LayerKernels, apply_norm, split_heads
from fastrm.model.text import check_activation
from fastrm.model.vision.tower import MediaFeatures, Passes, VisionTower, plain_patches, project_patches
from fastrm_kernels import TreeLayout

# The text models that published checkpoints have, and that were compared with stock inside of one.
_TEXTS = ("qwen2", "qwen3", "llama")


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


def tile_block(block: nn.Module, hidden, arguments, kernels: LayerKernels) -> torch.Tensor:
    """Run a layer of InternVL's vision tower, with a learned scale on each branch: (N, D) -> (N, D)."""
    attention = block.attention
    states = apply_norm(block.layernorm_before, hidden, kernels)
    # These norms are over all heads together if the config asks for it; else they are identities.
    query = attention.q_norm(attention.q_proj(states))
    key = attention.k_norm(attention.k_proj(states))
    query, key, value = (split_heads(attention, part) for part in (query, key, attention.v_proj(states)))
    mixed = kernels.attention.attend(query, key, value, arguments, attention.scale)
    hidden = block.lambda_1 * attention.projection_layer(mixed.flatten(1)) + hidden
    return block.lambda_2 * block.mlp(apply_norm(block.layernorm_after, hidden, kernels)) + hidden


class InternTower(VisionTower):
    """The tower of InternVL: square tiles with a class token and absolute positions; its projector stands outside."""

    block = staticmethod(tile_block)

    def __init__(self, model: nn.Module):
        self.module, self.projector = model.vision_tower, model.multi_modal_projector
        self.embedding, self.blocks = self.module.embeddings.patch_embeddings, self.module.encoder.layer
        self._config = model.config.vision_config
        self.shape = TileShape.from_config(model.config)

    @staticmethod
    def heads(vision_config) -> AttentionShape:
        heads = vision_config.num_attention_heads
        return AttentionShape(heads, heads, vision_config.hidden_size // heads)

    def features(self, pixel_values, layout: TileLayout, run, dtype) -> MediaFeatures:
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
        return MediaFeatures(self.projector(patches.reshape(-1, merge**2 * hidden.shape[-1])))

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
        return plain_patches(self._config.patch_size[0], self.shape.merge, 1, self._config.num_channels)

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


def _check_internvl(config) -> None:
    text, vision = config.get_text_config(), config.vision_config
    if text.model_type not in _TEXTS:
        raise ConfigError(
            f"internvl: text_config has model type {text.model_type!r}; wanted one of {', '.join(_TEXTS)}"
        )
    if vision.model_type != "internvl_vision":
        raise ConfigError(f"internvl: vision_config has model type {vision.model_type!r}; wanted internvl_vision")
    found = {name: getattr(vision, name) for name in ("attention_dropout", "projection_dropout", "hidden_dropout_prob")}
    found |= {name: getattr(config, name) for name in ("vision_feature_layer", "vision_feature_select_strategy")}
    wanted = dict.fromkeys(found, 0.0) | {"vision_feature_layer": -1, "vision_feature_select_strategy": "default"}
    for name, value in found.items():
        if value != wanted[name]:
            raise ConfigError(f"internvl: {name} is {value!r}, only {wanted[name]!r} is supported")
    if vision.num_channels != 3:
        raise ConfigError(
            f"internvl: vision_config.num_channels is {vision.num_channels}, only 3 is supported: images are read as "
            "red, green and blue"
        )
    if vision.norm_type not in ("layer_norm", "rms_norm"):
        raise ConfigError(f"internvl: norm_type is {vision.norm_type!r}, wanted layer_norm or rms_norm")
    check_activation("internvl", "vision_config.hidden_act", vision.hidden_act)
    check_activation("internvl", "projector_hidden_act", config.projector_hidden_act)
    merge = int(1 / config.downsample_ratio)
    height, width = (size // patch for size, patch in zip(vision.image_size, vision.patch_size, strict=True))
    if height != width or len(set(vision.patch_size)) > 1 or height % merge or merge * config.downsample_ratio != 1:
        raise ConfigError(
            f"internvl: image_size {tuple(vision.image_size)}, patch_size {tuple(vision.patch_size)} and "
            f"downsample_ratio {config.downsample_ratio} give no square tiles of whole image tokens; wanted, for "
            "example, 448, 14 and 0.5"
        )


def _media_costs(config, tower: Passes, projector: Passes) -> dict[str, int]:
    """Return the costs of InternVL's images; the class token of a tile is left out."""
    vision, hidden = config.vision_config, config.get_text_config().hidden_size
    width, product = vision.hidden_size, vision.hidden_size * vision.intermediate_size
    patch = vision.num_channels * vision.patch_size[0] * vision.patch_size[1] * width
    embed = Passes(tower.trained, reached=False, repeated=False)
    layers = vision.num_hidden_layers
    per_patch = embed.matrices(patch, last=0) + layers * tower.matrices(4 * width**2 + 2 * product, last=product)
    merged = int(1 / config.downsample_ratio) ** 2  # patches of one token
    return {
        "per_media_token": merged * per_patch + projector.matrices(hidden * (merged * width + hidden), last=0),
        "per_media_pair": layers * merged**2 * tower.attention(width),
    }


class InternVLFamily:
    """The family of InternVL2.5 and InternVL3; see `VisionFamily` in families.py."""

    model_type, stem = "internvl", "InternVL"
    tower = InternTower
    chat_layout = "internvl"
    media_tokens: ClassVar = {"image_token_id": "<IMG_CONTEXT>"}
    has_axes = False
    no_pixel_limits = "InternVL reads tiles: set max_patches in preprocessor_config.json"
    file_names: ClassVar = {}
    loaded_names: ClassVar = {}
    keys: ClassVar = {
        "internvl": {
            "downsample_ratio", "image_seq_length", "image_token_id", "projector_hidden_act", "vision_feature_layer",
            "vision_feature_select_strategy",
        },
        "internvl_vision": {
            "attention_bias", "attention_dropout", "dropout", "hidden_act", "hidden_dropout_prob", "hidden_size",
            "image_size", "intermediate_size", "layer_norm_eps", "layer_scale_init_value", "norm_type",
            "num_attention_heads", "num_channels", "num_hidden_layers", "patch_size", "projection_dropout",
            "use_absolute_position_embeddings", "use_mask_token", "use_mean_pooling", "use_qk_norm",
        },
    }  # fmt: skip

    def check(self, config) -> None:
        _check_internvl(config)

    def gated_activations(self, config) -> set[str]:
        return set()

    def load_format(self, config, tokenizer, folder: str | None, settings: FormatSettings) -> InternVLFormat:
        return load_internvl_format(
            config, tokenizer, folder, max_tiles=settings.max_tiles, image_mean=settings.image_mean,
            image_std=settings.image_std,
        )  # fmt: skip

    def media_costs(self, config, tower: Passes, projector: Passes) -> dict[str, int]:
        return _media_costs(config, tower, projector)

    def keep_first_blocks(self, vision_config, count: int) -> None:
        vision_config.num_hidden_layers = min(count, vision_config.num_hidden_layers)

    def image_processor(self, tokenizer, folder: str | None, limits: Mapping[str, int]) -> None:
        return None

    def fixed_in_vllm(self, config) -> dict[str, tuple]:
        return {}

    def add_vllm_files(self, folder: Path, config, tokenizer) -> None:
        """Write what transformers' InternVLProcessor needs, by which vLLM reads images; it asks for videos' token too.

        Tokenizers of published models name these tokens themselves.
        """
        side = config.vision_config.image_size[0] // config.vision_config.patch_size[0]
        per_tile = int(side**2 * config.downsample_ratio**2)
        _update(folder / "processor_config.json", image_seq_length=per_tile, processor_class="InternVLProcessor")
        tokens = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
        tokens["video_token"] = "<IMG_CONTEXT>" if special_id(tokenizer, "<video>") is None else "<video>"
        named = {name: token for name, token in tokens.items() if getattr(tokenizer, name, None) is None}
        if named:
            _update(folder / "tokenizer_config.json", extra_special_tokens=named)


def _update(file: Path, **keys) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(to_json(content | keys, indent=2, sort_keys=True) + "\n")


INTERNVL = InternVLFamily()
