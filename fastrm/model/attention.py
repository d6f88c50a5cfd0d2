"""Attention of one forward pass: the implementation, and the arguments that it needs of the pack's layout."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastrm_kernels import TreeLayout, tree_attention
from fastrm_kernels.tree_attention.traced import Arguments, attention_arguments, tree_attention_traced

# config value -> implementation of tree_attention
BACKENDS = {"sdpa": "eager", "flash": "varlen", "flash_attn": "flash_attn", "triton": "triton"}


@dataclass(frozen=True)
class AttentionShape:
    """The heads of all attention layers of one kind: of the language model, or of the vision tower."""

    heads: int
    key_heads: int
    head_dim: int

    @staticmethod
    def of_language(config) -> "AttentionShape":
        """Return the shape for a transformers text config."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return AttentionShape(config.num_attention_heads, config.num_key_value_heads, head_dim)


@dataclass(frozen=True)
class Attention:
    """The attention of one kind of layers.

    Attributes:
        impl: of `tree_attention`.
        shape: of the layers.
        causal: False in the vision tower.
        traced: attention is called with tensors and numbers instead of a layout, as inside torch.compile, and without
            asking whether it can run on this device.
    """

    impl: str
    shape: AttentionShape
    causal: bool
    traced: bool = False

    def arguments(self, layout: TreeLayout, dtype: torch.dtype) -> TreeLayout | Arguments:
        """Return the arguments of `attend` for a layout: itself, or in a compiled layer its traceable form."""
        if not self.traced:
            return layout
        shape = self.shape
        return attention_arguments(
            layout, self.impl, dtype, shape.heads, shape.key_heads, shape.head_dim, causal=self.causal
        )

    def attend(self, query, key, value, arguments: TreeLayout | Arguments, scale: float) -> torch.Tensor:
        """Compute attention (Tq, H, K), (T, Hkv, K), (T, Hkv, K) -> (Tq, H, K), in the products' dtype."""
        if torch.is_autocast_enabled(query.device.type):
            # Rotary embedding computes in float32; SDPA would cast back by itself, the other backends not.
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if isinstance(arguments, TreeLayout):
            return tree_attention(query, key, value, arguments, scale=scale, causal=self.causal, impl=self.impl)
        return tree_attention_traced(query, key, value, arguments, scale)


class _KeepAlive(torch.autograd.Function):
    """Identity whose backward node holds the layouts, which compiled attention knows by number only."""

    @staticmethod
    def forward(ctx, states, layouts):
        ctx.layouts = layouts
        return states.view_as(states)

    @staticmethod
    def backward(ctx, upstream):
        return upstream, None


def keep_alive(states: torch.Tensor, layouts: Sequence[TreeLayout]) -> torch.Tensor:
    """Return `states`, with the layouts alive as long as its autograd graph."""
    return _KeepAlive.apply(states, layouts)
