"""The Triton kernels as operators of torch: autograd, torch.compile, meta tensors.

A layout's work lists travel as their tensors, because an operator takes tensors and numbers only.
"""

import torch

from fastrm_kernels.tree_attention import tiles
from fastrm_kernels.tree_attention.tiles import WorkLists


def tree_attention_triton(query, key, value, layout, *, scale=None, causal=True):
    """Compute `tree_attention` with the Triton kernels, under the same contract."""
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    single_rows = layout.query_rows is not None
    work = tiles.work_lists(layout, tiles.pick_blocks(query.dtype, query.shape[-1], single_rows), causal)
    num_parts = work.key_tiles.parts_wanted(key.shape[1], query.shape[1] // key.shape[1])
    output, _ = tree_attention_forward(query, key, value, work.tensors(), single_rows, num_parts, scale)
    return output


@torch.library.custom_op("fastrm::tree_attention", mutates_args=())
def tree_attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lists: list[torch.Tensor],
    single_rows: bool,
    num_parts: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output (Tq, H, K) in query's dtype and the base-2 log-sum-exp of each row, (H, Tq) float32."""
    from fastrm_kernels.tree_attention.triton_forward import launch_tree_attention_fwd

    query, key, value = _dense_columns(query, key, value)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)
    work, blocks = WorkLists.from_tensors(lists), tiles.pick_blocks(query.dtype, query.shape[-1], single_rows)
    launch_tree_attention_fwd(query, key, value, output, lse, work, blocks, scale)
    return output, lse


@tree_attention_forward.register_fake
def _(query, key, value, lists, single_rows, num_parts, scale):
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return output, query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)


@torch.library.custom_op("fastrm::tree_attention_backward", mutates_args=())
def tree_attention_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    upstream: torch.Tensor,
    lists: list[torch.Tensor],
    single_rows: bool,
    num_parts: int,
    scale: float,
    need_key_value: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return gradients of query, key and value; those of key and value are empty where not needed."""
    from fastrm_kernels.tree_attention.triton_backward import (
        launch_tree_attention_bwd_key_value,
        launch_tree_attention_bwd_query,
    )

    query, key, value, upstream = _dense_columns(query, key, value, upstream)
    query_grad = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    row_stats = lse.new_empty((*lse.shape, 2))
    work, blocks = WorkLists.from_tensors(lists), tiles.pick_blocks(query.dtype, query.shape[-1], single_rows)
    # It runs even if the query needs no gradient: the other kernel reads its statistics of rows.
    launch_tree_attention_bwd_query(
        query, key, value, output, upstream, lse, row_stats, query_grad, work, blocks, scale
    )
    if not need_key_value:
        return query_grad, query.new_empty(0), query.new_empty(0)
    # Parts are summed in float32 and in their order; a single part is the gradient itself.
    dtype = query.dtype if num_parts == 1 else torch.float32
    key_parts, value_parts = (torch.empty((num_parts, *x.shape), dtype=dtype, device=x.device) for x in (key, value))
    launch_tree_attention_bwd_key_value(
        query, key, value, upstream, row_stats, key_parts, value_parts, work, blocks, scale
    )
    if num_parts == 1:
        return query_grad, key_parts.view(key.shape), value_parts.view(value.shape)
    return query_grad, key_parts.sum(0).to(key.dtype), value_parts.sum(0).to(value.dtype)


@tree_attention_backward.register_fake
def _(query, key, value, output, lse, upstream, lists, single_rows, num_parts, scale, need_key_value):
    shapes = [query.shape, *(x.shape if need_key_value else (0,) for x in (key, value))]
    return tuple(query.new_empty(shape) for shape in shapes)


def _setup(ctx, inputs, output):
    query, key, value, lists, *ctx.settings = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, *lists)


def _backward(ctx, upstream, _):
    if upstream is None:
        return None, None, None, [None] * (len(ctx.saved_tensors) - 5), None, None, None
    query, key, value, output, lse, *lists = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    gradients = tree_attention_backward(
        query, key, value, output, lse, upstream, lists, *ctx.settings, needs[1] or needs[2]
    )
    kept = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
    return (*kept, [None] * len(lists), None, None, None)


tree_attention_forward.register_autograd(_backward, setup_context=_setup)


def _dense_columns(*tensors):
    """Copy tensors whose heads are not dense.

    The kernels step through rows and heads by any stride, but need the values of a head side by side.
    """
    return [x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in tensors]
