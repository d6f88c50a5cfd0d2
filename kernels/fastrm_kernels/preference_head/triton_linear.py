"""Kernels of the one-layer head, a plain Linear(D, 1): one pass over the rows in each direction.

With n = h rstd and x = g n (or x = h without a norm), u = d loss / d rewards:

    r = w x + b,   dx = u w,   dw_d = sum_r u x = g_d S_d,   dg_d = w_d S_d,   S_d = sum_r u n_d

so that one column sum S gives both gradients. All of it is exact float32 on CUDA cores: 2 R D operations
for R D elements read are far below what a GPU can do while it reads.
"""

import torch
import triton
import triton.language as tl

from fastrm_kernels.launch import launch
from fastrm_kernels.preference_head.triton_primitives import (
    addressable,
    contiguous,
    load_vector,
    round_up,
    row_offsets,
)

# Row blocks of the backward pass, each with its own partial column sums.
MAX_PARTS = 64


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def linear_head_fwd_kernel(
    hidden_ptr, anchors_ptr, norm_ptr, weight_ptr, bias_ptr, rewards_ptr, dots_ptr, rstd_ptr,
    num_rows, num_tokens, width, hidden_stride, eps,
    EVEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute rewards of BLOCK_R rows; with dots_ptr also their products without bias, for the backward pass."""
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = offs_r < num_rows
    rows = row_offsets(anchors_ptr, offs_r, num_rows, num_tokens, hidden_stride)
    products = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    squares = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, width, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        ptrs = hidden_ptr + rows[:, None] + offs_d[None, :]
        if EVEN:
            x = tl.load(ptrs).to(tl.float32)
        else:
            x = tl.load(ptrs, mask=offs_d[None, :] < width, other=0.0).to(tl.float32)
        weight = load_vector(weight_ptr, offs_d, width)
        if norm_ptr is not None:
            squares += x * x
            weight *= load_vector(norm_ptr, offs_d, width)
        products += x * weight[None, :]
    dots = tl.sum(products, 1)
    if norm_ptr is not None:
        rstd = tl.rsqrt(tl.sum(squares, 1) / width + eps)
        dots *= rstd
        if rstd_ptr is not None:
            tl.store(rstd_ptr + offs_r, rstd, mask=live)
            tl.store(dots_ptr + offs_r, dots, mask=live)
    rewards = dots
    if bias_ptr is not None:
        rewards += tl.load(bias_ptr).to(tl.float32)
    if anchors_ptr is not None:
        anchors = tl.load(anchors_ptr + offs_r, mask=live, other=0)
        rewards = tl.where((anchors >= 0) & (anchors < num_tokens), rewards, float("nan"))
    tl.store(rewards_ptr + offs_r, rewards, mask=live)


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "rows_per_part"])
def linear_head_bwd_kernel(
    hidden_ptr, anchors_ptr, norm_ptr, weight_ptr, dots_ptr, rstd_ptr, grad_ptr, grad_rows_ptr, parts_ptr,
    num_rows, num_tokens, width, hidden_stride, grad_stride, rows_per_part,
    EVEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute row gradients of part j of the rows, columns of block i, and the part's S in program (i, j)."""
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = tl.program_id(1) * rows_per_part
    end = tl.minimum(begin + rows_per_part, num_rows)
    weight = load_vector(weight_ptr, offs_d, width)[None, :]
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)
        rows = row_offsets(anchors_ptr, offs_r, end, num_tokens, hidden_stride)
        u = tl.load(grad_ptr + offs_r.to(tl.int64) * grad_stride, mask=offs_r < end, other=0.0)[:, None]
        ptrs = hidden_ptr + rows[:, None] + offs_d[None, :]
        if EVEN:
            n = tl.load(ptrs).to(tl.float32)
        else:
            n = tl.load(ptrs, mask=offs_d[None, :] < width, other=0.0).to(tl.float32)
        grad_x = u * weight
        if norm_ptr is not None:
            rstd = load_vector(rstd_ptr, offs_r, end)[:, None]
            n *= rstd
            # The mean over the row of g dx n is u (w x) / D, and w x was saved.
            mean = u * load_vector(dots_ptr, offs_r, end)[:, None] / width
            grad_x = rstd * (grad_x * load_vector(norm_ptr, offs_d, width)[None, :] - n * mean)
        total += u * n
        if grad_rows_ptr is not None:
            out = grad_rows_ptr + offs_r[:, None].to(tl.int64) * width + offs_d[None, :]
            inside = (offs_r[:, None] < end) & (offs_d[None, :] < width)
            tl.store(out, grad_x.to(grad_rows_ptr.dtype.element_ty), mask=inside)
    if parts_ptr is not None:
        part = parts_ptr + tl.program_id(1).to(tl.int64) * width + offs_d
        tl.store(part, tl.sum(total, 0), mask=offs_d < width)


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def linear_head_sum_kernel(
    parts_ptr, norm_ptr, weight_ptr, grad_ptr, grad_norm_ptr, grad_weight_ptr, grad_bias_ptr,
    num_parts, num_rows, width, grad_stride,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum the parts of S in their order to the gradients of weight and norm weight; program 0 also the bias's."""
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = offs_d < width
    if grad_weight_ptr is not None or grad_norm_ptr is not None:
        sums = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
        for start in range(0, num_parts, BLOCK_P):
            offs_p = start + tl.arange(0, BLOCK_P)
            mask = (offs_p[:, None] < num_parts) & inside[None, :]
            sums += tl.load(parts_ptr + offs_p[:, None] * width + offs_d[None, :], mask=mask, other=0.0)
        total = tl.sum(sums, 0)
        if grad_weight_ptr is not None:
            grad_weight = total
            if norm_ptr is not None:
                grad_weight *= load_vector(norm_ptr, offs_d, width)
            tl.store(grad_weight_ptr + offs_d, grad_weight.to(grad_weight_ptr.dtype.element_ty), mask=inside)
        if grad_norm_ptr is not None:
            grad_norm = total * load_vector(weight_ptr, offs_d, width)
            tl.store(grad_norm_ptr + offs_d, grad_norm.to(grad_norm_ptr.dtype.element_ty), mask=inside)
    if grad_bias_ptr is not None and tl.program_id(0) == 0:
        grad_bias = tl.zeros((BLOCK_R,), tl.float32)
        for start in range(0, num_rows, BLOCK_R):
            offs_r = start + tl.arange(0, BLOCK_R)
            grad_bias += tl.load(grad_ptr + offs_r.to(tl.int64) * grad_stride, mask=offs_r < num_rows, other=0.0)
        tl.store(grad_bias_ptr, tl.sum(grad_bias, 0).to(grad_bias_ptr.dtype.element_ty))


def launch_linear_head_fwd(hidden, anchors, norm_weight, eps, weight, bias, save):
    """Return float32 (rewards (R,), dots (R,), rstd (R,)); the last two are empty unless `save` and a norm."""
    hidden, anchors = addressable(hidden, anchors)
    num_rows = hidden.shape[0] if anchors is None else anchors.shape[0]
    width, keep = hidden.shape[1], save and norm_weight is not None
    rewards = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    dots, rstd = (rewards.new_empty(num_rows if keep else 0) for _ in range(2))
    # Up to a few rows per multiprocessor latency counts, so a program takes one; then four, to share weights.
    block_r, block_d = (1, round_up(width, 16, 1024)) if num_rows <= 512 else (4, round_up(width, 16, 512))
    launch(
        linear_head_fwd_kernel, (triton.cdiv(num_rows, block_r),),
        hidden_ptr=hidden, anchors_ptr=contiguous(anchors), norm_ptr=contiguous(norm_weight),
        weight_ptr=contiguous(weight), bias_ptr=bias,
        rewards_ptr=rewards, dots_ptr=dots if keep else None, rstd_ptr=rstd if keep else None,
        num_rows=num_rows, num_tokens=hidden.shape[0], width=width, hidden_stride=hidden.stride(0), eps=eps,
        EVEN=width % block_d == 0, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=4, num_stages=3,
    )  # fmt: skip
    return rewards, dots, rstd


def launch_linear_head_bwd(grad_rewards, hidden, anchors, norm_weight, weight, bias, dots, rstd, needs):
    """Return gradients of [rows (R, D), norm_weight, weight, bias]; empty where not wanted or not a parameter."""
    hidden, anchors = addressable(hidden, anchors)
    num_rows, width = grad_rewards.shape[0], hidden.shape[1]
    wanted = [(hidden, (num_rows, width)), *((p, () if p is None else p.shape) for p in (norm_weight, weight, bias))]
    needs = [need and parameter is not None for need, (parameter, _) in zip(needs, wanted, strict=True)]
    new = torch.empty if num_rows > 0 else torch.zeros
    grads = [
        new(shape, dtype=p.dtype, device=p.device) if need else hidden.new_empty(0)
        for need, (p, shape) in zip(needs, wanted, strict=True)
    ]
    if num_rows == 0 or not any(needs):
        return grads
    rows, norm, out, out_bias = (grad if need else None for need, grad in zip(needs, grads, strict=True))
    block_r, block_d = 4, round_up(width, 16, 256)
    num_parts = min(MAX_PARTS, triton.cdiv(num_rows, block_r))
    rows_per_part = triton.cdiv(triton.cdiv(num_rows, num_parts), block_r) * block_r
    num_parts = triton.cdiv(num_rows, rows_per_part)
    parts = None
    if norm is not None or out is not None:
        parts = torch.empty(num_parts, width, dtype=torch.float32, device=hidden.device)
    shared = {
        "norm_ptr": contiguous(norm_weight), "weight_ptr": contiguous(weight), "grad_ptr": grad_rewards,
        "parts_ptr": parts, "num_rows": num_rows, "width": width, "grad_stride": grad_rewards.stride(0),
        "BLOCK_D": block_d,
    }  # fmt: skip
    if rows is not None or parts is not None:
        launch(
            linear_head_bwd_kernel, (triton.cdiv(width, block_d), num_parts), **shared,
            hidden_ptr=hidden, anchors_ptr=contiguous(anchors), grad_rows_ptr=rows,
            dots_ptr=None if norm_weight is None else dots, rstd_ptr=None if norm_weight is None else rstd,
            num_tokens=hidden.shape[0], hidden_stride=hidden.stride(0), rows_per_part=rows_per_part,
            EVEN=width % block_d == 0, BLOCK_R=block_r, num_warps=4, num_stages=3,
        )  # fmt: skip
    if parts is not None or out_bias is not None:
        launch(
            linear_head_sum_kernel, (triton.cdiv(width, block_d),), **shared,
            grad_norm_ptr=norm, grad_weight_ptr=out, grad_bias_ptr=out_bias, num_parts=num_parts,
            BLOCK_P=8, BLOCK_R=256, num_warps=4, num_stages=2,
        )  # fmt: skip
    return grads
