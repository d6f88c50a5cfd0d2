"""Backward pass of tree attention, without atomics: each gradient row is summed by one program.

With P the softmax and dP = dO V^T, dS = P * (dP - delta), where delta_i = sum_d dO_id O_id. Queries take
dQ = scale * dS K over their key steps; keys take dV = P^T dO and dK = scale * dS^T Q over their query steps and
over the query heads that share them, so dK and dV exist once per key/value head.
"""

import torch
import triton
import triton.language as tl

from fastrm_kernels.launch import launch
from fastrm_kernels.tree_attention.tiles import Blocks, WorkLists
from fastrm_kernels.tree_attention.triton_forward import (
    load_bounds,
    load_rows,
    shared_arguments,
    store_rows,
    strides,
    visible,
)


@triton.jit
def query_gradient_steps(
    acc_a, acc_b, query_a, query_b, upstream_a, upstream_b, rank, lse, delta,
    key_ptr, value_ptr, key_bounds_ptr, steps_ptr, step_begin, step_end, scale_log2,
    key_stride, value_stride,
    WIDTH_A: tl.constexpr, WIDTH_B: tl.constexpr, STEP_ROWS: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add dS K of some steps to the accumulators."""
    for step in range(step_begin, step_end):
        start = tl.load(steps_ptr + 2 * step)
        end = tl.load(steps_ptr + 2 * step + 1)
        rows = start + tl.arange(0, STEP_ROWS)
        key_a = load_rows(key_ptr, start, end, key_stride, STEP_ROWS, WIDTH_A, MASKED)
        value_a = load_rows(value_ptr, start, end, value_stride, STEP_ROWS, WIDTH_A, MASKED)
        scores = tl.dot(query_a, tl.trans(key_a), input_precision=PRECISION)
        slopes = tl.dot(upstream_a, tl.trans(value_a), input_precision=PRECISION)
        if WIDTH_B > 0:
            key_b = load_rows(key_ptr + WIDTH_A, start, end, key_stride, STEP_ROWS, WIDTH_B, MASKED)
            value_b = load_rows(value_ptr + WIDTH_A, start, end, value_stride, STEP_ROWS, WIDTH_B, MASKED)
            scores = tl.dot(query_b, tl.trans(key_b), acc=scores, input_precision=PRECISION)
            slopes = tl.dot(upstream_b, tl.trans(value_b), acc=slopes, input_precision=PRECISION)
        scores = scores * scale_log2 - lse[:, None]
        if MASKED:
            low, high = load_bounds(key_bounds_ptr, rows, rows < end)
            scores = tl.where(visible(rank[:, None], low[None, :], high[None, :]), scores, float("-inf"))
        weights = tl.exp2(scores)
        slopes = (weights * (slopes - delta[:, None])).to(key_a.dtype)
        acc_a = tl.dot(slopes, key_a, acc=acc_a, input_precision=PRECISION)
        if WIDTH_B > 0:
            acc_b = tl.dot(slopes, key_b, acc=acc_b, input_precision=PRECISION)
    return acc_a, acc_b


@triton.jit(do_not_specialize=["num_queries"])
def tree_attention_bwd_query_kernel(
    query_ptr, key_ptr, value_ptr, output_ptr, upstream_ptr, lse_ptr, row_stats_ptr, query_grad_ptr,
    query_rank_ptr, key_bounds_ptr, tiles_ptr, steps_ptr,
    num_queries, num_heads, group, scale, scale_log2,
    query_stride, query_head_stride, key_stride, key_head_stride, value_stride, value_head_stride,
    output_stride, output_head_stride, upstream_stride, upstream_head_stride,
    query_grad_stride, query_grad_head_stride,
    WIDTH_A: tl.constexpr, WIDTH_B: tl.constexpr,
    TILE_ROWS: tl.constexpr, STEP_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute row statistics and the query gradient of one query tile of one head."""
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    tile_ptr = tiles_ptr + 5 * (tl.program_id(0) // num_heads)
    tile_start = tl.load(tile_ptr)
    tile_end = tl.load(tile_ptr + 1)
    step_begin = tl.load(tile_ptr + 2)
    step_masked = tl.load(tile_ptr + 3)
    step_end = tl.load(tile_ptr + 4)
    query_ptr += head * query_head_stride
    key_ptr += head // group * key_head_stride
    value_ptr += head // group * value_head_stride
    output_ptr += head * output_head_stride
    upstream_ptr += head * upstream_head_stride
    query_grad_ptr += head * query_grad_head_stride

    rows = tile_start + tl.arange(0, TILE_ROWS)
    inside = rows < tile_end
    rank = tl.load(query_rank_ptr + rows, mask=inside, other=-1)
    # Rows past the tile's end get weights of exp2(-inf) = 0.
    lse = tl.load(lse_ptr + head * num_queries + rows, mask=inside, other=float("inf"))
    query_a = load_rows(query_ptr, tile_start, tile_end, query_stride, TILE_ROWS, WIDTH_A, True)
    upstream_a = load_rows(upstream_ptr, tile_start, tile_end, upstream_stride, TILE_ROWS, WIDTH_A, True)
    output_a = load_rows(output_ptr, tile_start, tile_end, output_stride, TILE_ROWS, WIDTH_A, True)
    delta = tl.sum(output_a.to(tl.float32) * upstream_a.to(tl.float32), 1)
    query_b = query_a
    upstream_b = upstream_a
    acc_a = tl.zeros((TILE_ROWS, WIDTH_A), tl.float32)
    acc_b = tl.zeros((TILE_ROWS, WIDTH_B if WIDTH_B > 0 else 1), tl.float32)
    if WIDTH_B > 0:
        query_b = load_rows(query_ptr + WIDTH_A, tile_start, tile_end, query_stride, TILE_ROWS, WIDTH_B, True)
        upstream_b = load_rows(upstream_ptr + WIDTH_A, tile_start, tile_end, upstream_stride, TILE_ROWS, WIDTH_B, True)
        output_b = load_rows(output_ptr + WIDTH_A, tile_start, tile_end, output_stride, TILE_ROWS, WIDTH_B, True)
        delta += tl.sum(output_b.to(tl.float32) * upstream_b.to(tl.float32), 1)
    pair_ptr = row_stats_ptr + 2 * (head * num_queries + rows)
    tl.store(pair_ptr, lse, mask=inside)
    tl.store(pair_ptr + 1, delta, mask=inside)
    acc_a, acc_b = query_gradient_steps(
        acc_a, acc_b, query_a, query_b, upstream_a, upstream_b, rank, lse, delta,
        key_ptr, value_ptr, key_bounds_ptr, steps_ptr, step_begin, step_masked, scale_log2,
        key_stride, value_stride, WIDTH_A, WIDTH_B, STEP_ROWS, False, PRECISION,
    )  # fmt: skip
    acc_a, acc_b = query_gradient_steps(
        acc_a, acc_b, query_a, query_b, upstream_a, upstream_b, rank, lse, delta,
        key_ptr, value_ptr, key_bounds_ptr, steps_ptr, step_masked, step_end, scale_log2,
        key_stride, value_stride, WIDTH_A, WIDTH_B, STEP_ROWS, True, PRECISION,
    )  # fmt: skip
    store_rows(query_grad_ptr, tile_start, tile_end, query_grad_stride, acc_a * scale, TILE_ROWS, WIDTH_A)
    if WIDTH_B > 0:
        store_rows(query_grad_ptr + WIDTH_A, tile_start, tile_end, query_grad_stride, acc_b * scale, TILE_ROWS, WIDTH_B)


@triton.jit
def load_stats(row_stats_ptr, rows, end, BOUNDED: tl.constexpr):
    """Load lse and delta of some queries, in one load of 64 bits; 0 for rows from `end` on, which see no key."""
    stats = tl.load(row_stats_ptr + rows, mask=rows < end, other=0) if BOUNDED else tl.load(row_stats_ptr + rows)
    return stats.to(tl.int32).to(tl.float32, bitcast=True), (stats >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def key_gradient_steps(
    key_acc_a, key_acc_b, value_acc_a, value_acc_b, key_a, key_b, value_a, value_b, low, high,
    query_ptr, upstream_ptr, row_stats_ptr, query_rank_ptr, steps_ptr, step_begin, step_end, scale_log2,
    query_stride, upstream_stride,
    WIDTH_A: tl.constexpr, WIDTH_B: tl.constexpr, STEP_ROWS: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add P^T dO and dS^T Q of some steps. Scores are transposed here: (keys, queries)."""
    for step in range(step_begin, step_end):
        start = tl.load(steps_ptr + 2 * step)
        end = tl.load(steps_ptr + 2 * step + 1)
        rows = start + tl.arange(0, STEP_ROWS)
        query_a = load_rows(query_ptr, start, end, query_stride, STEP_ROWS, WIDTH_A, MASKED)
        upstream_a = load_rows(upstream_ptr, start, end, upstream_stride, STEP_ROWS, WIDTH_A, MASKED)
        scores = tl.dot(key_a, tl.trans(query_a), input_precision=PRECISION)
        slopes = tl.dot(value_a, tl.trans(upstream_a), input_precision=PRECISION)
        if WIDTH_B > 0:
            query_b = load_rows(query_ptr + WIDTH_A, start, end, query_stride, STEP_ROWS, WIDTH_B, MASKED)
            upstream_b = load_rows(upstream_ptr + WIDTH_A, start, end, upstream_stride, STEP_ROWS, WIDTH_B, MASKED)
            scores = tl.dot(key_b, tl.trans(query_b), acc=scores, input_precision=PRECISION)
            slopes = tl.dot(value_b, tl.trans(upstream_b), acc=slopes, input_precision=PRECISION)
        lse, delta = load_stats(row_stats_ptr, rows, end, MASKED)
        scores = scores * scale_log2 - lse[None, :]
        if MASKED:
            rank = tl.load(query_rank_ptr + rows, mask=rows < end, other=-1)
            scores = tl.where(visible(rank[None, :], low[:, None], high[:, None]), scores, float("-inf"))
        weights = tl.exp2(scores)
        # Both are rounded before either product, so that their float32 tiles do not occupy registers during it.
        slopes = (weights * (slopes - delta[None, :])).to(query_a.dtype)
        weights = weights.to(upstream_a.dtype)
        value_acc_a = tl.dot(weights, upstream_a, acc=value_acc_a, input_precision=PRECISION)
        key_acc_a = tl.dot(slopes, query_a, acc=key_acc_a, input_precision=PRECISION)
        if WIDTH_B > 0:
            value_acc_b = tl.dot(weights, upstream_b, acc=value_acc_b, input_precision=PRECISION)
            key_acc_b = tl.dot(slopes, query_b, acc=key_acc_b, input_precision=PRECISION)
    return key_acc_a, key_acc_b, value_acc_a, value_acc_b


@triton.jit(do_not_specialize=["num_queries"])
def tree_attention_bwd_key_value_kernel(
    query_ptr, key_ptr, value_ptr, upstream_ptr, row_stats_ptr, key_grad_ptr, value_grad_ptr,
    query_rank_ptr, key_bounds_ptr, tiles_ptr, steps_ptr,
    num_queries, num_key_heads, num_parts, scale, scale_log2,
    query_stride, query_head_stride, key_stride, key_head_stride, value_stride, value_head_stride,
    upstream_stride, upstream_head_stride,
    key_grad_part_stride, key_grad_stride, key_grad_head_stride,
    value_grad_part_stride, value_grad_stride, value_grad_head_stride,
    MEMBERS: tl.constexpr, WIDTH_A: tl.constexpr, WIDTH_B: tl.constexpr,
    TILE_ROWS: tl.constexpr, STEP_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute gradients of one key tile of one key/value head, over MEMBERS query heads that see it.

    Where several programs share a key head, each writes a part of its own, (parts, T, Hkv, K).
    """
    part_heads = num_key_heads * num_parts
    key_head = (tl.program_id(0) % part_heads // num_parts).to(tl.int64)
    part = (tl.program_id(0) % num_parts).to(tl.int64)
    tile_ptr = tiles_ptr + 5 * (tl.program_id(0) // part_heads)
    tile_start = tl.load(tile_ptr)
    tile_end = tl.load(tile_ptr + 1)
    step_begin = tl.load(tile_ptr + 2)
    step_masked = tl.load(tile_ptr + 3)
    step_end = tl.load(tile_ptr + 4)
    key_ptr += key_head * key_head_stride
    value_ptr += key_head * value_head_stride

    rows = tile_start + tl.arange(0, TILE_ROWS)
    inside = rows < tile_end
    low, high = load_bounds(key_bounds_ptr, rows, inside)
    key_a = load_rows(key_ptr, tile_start, tile_end, key_stride, TILE_ROWS, WIDTH_A, True)
    value_a = load_rows(value_ptr, tile_start, tile_end, value_stride, TILE_ROWS, WIDTH_A, True)
    key_b = key_a
    value_b = value_a
    key_acc_a = tl.zeros((TILE_ROWS, WIDTH_A), tl.float32)
    value_acc_a = tl.zeros((TILE_ROWS, WIDTH_A), tl.float32)
    key_acc_b = tl.zeros((TILE_ROWS, WIDTH_B if WIDTH_B > 0 else 1), tl.float32)
    value_acc_b = tl.zeros((TILE_ROWS, WIDTH_B if WIDTH_B > 0 else 1), tl.float32)
    if WIDTH_B > 0:
        key_b = load_rows(key_ptr + WIDTH_A, tile_start, tile_end, key_stride, TILE_ROWS, WIDTH_B, True)
        value_b = load_rows(value_ptr + WIDTH_A, tile_start, tile_end, value_stride, TILE_ROWS, WIDTH_B, True)
    for member in range(MEMBERS):
        head = (key_head * num_parts + part) * MEMBERS + member
        key_acc_a, key_acc_b, value_acc_a, value_acc_b = key_gradient_steps(
            key_acc_a, key_acc_b, value_acc_a, value_acc_b, key_a, key_b, value_a, value_b, low, high,
            query_ptr + head * query_head_stride, upstream_ptr + head * upstream_head_stride,
            row_stats_ptr + head * num_queries, query_rank_ptr,
            steps_ptr, step_begin, step_masked, scale_log2, query_stride, upstream_stride,
            WIDTH_A, WIDTH_B, STEP_ROWS, False, PRECISION,
        )  # fmt: skip
        key_acc_a, key_acc_b, value_acc_a, value_acc_b = key_gradient_steps(
            key_acc_a, key_acc_b, value_acc_a, value_acc_b, key_a, key_b, value_a, value_b, low, high,
            query_ptr + head * query_head_stride, upstream_ptr + head * upstream_head_stride,
            row_stats_ptr + head * num_queries, query_rank_ptr,
            steps_ptr, step_masked, step_end, scale_log2, query_stride, upstream_stride,
            WIDTH_A, WIDTH_B, STEP_ROWS, True, PRECISION,
        )  # fmt: skip
    key_grad_ptr += part * key_grad_part_stride + key_head * key_grad_head_stride
    value_grad_ptr += part * value_grad_part_stride + key_head * value_grad_head_stride
    store_rows(key_grad_ptr, tile_start, tile_end, key_grad_stride, key_acc_a * scale, TILE_ROWS, WIDTH_A)
    store_rows(value_grad_ptr, tile_start, tile_end, value_grad_stride, value_acc_a, TILE_ROWS, WIDTH_A)
    if WIDTH_B > 0:
        key_acc_b *= scale
        store_rows(key_grad_ptr + WIDTH_A, tile_start, tile_end, key_grad_stride, key_acc_b, TILE_ROWS, WIDTH_B)
        store_rows(value_grad_ptr + WIDTH_A, tile_start, tile_end, value_grad_stride, value_acc_b, TILE_ROWS, WIDTH_B)


def launch_tree_attention_bwd_query(
    query, key, value, output, upstream, lse, row_stats, query_grad, work: WorkLists, blocks: Blocks, scale: float
) -> None:
    """Fill row_stats (H, Tq, 2) float32, lse and delta of each row, and query_grad (Tq, H, K)."""
    num_heads, listed = query.shape[1], work.query_tiles
    launch(
        tree_attention_bwd_query_kernel, (num_heads * listed.tiles.shape[0],),
        num_warps=blocks.query_warps, num_stages=blocks.query_stages,
        **shared_arguments(query, key, value, work, listed, scale),
        output_ptr=output, upstream_ptr=upstream, lse_ptr=lse, row_stats_ptr=row_stats, query_grad_ptr=query_grad,
        **strides("output", output), **strides("upstream", upstream), **strides("query_grad", query_grad),
        num_heads=num_heads, group=num_heads // key.shape[1], scale=scale,
        TILE_ROWS=blocks.query_tile, STEP_ROWS=blocks.key_step,
    )  # fmt: skip


def launch_tree_attention_bwd_key_value(
    query, key, value, upstream, row_stats, key_grad, value_grad, work: WorkLists, blocks: Blocks, scale: float
) -> None:
    """Fill key_grad and value_grad (P, T, Hkv, K), every row of them; P divides the query heads of a key head.

    The gradients are the sums over the P parts. row_stats is what `launch_tree_attention_bwd_query` has filled.
    """
    (num_parts, _, num_key_heads, _), listed = key_grad.shape, work.key_tiles
    launch(
        tree_attention_bwd_key_value_kernel, (num_parts * num_key_heads * listed.tiles.shape[0],),
        num_warps=blocks.key_warps, num_stages=blocks.key_stages,
        **shared_arguments(query, key, value, work, listed, scale),
        upstream_ptr=upstream, row_stats_ptr=row_stats.view(torch.int64), key_grad_ptr=key_grad,
        value_grad_ptr=value_grad,
        **strides("upstream", upstream), **strides("key_grad", key_grad[0]), **strides("value_grad", value_grad[0]),
        key_grad_part_stride=key_grad.stride(0), value_grad_part_stride=value_grad.stride(0),
        num_key_heads=num_key_heads, num_parts=num_parts, scale=scale,
        MEMBERS=query.shape[1] // (num_key_heads * num_parts),
        TILE_ROWS=blocks.key_tile, STEP_ROWS=blocks.query_step,
    )  # fmt: skip
