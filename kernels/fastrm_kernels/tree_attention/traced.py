"""Tree attention inside torch.compile: the parts of a layout that a graph needs, as tensors and numbers.

A compiled graph serves every pack, so the layout must come in through its arguments. The Triton
kernels, torch's varlen attention and the flash-attn package are operators that take tensors; their
arguments hold these. The eager implementation walks Python lists: its operator gets a handle, a tensor
with the number of a layout that is alive, and looks the layout up when it runs.

Numbers that change from pack to pack travel as the sizes of empty tensors. torch.compile would make
a graph for the first value of a number and another one for the second; a size it can leave open.
"""

from typing import NamedTuple

import torch

from fastrm_kernels.tree_attention import tiles
from fastrm_kernels.tree_attention.autograd import tree_attention_forward
from fastrm_kernels.tree_attention.eager import eager_forward, handle_of
from fastrm_kernels.tree_attention.flash_attn import flash_attn_forward
from fastrm_kernels.tree_attention.gather import take_rows
from fastrm_kernels.tree_attention.layout import TreeLayout
from fastrm_kernels.tree_attention.varlen import check_offsets, varlen_options


class TritonArguments(NamedTuple):
    """The arguments of the Triton operator, with the number of parts as a size."""

    lists: list[torch.Tensor]
    single_rows: bool
    num_parts: torch.Tensor


class VarlenArguments(NamedTuple):
    """The parts of a layout that FlashAttention needs.

    Attributes:
        key_index: rows of key and value that it reads; None for all.
        cu_seqlens_q, cu_seqlens_k: of the layout.
        max_q, max_k: the longest run of queries and of keys, as sizes.
        options: keyword arguments of torch's varlen attention but for the scale; None for the flash-attn package.
        causal: as for `tree_attention`.
    """

    key_index: torch.Tensor | None
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_q: torch.Tensor
    max_k: torch.Tensor
    options: dict | None
    causal: bool


class EagerArguments(NamedTuple):
    """The number of a living layout, (1,) int64 on the CPU."""

    handle: torch.Tensor
    causal: bool


Arguments = TritonArguments | VarlenArguments | EagerArguments


def attention_arguments(
    layout: TreeLayout, impl: str, dtype: torch.dtype, heads: int, key_heads: int, head_dim: int, *, causal: bool = True
) -> Arguments:
    """Return the arguments that `tree_attention_traced` needs of a layout.

    Args:
        layout: on the device of the queries; for `eager` it must live until the backward pass is done.
        impl: triton, varlen, flash_attn or eager.
        dtype, heads, key_heads, head_dim: of the queries, keys and values to come.
        causal: as for `tree_attention`.

    Raises:
        ValueError: for causal=False on a tree, or an unknown impl.
    """
    if not causal and not layout.is_flat:
        raise ValueError("causal=False: got a tree, wanted independent sequences (all parents -1)")
    if impl == "triton":
        single_rows = layout.query_rows is not None
        work = tiles.work_lists(layout, tiles.pick_blocks(dtype, head_dim, single_rows), causal)
        num_parts = work.key_tiles.parts_wanted(key_heads, heads // key_heads)
        return TritonArguments(work.tensors(), single_rows, _as_size(num_parts, layout.device))
    if impl in ("varlen", "flash_attn"):
        check_offsets(layout, heads, head_dim)
        longest = (_as_size(max(lengths), layout.device) for lengths in (layout.query_lengths, layout.key_lengths))
        options = varlen_options(heads, key_heads, None, causal) if impl == "varlen" else None
        return VarlenArguments(layout.key_index, layout.cu_seqlens_q, layout.cu_seqlens_k, *longest, options, causal)
    if impl != "eager":
        raise ValueError(f"impl: got {impl!r}, wanted triton, varlen, flash_attn or eager")
    return EagerArguments(handle_of(layout), causal)


def tree_attention_traced(query, key, value, arguments: Arguments, scale: float) -> torch.Tensor:
    """Compute `tree_attention` by what was made of its layout: (Tq, H, K), (T, Hkv, K), (T, Hkv, K) -> (Tq, H, K).

    It is traceable by torch.compile and checks nothing.
    """
    if isinstance(arguments, TritonArguments):
        num_parts = _number(arguments.num_parts)
        return tree_attention_forward(query, key, value, arguments.lists, arguments.single_rows, num_parts, scale)[0]
    if isinstance(arguments, EagerArguments):
        return eager_forward(query, key, value, arguments.handle, scale, arguments.causal)[0]
    key, value = take_rows(key, arguments.key_index), take_rows(value, arguments.key_index)
    inputs = (
        query.contiguous(), key.contiguous(), value.contiguous(), arguments.cu_seqlens_q, arguments.cu_seqlens_k,
        _number(arguments.max_q), _number(arguments.max_k),
    )  # fmt: skip
    if arguments.options is None:
        return flash_attn_forward(*inputs, scale, arguments.causal)[0]
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(*inputs, **{**arguments.options, "scale": scale})


def _as_size(number: int, device: torch.device) -> torch.Tensor:
    """Return a number as the size of a tensor without elements, plus two: graphs are never shared by sizes 0 and 1."""
    return torch.empty((number + 2, 0), device=device)


def _number(size: torch.Tensor) -> int:
    """Return the inverse of `_as_size`."""
    return size.shape[0] - 2
