"""Tree attention through torch's varlen FlashAttention (torch.nn.attention.varlen), CUDA only.

A run is a varlen sequence whose key count may exceed its query count; window (-1, 0) is causal,
aligned at the bottom right, which is exactly a run's mask. The keys of shared segments are copied
once per extra child: under GQA that is Hkv / H of a query-sized tensor.
"""

import torch

from fastrm_kernels.tree_attention.gather import take_rows


def tree_attention_varlen(query, key, value, layout, *, scale=None, causal=True):
    """Same contract as `tree_attention`; float16 or bfloat16 on CUDA.

    Raises:
        ValueError: on another device or dtype, or where FlashAttention-2's backward would overflow
            its 32-bit offsets.
    """
    from torch.nn.attention.varlen import varlen_attn

    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"impl='varlen': got {query.dtype} on {query.device.type}, wanted float16 or bfloat16 on "
            "cuda; use impl='eager' elsewhere"
        )
    num_queries, heads, width = query.shape
    if num_queries == 0:
        return query + 0 * (key.sum() + value.sum())  # nothing, but of all three, for autograd
    offsets = (num_queries + 128 * len(layout.query_lengths)) * heads * width
    if offsets >= 2**31:
        raise ValueError(
            f"{num_queries:,} query tokens in {len(layout.query_lengths):,} runs need {offsets:,} offsets, but "
            "FlashAttention-2's backward has 2^31; use packs with fewer tokens (optim.tokens_per_pack)"
        )
    if layout.key_index is not None:
        key, value = (take_rows(rows, layout.key_index) for rows in (key, value))
    return varlen_attn(
        query.contiguous(), key.contiguous(), value.contiguous(),
        layout.cu_seqlens_q, layout.cu_seqlens_k, max(layout.query_lengths), max(layout.key_lengths),
        scale=scale, window_size=(-1, 0) if causal else (-1, -1), enable_gqa=heads != key.shape[1],
    )  # fmt: skip
