"""Tree attention inside torch.compile: what of a layout a graph needs, as tensors and numbers.

A compiled graph serves every pack, so the layout must come in through its arguments. The Triton
kernels and torch's varlen attention are operators that take tensors; their plans hold these. The
eager implementation walks Python lists: its operator gets a handle, a tensor with the number of a
layout that is alive, and looks the layout up when it runs.
"""

import itertools
import weakref
from typing import NamedTuple

import torch

from fastrm_kernels.tree_attention import tiles
from fastrm_kernels.tree_attention.autograd import tree_attention_forward
from fastrm_kernels.tree_attention.eager import bucket_inputs, tree_attention_eager
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

_numbers = itertools.count()
_layouts: weakref.WeakValueDictionary[int, TreeLayout] = weakref.WeakValueDictionary()


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
    number = next(_numbers)
    _layouts[number] = layout
    return EagerPlan(torch.tensor([number]), causal)


def tree_attention_planned(query, key, value, plan: Plan, scale: float) -> torch.Tensor:
    """`tree_attention` by a plan: (Tq, H, K), (T, Hkv, K), (T, Hkv, K) -> (Tq, H, K). Traceable, unchecked."""
    if isinstance(plan, TritonPlan):
        return tree_attention_forward(query, key, value, plan.lists, plan.single_rows, plan.num_parts, scale)[0]
    if isinstance(plan, EagerPlan):
        return _eager_forward(query, key, value, plan.handle, scale, plan.causal)
    from torch.nn.attention.varlen import varlen_attn

    if plan.key_index is not None:
        key, value = take_rows(key, plan.key_index), take_rows(value, plan.key_index)
    return varlen_attn(
        query.contiguous(), key.contiguous(), value.contiguous(), plan.cu_seqlens_q, plan.cu_seqlens_k,
        plan.max_q, plan.max_k, **{**plan.options, "scale": scale},
    )  # fmt: skip


def _layout(handle: torch.Tensor) -> TreeLayout:
    try:
        return _layouts[int(handle)]
    except KeyError:
        raise RuntimeError(
            "tree attention: the layout of this pass is gone; keep the pack's layouts until its backward pass is done"
        ) from None


@torch.library.custom_op("fastrm::tree_attention_eager", mutates_args=())
def _eager_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, handle: torch.Tensor, scale: float, causal: bool
) -> torch.Tensor:
    return tree_attention_eager(query, key, value, _layout(handle), scale=scale, causal=causal).contiguous()


@_eager_forward.register_fake
def _(query, key, value, handle, scale, causal):
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


@torch.library.custom_op("fastrm::tree_attention_eager_backward", mutates_args=())
def _eager_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    upstream: torch.Tensor,
    handle: torch.Tensor,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Autograd does not record inside an operator, so this is the formula, bucket by bucket, in float32.

    With P = softmax(scale Q K^T) and O = P V: dV = P^T dO, dS = P (dO V^T - rowsum(dO O)),
    dQ = scale dS K, dK = scale dS^T Q. P of one bucket is in memory at a time.
    """
    gradients = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (query, key, value)]
    heads, key_heads = query.shape[1], key.shape[1]
    for rows, keys, real, mask in bucket_inputs(_layout(handle), causal, query.dtype):
        # (B, Hkv, H / Hkv, q, K) and (B, Hkv, 1, k, K); padded queries get no gradient.
        q, o, do = (
            x[rows].float().unflatten(2, (key_heads, -1)).permute(0, 2, 3, 1, 4) for x in (query, output, upstream)
        )
        k, v = (x[keys].float().transpose(1, 2)[:, :, None] for x in (key, value))
        do = do * real[:, None, None, :, None]
        scores = scale * q @ k.mT
        p = (scores if mask is None else scores + mask[:, :, None].float()).softmax(-1)
        ds = p * (do @ v.mT - (do * o).sum(-1, keepdim=True))
        parts = (scale * ds @ k, scale * (ds.mT @ q).sum(2), (p.mT @ do).sum(2))
        gradients[0].index_add_(0, rows.flatten(), parts[0].permute(0, 3, 1, 2, 4).reshape(-1, heads, q.shape[-1]))
        for gradient, part in zip(gradients[1:], parts[1:], strict=True):
            gradient.index_add_(0, keys.flatten(), part.transpose(1, 2).flatten(0, 1))
    return tuple(gradient.to(query.dtype) for gradient in gradients)


@_eager_backward.register_fake
def _(query, key, value, output, upstream, handle, scale, causal):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))


def _setup(ctx, inputs, output):
    query, key, value, handle, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(query, key, value, output, handle)


def _backward(ctx, upstream):
    query, key, value, output, handle = ctx.saved_tensors
    gradients = _eager_backward(query, key, value, output, upstream, handle, ctx.scale, ctx.causal)
    return (*gradients, None, None, None)


_eager_forward.register_autograd(_backward, setup_context=_setup)
