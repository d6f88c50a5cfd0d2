"""Tree attention through torch's varlen FlashAttention (torch.nn.attention.varlen), CUDA only.

A run is a varlen sequence whose key count may exceed its query count; window (-1, 0) is causal,
aligned at the bottom right, which is exactly a run's mask. The keys of shared segments are copied
once per extra child: under GQA that is Hkv / H of a query-sized tensor.
"""

import inspect

import torch

from fastrm_kernels.tree_attention.gather import take_rows


def tree_attention_varlen(query, key, value, layout, *, scale=None, causal=True):
    """Compute `tree_attention` with torch's varlen_attn; float16 or bfloat16 on CUDA.

    Raises:
        ValueError: on another device or dtype, or where FlashAttention-2's backward would overflow
            its 32-bit offsets.
    """
    from torch.nn.attention.varlen import varlen_attn

    obstacle = varlen_obstacle(query)
    if obstacle is not None:
        raise ValueError(f"tree_attention with impl='varlen': {obstacle}; use impl='eager' elsewhere")
    num_queries, heads, width = query.shape
    if num_queries == 0:
        return query + 0 * (key.sum() + value.sum())  # zero, but autograd sees all three inputs
    check_offsets(layout, heads, width)
    if layout.key_index is not None:
        key, value = (take_rows(rows, layout.key_index) for rows in (key, value))
    options = varlen_options(heads, key.shape[1], scale, causal)
    return varlen_attn(*varlen_arguments(query, key, value, layout), **options)


def varlen_obstacle(query) -> str | None:
    """Return why FlashAttention cannot run queries of this device and dtype, or None."""
    if query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16):
        return None
    return f"got {query.dtype} on {query.device.type}, wanted float16 or bfloat16 on cuda"


def check_offsets(layout, heads: int, head_dim: int) -> None:
    """Refuse what FlashAttention-2's backward would compute wrongly, with 32-bit offsets.

    Raises:
        ValueError: naming the number of tokens.
    """
    num_runs = len(layout.query_lengths)
    offsets = (layout.num_queries + 128 * num_runs) * heads * head_dim
    if offsets >= 2**31:
        raise ValueError(
            f"{layout.num_queries:,} query tokens in {num_runs:,} runs need {offsets:,} offsets, but "
            "FlashAttention-2's backward has 2^31; use packs with fewer tokens (optim.tokens_per_pack)"
        )


def varlen_arguments(query, key, value, layout) -> tuple:
    """Return the positional arguments of torch's varlen_attn; key and value are already gathered."""
    return (
        query.contiguous(), key.contiguous(), value.contiguous(),
        layout.cu_seqlens_q, layout.cu_seqlens_k, max(layout.query_lengths), max(layout.key_lengths),
    )  # fmt: skip


def varlen_options(heads: int, key_heads: int, scale: float | None, causal: bool) -> dict:
    """Return the keyword arguments of the varlen_attn that is installed."""
    from torch.nn.attention.varlen import varlen_attn

    options = {"scale": scale, "window_size": (-1, 0) if causal else (-1, -1)}
    # torch 2.11 and older take grouped heads without being told; later versions need enable_gqa.
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = heads != key_heads
    return options
