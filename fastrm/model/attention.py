"""Tree attention for stock transformers models, through their registered attention interface.

The layout travels as a keyword argument of the model call: `tree_layout` for the language model,
`vision_layouts` for the vision tower. No transformers class is changed.
"""

import torch
from transformers import AttentionInterface

from fastrm_kernels import TreeLayout, tree_attention

# config value -> implementation of tree_attention
BACKENDS = {"sdpa": "eager", "flash": "varlen", "triton": "triton"}


class VisionLayouts:
    """Layouts of the vision tower's sequences (windows, images), each built once per forward pass.

    The tower hands the same cu_seqlens tensor object to all its blocks; identity is the key, and the
    reference kept here makes sure that it stays one.
    """

    def __init__(self):
        self._known: dict[int, tuple[torch.Tensor, TreeLayout]] = {}

    def of(self, cu_seqlens: torch.Tensor) -> TreeLayout:
        if id(cu_seqlens) not in self._known:
            layout = TreeLayout.from_lengths(cu_seqlens.diff().tolist(), cu_seqlens.device)
            self._known[id(cu_seqlens)] = (cu_seqlens, layout)
        return self._known[id(cu_seqlens)][1]


def use_backend(model, backend: str) -> None:
    """Let a stock base model attend through `backend`, a key of BACKENDS.

    The vision tower's name contains "flash": transformers then hands over cu_seqlens for the whole
    row instead of calling the attention once per window from Python. The top-level configuration
    keeps its own setting, because for that one transformers would go and look for a flash package.
    """
    if hasattr(model.config, "vision_config"):
        names = {"text_config": f"fastrm_tree_{backend}", "vision_config": f"fastrm_flash_vision_{backend}"}
        model.set_attn_implementation({"": model.config._attn_implementation, **names})
    else:
        model.set_attn_implementation(f"fastrm_tree_{backend}")


def _tree_interface(implementation: str):
    def attend(module, query, key, value, attention_mask, scaling=None, *, tree_layout, **_):
        return _attend(query, key, value, tree_layout, scaling, True, implementation)

    return attend


def _vision_interface(implementation: str):
    def attend(module, query, key, value, attention_mask, scaling=None, *, vision_layouts, cu_seq_lens_q, **_):
        return _attend(query, key, value, vision_layouts.of(cu_seq_lens_q), scaling, False, implementation)

    return attend


def _attend(query, key, value, layout, scale, causal, implementation):
    """query (1, H, Tq, K), key and value (1, Hkv, T, K) -> (1, Tq, H, K), as transformers wants it."""
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embedding computes in float32; SDPA would cast back by itself, the other backends not.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    output = tree_attention(query, key, value, layout, scale=scale, causal=causal, impl=implementation)
    return output.unsqueeze(0), None


for _backend, _implementation in BACKENDS.items():
    AttentionInterface.register(f"fastrm_tree_{_backend}", _tree_interface(_implementation))
    AttentionInterface.register(f"fastrm_flash_vision_{_backend}", _vision_interface(_implementation))
