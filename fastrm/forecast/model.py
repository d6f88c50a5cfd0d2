"""The parts of a network, in the order of the forward pass, as tapes for one pack."""

from dataclasses import replace

from torch import nn

from fastrm.config import Config
from fastrm.forecast.layers import (
    FLOAT,
    Computation,
    LayerSizes,
    Rows,
    decoder_tape,
    embedding_tape,
    head_tape,
    last_decoder_tape,
    mean_tape,
    merger_tape,
    pixel_tape,
    tile_pixel_tape,
    tile_projector_tape,
    tile_tape,
    vision_tape,
)
from fastrm.forecast.parameters import language_of
from fastrm.forecast.tape import Part
from fastrm.model.attention import AttentionShape
from fastrm.model.network import RewardNetwork
from fastrm.model.vision_tiles import TileShape


def network_parts(network: RewardNetwork, config: Config, rows: Rows, how: Computation) -> list[Part]:
    """All parts of a network whose projections are not fused; it may live on the meta device.

    Args:
        rows: of the pack.
        how: layers compute.
    """
    parts = []
    if network.tower is not None and rows.patches:
        of_family = _tile_parts if isinstance(network.tower.shape, TileShape) else _vision_parts
        parts = of_family(network, config, rows, how)
    return parts + _language_parts(network, config, rows, how, any(part.trained for part in parts))


def _language_parts(network: RewardNetwork, config: Config, rows: Rows, how: Computation, reached: bool) -> list[Part]:
    language = language_of(network)
    sizes = language_sizes(network)
    trained = _is_trained(language)
    embeddings = language.embed_tokens.weight
    mode = config.model.activation_checkpointing
    means = network.pooling == "mean"
    *layers, last = language.layers
    if means:
        layers = list(language.layers)
    embedding = embedding_tape(rows, *embeddings.shape, rows.patches > 0, how, embeddings.requires_grad)
    # Tables of the rotary embedding, which all layers read.
    tables = 2 * FLOAT * rows.tokens * (sizes.query // sizes.heads)
    reached = reached or trained
    return [
        Part("embeddings", embedding, reached, _gradient_bytes(language.embed_tokens), "none"),
        Part(
            "decoder layer", decoder_tape(sizes, rows, how, trained), reached, _gradient_bytes(layers[0]), mode,
            len(layers), held=tables,
        ),
        Part("means", mean_tape(rows, sizes.hidden, how, trained), reached, _gradient_bytes(language.norm), mode)
        if means
        else Part("last layer", last_decoder_tape(sizes, rows, how, trained), reached, _gradient_bytes(last), mode),
        Part("head", head_tape(rows, sizes.hidden, config.model.head.layers, how, means), True,
             _gradient_bytes(network.score), "none"),
    ]  # fmt: skip


def _vision_parts(network: RewardNetwork, config: Config, rows: Rows, how: Computation) -> list[Part]:
    visual, vision = network.model.visual, network.model.config.vision_config
    sizes, merge = vision_sizes(network), vision.spatial_merge_size
    in_tower, in_merger = _is_trained(visual.blocks), _is_trained(visual.merger)
    pixels, values = pixel_bytes(network, rows), _patch_values(network)
    tables = 2 * FLOAT * rows.patches * (sizes.hidden // sizes.heads)
    hidden = network.model.config.get_text_config().hidden_size
    return [
        Part("pixels", pixel_tape(rows, values, sizes.hidden, how, in_tower), in_tower,
             _gradient_bytes(visual.patch_embed), "none"),
        Part("vision block", vision_tape(sizes, rows, how, in_tower), in_tower, _gradient_bytes(visual.blocks[0]),
             config.model.activation_checkpointing, len(visual.blocks), held=pixels + tables),
        Part("projector", merger_tape(rows, merge, sizes.hidden, hidden, how, in_merger), in_tower or in_merger,
             _gradient_bytes(visual.merger), "none", held=pixels + tables),
    ]  # fmt: skip


def _tile_parts(network: RewardNetwork, config: Config, rows: Rows, how: Computation) -> list[Part]:
    tower, patches = network.tower, rows.patches
    sizes, values = vision_sizes(network), _patch_values(network)
    # With a class token for each tile.
    rows = replace(rows, patches=patches + patches // tower.shape.side**2)
    embeddings, blocks = tower.module.embeddings, tower.module.encoder.layer
    in_tower, in_projector = _is_trained(tower.module), _is_trained(tower.projector)
    pixels = FLOAT * patches * values
    hidden = network.model.config.get_text_config().hidden_size
    return [
        Part("pixels", tile_pixel_tape(rows, patches, values, sizes.hidden, how, in_tower), in_tower,
             _gradient_bytes(embeddings), "none"),
        Part("vision block", tile_tape(sizes, rows, how, in_tower), in_tower, _gradient_bytes(blocks[0]),
             config.model.activation_checkpointing, len(blocks), held=pixels),
        Part("projector",
             tile_projector_tape(rows, patches, tower.shape.merge, sizes.hidden, hidden, how, in_projector),
             in_tower or in_projector, _gradient_bytes(tower.projector), "none", held=pixels),
    ]  # fmt: skip


def pixel_bytes(network: RewardNetwork, rows: Rows) -> int:
    """Of a pack's images as the vision tower takes them, float32."""
    return FLOAT * rows.patches * _patch_values(network) if network.is_vision else 0


def _patch_values(network: RewardNetwork) -> int:
    return network.tower.blank[1]


def language_sizes(network: RewardNetwork) -> LayerSizes:
    """Of a decoder layer."""
    config = network.model.config.get_text_config()
    shape = AttentionShape.of_language(config)
    return LayerSizes(
        config.hidden_size, shape.heads * shape.head_dim, shape.key_heads * shape.head_dim, config.intermediate_size,
        shape.heads,
    )  # fmt: skip


def vision_sizes(network: RewardNetwork) -> LayerSizes:
    """Of a block of the vision tower."""
    shape, tower = AttentionShape.of_vision(network.model.config.vision_config), network.tower.module
    is_tiled = isinstance(network.tower.shape, TileShape)
    block = tower.encoder.layer[0] if is_tiled else tower.blocks[0]
    norm = block.layernorm_before if is_tiled else block.norm1
    width = shape.heads * shape.head_dim
    intermediate = max(module.out_features for module in block.mlp.modules() if isinstance(module, nn.Linear))
    gated = hasattr(block.mlp, "gate_proj")
    return LayerSizes(width, width, width, intermediate, shape.heads, gated, isinstance(norm, nn.LayerNorm))


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _gradient_bytes(module: nn.Module) -> int:
    return FLOAT * sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
