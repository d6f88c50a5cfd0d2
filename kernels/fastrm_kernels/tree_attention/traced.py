"""Tree attention inside torch.compile: what of a layout a graph needs, as tensors and numbers.

A compiled graph serves every pack, so the layout must come in through its arguments. The Triton
kernels and torch's varlen attention are operators that take tensors; their plans hold these. The
eager implementation walks Python lists: its operator gets a handle, a tensor with the number of a
layout that is alive, and looks the layout up when it runs.
"""

from typing import NamedTuple

import torch

from fastrm_kernels.tree_attention import tiles
from fastrm_kernels.tree_attention.autograd import tree_attention_forward
from fastrm_kernels.tree_attention.eager import eager_forward, handle_of
from fastrm_kernels.tree_attention.gather import take_rows
from fastrm_kernels.tree_attention.layout import TreeLayout


class TritonPlan(NamedTuple):
    """Arguments of the Triton operator."""

    lists: list[torch.Tensor]
    single_rows: bool
    num_parts: int


class VarlenPlan(NamedTuple):
    """Arguments of torch's varlen attention, and the rows of key and value that it reads (None: all)."""

    key_index: torch.Tensor | None
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_q: int
    max_k: int
    options: dict


class EagerPlan(NamedTuple):
    """Number of a living layout, (1,) int64 on the CPU."""

    handle: torch.Tensor
    causal: bool


Plan = TritonPlan | VarlenPlan | EagerPlan


def plan_attention(
    layout: TreeLayout, impl: str, dtype: torch.dtype, heads: int, key_heads: int, head_dim: int, *, causal: bool = True
) -> Plan:
    """The arguments that `tree_attention_planned` needs of a layout.

    Args:
        layout: on the device of the queries; for `eager` it must live until the backward pass is done.
        impl: triton, varlen or eager.
        dtype, heads, key_heads, head_dim: of the queries, keys and values to come.
        causal: as for `tree_attention`.

    Raises:
        ValueError: for causal=False on a tree, or an unknown impl.
    """
    if not causal and not layout.is_flat:
        raise ValueError("causal=False: got a tree, wanted independent sequences (all parents -1)")
    if impl == "triton":
        single_rows = layout.query_rows is not None
        work = tiles.work_lists(layout, tiles.choose_blocks(dtype, head_dim, single_rows), causal)
        num_parts = work.key_tiles.parts_wanted(key_heads, heads // key_heads)
        return TritonPlan(work.tensors(), single_rows, num_parts)
    if impl == "varlen":
        from fastrm_kernels.tree_attention.varlen import check_offsets, varlen_options

        check_offsets(layout, heads, head_dim)
        return VarlenPlan(
            layout.key_index, layout.cu_seqlens_q, layout.cu_seqlens_k,
            max(layout.query_lengths), max(layout.key_lengths), varlen_options(heads, key_heads, None, causal),
        )  # fmt: skip
    if impl != "eager":
        raise ValueError(f"impl: got {impl!r}, wanted triton, varlen or eager")
    return EagerPlan(handle_of(layout), causal)


def tree_attention_planned(query, key, value, plan: Plan, scale: float) -> torch.Tensor:
    """`tree_attention` by a plan: (Tq, H, K), (T, Hkv, K), (T, Hkv, K) -> (Tq, H, K). Traceable, unchecked."""
    if isinstance(plan, TritonPlan):
        return tree_attention_forward(query, key, value, plan.lists, plan.single_rows, plan.num_parts, scale)[0]
    if isinstance(plan, EagerPlan):
        return eager_forward(query, key, value, plan.handle, scale, plan.causal)[0]
    from torch.nn.attention.varlen import varlen_attn

    if plan.key_index is not None:
        key, value = take_rows(key, plan.key_index), take_rows(value, plan.key_index)
    return varlen_attn(
        query.contiguous(), key.contiguous(), value.contiguous(), plan.cu_seqlens_q, plan.cu_seqlens_k,
        plan.max_q, plan.max_k, **{**plan.options, "scale": scale},
    )  # fmt: skip
