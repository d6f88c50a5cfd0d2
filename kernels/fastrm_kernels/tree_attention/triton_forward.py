"""Forward pass of tree attention: online softmax over the steps of each query tile.

Head dimensions that are no power of two are split into two that are (80 = 64 + 16, 96 = 64 + 32), so
that nothing is padded: a tile of rows is then a pair of tiles, `x_a` and `x_b`, and `x_b` is skipped
where WIDTH_B is 0.
"""

import torch
import triton
import triton.language as tl

from fastrm_kernels.launch import launch
from fastrm_kernels.tree_attention.tiles import Blocks, TileList, WorkLists

LOG2_E = 1.4426950408889634


@triton.jit
def tile_pointers(base_ptr, start, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return (ROWS, WIDTH) pointers from row `start` on: 64 bits for the tile's place, 32 within the tile."""
    tile_ptr = base_ptr + start.to(tl.int64) * stride
    return tile_ptr + (tl.arange(0, ROWS) * stride)[:, None] + tl.arange(0, WIDTH)[None, :]


@triton.jit
def load_rows(base_ptr, start, end, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, BOUNDED: tl.constexpr):
    """Load a (ROWS, WIDTH) tile from row `start` on; rows from `end` on read as 0."""
    pointers = tile_pointers(base_ptr, start, stride, ROWS, WIDTH)
    if BOUNDED:
        return tl.load(pointers, mask=(start + tl.arange(0, ROWS) < end)[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit
def store_rows(base_ptr, start, end, stride, values, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Write rows start .. end - 1 of a (ROWS, WIDTH) tile in the tensor's own dtype."""
    pointers = tile_pointers(base_ptr, start, stride, ROWS, WIDTH)
    tl.store(pointers, values.to(base_ptr.dtype.element_ty), mask=(start + tl.arange(0, ROWS) < end)[:, None])


@triton.jit
def visible(rank, low, high):
    """Return the whole mask of a tree; `rank` and the two bounds are broadcast against each other."""
    return (low <= rank) & (rank < high)


@triton.jit
def load_bounds(key_bounds_ptr, rows, inside):
    """Load low and high of some keys; a key that is not `inside` is visible to nobody.

    Both come in one load of 64 bits. Triton gives each load the layout of the product's columns, in which a thread
    loads each of its 16 or more elements by an instruction of its own.
    """
    bounds = tl.load(key_bounds_ptr + rows, mask=inside, other=0)
    return bounds.to(tl.int32), (bounds >> 32).to(tl.int32)


@triton.jit
def attend_steps(
    acc_a, acc_b, row_max, row_sum, query_a, query_b, rank,
    key_ptr, value_ptr, key_bounds_ptr, steps_ptr, step_begin, step_end, scale_log2,
    key_stride, value_stride,
    WIDTH_A: tl.constexpr, WIDTH_B: tl.constexpr, STEP_ROWS: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Take the online softmax through some steps.

    Maxima and sums are of scores in units of log 2. The scores themselves are left as the product gives them: their
    scale (above 0, so that it keeps their order) and the subtraction of the maximum are then one instruction.
    """
    for step in range(step_begin, step_end):
        start = tl.load(steps_ptr + 2 * step)
        end = tl.load(steps_ptr + 2 * step + 1)
        rows = start + tl.arange(0, STEP_ROWS)
        key_a = load_rows(key_ptr, start, end, key_stride, STEP_ROWS, WIDTH_A, MASKED)
        scores = tl.dot(query_a, tl.trans(key_a), input_precision=PRECISION)
        if WIDTH_B > 0:
            key_b = load_rows(key_ptr + WIDTH_A, start, end, key_stride, STEP_ROWS, WIDTH_B, MASKED)
            scores = tl.dot(query_b, tl.trans(key_b), acc=scores, input_precision=PRECISION)
        if MASKED:
            low, high = load_bounds(key_bounds_ptr, rows, rows < end)
            scores = tl.where(visible(rank[:, None], low[None, :], high[None, :]), scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        # A row that has seen nothing yet: exp2(-inf - -inf) would be NaN.
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
        weights = tl.exp2(scores * scale_log2 - pivot[:, None])
        decay = tl.exp2(row_max - pivot)
        row_sum = row_sum * decay + tl.sum(weights, 1)
        row_max = new_max
        value_a = load_rows(value_ptr, start, end, value_stride, STEP_ROWS, WIDTH_A, MASKED)
        weights = weights.to(value_a.dtype)
        acc_a = tl.dot(weights, value_a, acc=acc_a * decay[:, None], input_precision=PRECISION)
        if WIDTH_B > 0:
            value_b = load_rows(value_ptr + WIDTH_A, start, end, value_stride, STEP_ROWS, WIDTH_B, MASKED)
            acc_b = tl.dot(weights, value_b, acc=acc_b * decay[:, None], input_precision=PRECISION)
    return acc_a, acc_b, row_max, row_sum


@triton.jit(do_not_specialize=["num_queries"])
def tree_attention_fwd_kernel(
    query_ptr, key_ptr, value_ptr, output_ptr, lse_ptr,
    query_rank_ptr, key_bounds_ptr, tiles_ptr, steps_ptr,
    num_queries, num_heads, group, scale_log2,
    query_stride, query_head_stride, key_stride, key_head_stride, value_stride, value_head_stride,
    output_stride, output_head_stride,
    WIDTH_A: tl.constexpr, WIDTH_B: tl.constexpr,
    TILE_ROWS: tl.constexpr, STEP_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one query tile of one head. Heads vary fastest, so that the long tiles all start first."""
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

    rows = tile_start + tl.arange(0, TILE_ROWS)
    inside = rows < tile_end
    rank = tl.load(query_rank_ptr + rows, mask=inside, other=-1)
    query_a = load_rows(query_ptr, tile_start, tile_end, query_stride, TILE_ROWS, WIDTH_A, True)
    query_b = query_a
    acc_a = tl.zeros((TILE_ROWS, WIDTH_A), tl.float32)
    acc_b = tl.zeros((TILE_ROWS, WIDTH_B if WIDTH_B > 0 else 1), tl.float32)
    if WIDTH_B > 0:
        query_b = load_rows(query_ptr + WIDTH_A, tile_start, tile_end, query_stride, TILE_ROWS, WIDTH_B, True)
    row_max = tl.full((TILE_ROWS,), float("-inf"), tl.float32)
    row_sum = tl.zeros((TILE_ROWS,), tl.float32)
    acc_a, acc_b, row_max, row_sum = attend_steps(
        acc_a, acc_b, row_max, row_sum, query_a, query_b, rank,
        key_ptr, value_ptr, key_bounds_ptr, steps_ptr, step_begin, step_masked, scale_log2,
        key_stride, value_stride, WIDTH_A, WIDTH_B, STEP_ROWS, False, PRECISION,
    )  # fmt: skip
    acc_a, acc_b, row_max, row_sum = attend_steps(
        acc_a, acc_b, row_max, row_sum, query_a, query_b, rank,
        key_ptr, value_ptr, key_bounds_ptr, steps_ptr, step_masked, step_end, scale_log2,
        key_stride, value_stride, WIDTH_A, WIDTH_B, STEP_ROWS, True, PRECISION,
    )  # fmt: skip

    # Rows past the tile's end have seen nothing; they are not stored, but must not divide by zero.
    total = tl.where(inside, row_sum, 1.0)
    tl.store(lse_ptr + head * num_queries + rows, row_max + tl.log2(total), mask=inside)
    output_ptr += head * output_head_stride
    store_rows(output_ptr, tile_start, tile_end, output_stride, acc_a / total[:, None], TILE_ROWS, WIDTH_A)
    if WIDTH_B > 0:
        acc_b /= total[:, None]
        store_rows(output_ptr + WIDTH_A, tile_start, tile_end, output_stride, acc_b, TILE_ROWS, WIDTH_B)


def split_width(width: int) -> tuple[int, int]:
    """Split a head dimension into the largest power of two in it and the rest: a power of two too, or 0."""
    largest = 1 << (width.bit_length() - 1)
    return largest, width - largest


def precision_of(dtype: torch.dtype) -> str:
    """Return the precision of a product in Triton's words.

    Float32 products are exact ones; Triton's default would round their operands to tf32.
    """
    return "ieee" if dtype == torch.float32 else "tf32"


def strides(name: str, tensor) -> dict[str, int]:
    """Return the arguments for the rows and heads of a (T, heads, K) tensor."""
    return {f"{name}_stride": tensor.stride(0), f"{name}_head_stride": tensor.stride(1)}


def shared_arguments(query, key, value, work: WorkLists, listed: TileList, scale: float) -> dict:
    """Return the arguments of all three kernels: inputs, mask, tiles with their steps, and constants.

    Raises:
        ValueError: for a scale that is not above 0.
    """
    if not scale > 0:
        raise ValueError(f"scale: got {scale}, wanted a number above 0 (impl='triton')")
    width_a, width_b = split_width(query.shape[-1])
    return {
        "query_ptr": query, "key_ptr": key, "value_ptr": value,
        "query_rank_ptr": work.query_rank, "key_bounds_ptr": work.key_bounds.view(torch.int64),
        "tiles_ptr": listed.tiles, "steps_ptr": listed.steps,
        "num_queries": query.shape[0], "scale_log2": scale * LOG2_E,
        **strides("query", query), **strides("key", key), **strides("value", value),
        "WIDTH_A": width_a, "WIDTH_B": width_b, "PRECISION": precision_of(query.dtype),
    }  # fmt: skip


def launch_tree_attention_fwd(query, key, value, output, lse, work: WorkLists, blocks: Blocks, scale: float) -> None:
    """Fill output (Tq, H, K) and lse (H, Tq) float32, the base-2 logarithm of each row's softmax sum."""
    num_heads, listed = query.shape[1], work.query_tiles
    launch(
        tree_attention_fwd_kernel, (num_heads * listed.tiles.shape[0],),
        num_warps=blocks.query_warps, num_stages=blocks.fwd_stages,
        **shared_arguments(query, key, value, work, listed, scale),
        output_ptr=output, lse_ptr=lse, **strides("output", output),
        num_heads=num_heads, group=num_heads // key.shape[1],
        TILE_ROWS=blocks.query_tile, STEP_ROWS=blocks.key_step,
    )  # fmt: skip
