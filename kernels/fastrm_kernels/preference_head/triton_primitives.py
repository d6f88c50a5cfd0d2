"""Device functions that the forward and the backward kernels share, and how launches are described.

Tiles lie as (features, rows) or (columns, rows): the weights are the tall operand of every product,
the few rows the narrow one.
"""

import torch
import triton
import triton.language as tl

OPERANDS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def round_up(size: int, low: int, high: int) -> int:
    """Return the power of two >= size within [low, high]."""
    return min(high, max(low, triton.next_power_of_2(size)))


def addressable(hidden, anchors):
    """Return (hidden, anchors) with unit column stride; other layouts are gathered to (R, D) first."""
    if hidden.stride(1) == 1 or hidden.shape[1] == 1:
        return hidden, anchors
    rows = hidden if anchors is None else hidden.index_select(0, anchors)
    return rows.contiguous(), None


def contiguous(tensor):
    return None if tensor is None else tensor.contiguous()


@triton.jit
def row_offsets(anchors_ptr, offs_r, num_rows, num_tokens, stride):
    """Return the int64 offsets (BLOCK_R,) of rows: T * D passes 2^31 at 600,000 tokens of 3,584.

    Rows past the last one repeat it, for products with a 0 from elsewhere: no other row would do, since
    0 * NaN is NaN, and a row that no anchor names may hold anything. num_rows must be at least 1. Anchors
    out of range read row 0; their rewards become NaN.
    """
    near = tl.minimum(offs_r, num_rows - 1)
    row = near.to(tl.int64)
    if anchors_ptr is not None:
        row = tl.load(anchors_ptr + near)
        row = tl.where((row >= 0) & (row < num_tokens), row, 0)
    return row * stride


@triton.jit
def tanh(x):
    """Compute tanh within 5 eps in float32, with a GPU's approximate exp and division too.

    1 - 2 / (e^2x + 1) would cancel near 0, so that an odd polynomial takes over there.
    """
    size = tl.abs(x)
    square = x * x
    # Cephes tanhf, for |x| < 0.625.
    p = -5.70498872745e-3
    p = p * square + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    near = x + x * square * p
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(size, 20.0)) + 1.0)
    return tl.where(size < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "tanh":
        out = tanh(z)
    elif ACTIVATION == "relu":
        out = tl.maximum(z, 0.0)
    elif ACTIVATION == "silu":
        out = z * sigmoid(z)
    else:
        out = z
    return out


@triton.jit
def activation_slope(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "tanh":
        t = tanh(z)
        slope = 1.0 - t * t
    elif ACTIVATION == "relu":
        slope = tl.where(z > 0, 1.0, 0.0)
    elif ACTIVATION == "silu":
        s = sigmoid(z)
        slope = s * (1.0 + z * (1.0 - s))
    else:
        slope = tl.full(z.shape, 1.0, tl.float32)
    return slope


@triton.jit
def load_vector(ptr, offsets, limit):
    """Load float32 values, 0 beyond `limit`."""
    return tl.load(ptr + offsets, mask=offsets < limit, other=0.0).to(tl.float32)


@triton.jit
def load_saved(ptr, offs_f, offs_r, features, num_rows, EVEN: tl.constexpr):
    """Load (BLOCK_F, BLOCK_R) of a saved (R, F) tensor, 0 beyond it."""
    ptrs = ptr + offs_r[None, :].to(tl.int64) * features + offs_f[:, None]
    if EVEN:
        saved = tl.load(ptrs)
    else:
        saved = tl.load(ptrs, mask=(offs_f[:, None] < features) & (offs_r[None, :] < num_rows), other=0.0)
    return saved
