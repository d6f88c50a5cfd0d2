"""Stock transformers models, driven directly: no LM head, no mask, no cache, a pruned last layer.

`BackboneRunner` calls the modules of a stock model in the order of its own forward, with two
differences that are exact for a reward model: attention follows the prefix tree, and the last
decoder layer computes queries, output projection and MLP for the anchor tokens alone, because
nothing else of it is read.
"""

import sys

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastrm.data.packing import Pack
from fastrm.errors import ConfigError
from fastrm.model.attention import VisionLayouts
from fastrm_kernels import TreeLayout

VISION_FAMILIES = ("qwen2_vl", "qwen2_5_vl")
TEXT_FAMILIES = ("qwen2", "qwen3", "llama")


def check_family(config) -> None:
    """Refuse model types whose forward is not known to match `BackboneRunner`.

    Raises:
        ConfigError: for another model type, or for sliding-window layers.
    """
    if config.model_type not in VISION_FAMILIES + TEXT_FAMILIES:
        raise ConfigError(
            f"model type {config.model_type!r} is not supported; wanted one of "
            f"{', '.join(VISION_FAMILIES + TEXT_FAMILIES)}"
        )
    text = config.get_text_config()
    if getattr(text, "attention_dropout", 0.0):
        raise ConfigError(f"{config.model_type}: attention_dropout is {text.attention_dropout}, only 0 is supported")
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        raise ConfigError(
            f"{config.model_type}: sliding-window layers are not supported; set use_sliding_window: false if the "
            "checkpoint was trained without"
        )


class BackboneRunner:
    """Runs a stock model on packs. Holds no weights; `model` is a transformers base model."""

    def __init__(self, model: nn.Module):
        check_family(model.config)
        self.model = model
        self.is_vision = model.config.model_type in VISION_FAMILIES
        self.language = model.language_model if self.is_vision else model
        self.gradient_checkpointing = False

    def anchor_states(self, pack: Pack) -> torch.Tensor:
        """Hidden states (R, D) of the anchors after the last layer, before the final norm."""
        layout = TreeLayout.build(pack.lengths, pack.parents, pack.input_ids.device)
        hidden = self._embed(pack)  # (1, T, D)
        # Text models read one row of positions; M-RoPE models all three.
        position_ids = pack.position_ids[:, None] if self.is_vision else pack.position_ids[:1]
        rotary = self.language.rotary_emb(hidden, position_ids)  # cos, sin: (1, T, K)
        *layers, last = self.language.layers
        for layer in layers:
            hidden = layer(
                hidden, attention_mask=None, position_embeddings=rotary, position_ids=None, tree_layout=layout
            )
        pruned = layout.at_rows(pack.anchor_rows)
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(_last_layer, last, hidden, rotary, pack.anchors, pruned, use_reentrant=False)
        return _last_layer(last, hidden, rotary, pack.anchors, pruned)

    def _embed(self, pack: Pack) -> torch.Tensor:
        embeddings = self.language.embed_tokens(pack.input_ids)  # (T, D)
        if pack.pixel_values is not None:
            features = self.image_features(pack.pixel_values, pack.image_grid_thw)
            features = features.index_select(0, pack.image_features).to(embeddings.dtype)
            embeddings = embeddings.index_copy(0, pack.image_rows, features)
        return embeddings[None]

    def image_features(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """(merged patches, D) of all images of a pack, each encoded once."""
        visual = self.model.visual
        output = visual(pixel_values.to(visual.dtype), grid_thw=grid_thw, vision_layouts=VisionLayouts())
        return output.pooler_output


def _last_layer(layer, hidden, rotary, anchors, layout) -> torch.Tensor:
    """A stock decoder layer of the Llama/Qwen kind, evaluated at the anchors: (1, T, D) -> (R, D).

    Keys and values need every token; everything else only the anchors.
    """
    attention = layer.self_attn
    module = sys.modules[type(attention).__module__]
    residual = hidden[:, anchors]  # (1, R, D)
    states = layer.input_layernorm(hidden)
    queries = _heads(attention, attention.q_proj(states[:, anchors]), "q_norm")  # (1, H, R, K)
    keys = _heads(attention, attention.k_proj(states), "k_norm")  # (1, Hkv, T, K)
    values = _heads(attention, attention.v_proj(states))
    cos, sin = rotary
    _, keys = module.apply_rotary_pos_emb(keys, keys, cos, sin)
    queries, _ = module.apply_rotary_pos_emb(queries, queries, cos[:, anchors], sin[:, anchors])
    attend = module.ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    mixed, _ = attend(attention, queries, keys, values, None, scaling=attention.scaling, tree_layout=layout)
    states = residual + attention.o_proj(mixed.flatten(2))
    return (states + layer.mlp(layer.post_attention_layernorm(states)))[0]


def _heads(attention, projected, norm=None) -> torch.Tensor:
    """(1, T, heads * K) -> (1, heads, T, K), normalised per head where the family does (Qwen3)."""
    heads = projected.view(*projected.shape[:2], -1, attention.head_dim)
    if norm is not None and hasattr(attention, norm):
        heads = getattr(attention, norm)(heads)
    return heads.transpose(1, 2)
