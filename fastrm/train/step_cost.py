"""The costs by which groups are balanced over ranks, derived from a model's configuration.

Configurations, not networks: under ZeRO-3 a rank's parameters are pieces whose shapes say nothing.
The formulas are those of `step_flops`; what depends on the number of responses alone (the head and the
anchors' part of the last layer) is left out.
"""

from dataclasses import dataclass

from fastrm.config import ModelConfig
from fastrm.data.balance import CostModel
from fastrm.model.families import QWEN_VL_FAMILIES, has_windows


@dataclass(frozen=True)
class _Passes:
    """The passes of a training step through a part of the model besides its forward pass."""

    trained: bool
    reached: bool  # True if something in it or before it is trained, so that gradients pass through it
    repeated: bool  # True if its layers run again in the backward pass

    def matrices(self, num_parameters: int, last: int) -> int:
        """Return FLOPs per row of one layer; `last` of the parameters, its last product, are not repeated."""
        return 2 * (num_parameters * (1 + self.reached + self.trained) + (num_parameters - last) * self.repeated)

    def attention(self, width: int) -> int:
        """Return FLOPs of a query-key pair of one layer with queries of this width, all heads together."""
        return 4 * width * (1 + 2 * self.reached + self.repeated)


def make_cost_model(config, settings: ModelConfig) -> CostModel:
    """Make the cost model of `plan_steps`: FLOPs of forward, backward and recomputation in a training step.

    Args:
        config: the backbone's transformers config.
        settings: says what is trained, and whether layers are computed again.
    """
    trained = {part: part not in settings.freeze for part in ("vision", "projector", "language")}
    full = settings.activation_checkpointing == "full"
    vision = getattr(config, "vision_config", None)
    vision_reached = vision is not None and trained["vision"]
    projector_reached = vision_reached or (vision is not None and trained["projector"])
    language_reached = projector_reached or trained["language"]
    language = _Passes(trained["language"], language_reached, full and language_reached)
    costs = _language_costs(config.get_text_config(), language, settings.pooling == "anchor")
    if vision is not None:
        tower = _Passes(trained["vision"], vision_reached, full and vision_reached)
        projector = _Passes(trained["projector"], projector_reached, False)
        costs |= MEDIA_COSTS[config.model_type](config, tower, projector)
    return CostModel(**costs)


def _language_costs(text, passes: _Passes, pruned: bool) -> dict:
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    key_value = 2 * text.hidden_size * keys
    product = text.hidden_size * text.intermediate_size  # gate, up or down
    layer = 2 * text.hidden_size * queries + key_value + 3 * product
    whole_layers = text.num_hidden_layers - pruned
    # A pruned last layer computes only keys and values, except for the anchors.
    last_layer = passes.matrices(key_value, last=0) if pruned else 0
    return {
        "per_token": whole_layers * passes.matrices(layer, last=product) + last_layer,
        "per_attention_pair": whole_layers * passes.attention(queries),
    }


def _tile_costs(config, tower: _Passes, projector: _Passes) -> dict:
    """Return the costs of InternVL's images; the class token of a tile is left out."""
    vision, hidden = config.vision_config, config.get_text_config().hidden_size
    width, product = vision.hidden_size, vision.hidden_size * vision.intermediate_size
    patch = vision.num_channels * vision.patch_size[0] * vision.patch_size[1] * width
    embed = _Passes(tower.trained, reached=False, repeated=False)
    layers = vision.num_hidden_layers
    per_patch = embed.matrices(patch, last=0) + layers * tower.matrices(4 * width**2 + 2 * product, last=product)
    merged = int(1 / config.downsample_ratio) ** 2  # patches of one token
    return {
        "per_media_token": merged * per_patch + projector.matrices(hidden * (merged * width + hidden), last=0),
        "per_media_pair": layers * merged**2 * tower.attention(width),
    }


def _vision_costs(config, tower: _Passes, projector: _Passes) -> dict:
    vision, hidden = config.vision_config, config.get_text_config().hidden_size
    windows = has_windows(vision)
    # Qwen2-VL calls the tower's width embed_dim, and has an MLP of two matrices instead of three.
    width = vision.hidden_size if windows else vision.embed_dim
    product = width * (vision.intermediate_size if windows else int(width * vision.mlp_ratio))
    block = 4 * width**2 + (3 if windows else 2) * product
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * width
    # Pixels need no gradient, and only blocks are repeated.
    embed = _Passes(tower.trained, reached=False, repeated=False)
    per_patch = embed.matrices(patch, last=0) + vision.depth * tower.matrices(block, last=product)
    merged = vision.spatial_merge_size**2  # patches of one token
    merger = merged * width * (merged * width + hidden)
    full_blocks = len(vision.fullatt_block_indexes) if windows else vision.depth
    pair = merged**2 * tower.attention(width)
    return {
        "per_media_token": merged * per_patch + projector.matrices(merger, last=0),
        "per_media_pair": full_blocks * pair,
        "per_window_pair": (vision.depth - full_blocks) * pair,
        "window": vision.window_size // vision.spatial_merge_size // vision.patch_size if windows else 0,
    }


# The costs of media of every family of VISION_FAMILIES.
MEDIA_COSTS = {**dict.fromkeys(QWEN_VL_FAMILIES, _vision_costs), "internvl": _tile_costs}
