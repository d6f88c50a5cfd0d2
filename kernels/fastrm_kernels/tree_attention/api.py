"""`tree_attention`: checks and dispatch. An explicit `impl` never falls back to another."""

import torch

from fastrm_kernels.tree_attention.eager import tree_attention_eager
from fastrm_kernels.tree_attention.varlen import tree_attention_varlen

IMPLEMENTATIONS = {"eager": tree_attention_eager, "varlen": tree_attention_varlen}


def tree_attention(query, key, value, layout, *, scale=None, causal=True, impl="auto"):
    """Attention of packed query tokens to their paths in a prefix tree.

    Args:
        query: (Tq, H, K); Tq is the sum of the layout's query lengths.
        key, value: (T, Hkv, K) with H a multiple of Hkv and T = layout.num_keys.
        layout: a `TreeLayout` on the same device.
        scale: of the scores; default K ** -0.5.
        causal: each run causal, aligned at the bottom right; else every query sees its whole run.
        impl: auto (varlen on CUDA in half precision, else eager), eager, or varlen.

    Returns:
        (Tq, H, K), like `query`. Deterministic, forward and backward, with eager on CPU.

    Raises:
        ValueError: for shapes that do not fit the layout, an unknown impl, or an impl that cannot
            run these inputs.
    """
    if query.shape[0] != sum(layout.query_lengths) or key.shape[0] != layout.num_keys:
        raise ValueError(
            f"got {query.shape[0]} query and {key.shape[0]} key rows, the layout has "
            f"{sum(layout.query_lengths)} and {layout.num_keys}"
        )
    if key.shape != value.shape or query.shape[1] % key.shape[1] or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"got query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}; wanted "
            "(Tq, H, K), (T, Hkv, K), (T, Hkv, K) with H a multiple of Hkv"
        )
    if impl == "auto":
        half = query.dtype in (torch.float16, torch.bfloat16)
        impl = "varlen" if query.device.type == "cuda" and half else "eager"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: got {impl!r}, wanted auto or one of {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[impl](query, key, value, layout, scale=scale, causal=causal)
