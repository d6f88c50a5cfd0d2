"""Forward kernels of the two-layer head. Derivation, bytes and block sizes are in README.md."""

import torch
import triton
import triton.language as tl

from fastrm_kernels.launch import launch
from fastrm_kernels.preference_head.triton_loss import BLOCK_E, loss_and_slopes, loss_arguments
from fastrm_kernels.preference_head.triton_primitives import (
    OPERANDS,
    activate,
    activation_slope,
    addressable,
    contiguous,
    load_vector,
    round_up,
    row_offsets,
)


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def head_fwd_kernel(
    hidden_ptr, anchors_ptr, norm_ptr, weight_ptr, bias_ptr, out_weight_ptr,
    active_ptr, gains_ptr, rstd_ptr, reward_parts_ptr, slope_parts_ptr,
    num_rows, num_tokens, width, features, hidden_stride, weight_stride, eps,
    ACTIVATION: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    EVEN_WEIGHT: tl.constexpr, EVEN_HIDDEN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute features of block i for rows of block j in program (i, j), and their share of rewards and slopes.

    The norm's factor 1 / rms is constant along a row, so it multiplies the accumulators at the end; its
    sum of squares grows along with the product, in the same pass over the row.
    """
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    rows = row_offsets(anchors_ptr, offs_r, num_rows, num_tokens, hidden_stride)
    weight_rows = offs_f.to(tl.int64) * weight_stride
    pre = tl.zeros((BLOCK_F, BLOCK_R), tl.float32)
    squares = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, width, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        weight_ptrs = weight_ptr + weight_rows[:, None] + offs_d[None, :]
        if EVEN_WEIGHT:
            weight = tl.load(weight_ptrs)
        else:
            weight = tl.load(weight_ptrs, mask=(offs_f[:, None] < features) & (offs_d[None, :] < width), other=0.0)
        if EVEN_HIDDEN:
            x = tl.load(hidden_ptr + rows[None, :] + offs_d[:, None])
        else:
            x = tl.load(hidden_ptr + rows[None, :] + offs_d[:, None], mask=offs_d[:, None] < width, other=0.0)
        if norm_ptr is not None:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, 0)
            x = wide * load_vector(norm_ptr, offs_d, width)[:, None]
        pre = tl.dot(weight.to(OPERAND), x.to(OPERAND), pre, input_precision=PRECISION)
    if norm_ptr is not None:
        rstd = tl.rsqrt(squares / width + eps)
        pre *= rstd[None, :]
    live = offs_r < num_rows
    z = pre
    if bias_ptr is not None:
        z += load_vector(bias_ptr, offs_f, features)[:, None]
    out_weight = load_vector(out_weight_ptr, offs_f, features)[:, None]
    parts = tl.program_id(0).to(tl.int64) * num_rows + offs_r
    active = activate(z, ACTIVATION)
    tl.store(reward_parts_ptr + parts, tl.sum(active * out_weight, 0), mask=live)
    if gains_ptr is not None:
        gains = activation_slope(z, ACTIVATION) * out_weight
        place = offs_r[None, :].to(tl.int64) * features + offs_f[:, None]
        mask = (offs_f[:, None] < features) & live[None, :]
        tl.store(active_ptr + place, active, mask=mask)
        tl.store(gains_ptr + place, gains, mask=mask)
        if norm_ptr is not None:
            tl.store(slope_parts_ptr + parts, tl.sum(gains * pre, 0), mask=live)
            if tl.program_id(0) == 0:
                tl.store(rstd_ptr + offs_r, rstd, mask=live)


@triton.jit
def sum_parts(parts_ptr, offs_r, num_rows, num_parts, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr):
    """Sum the columns of (num_parts, num_rows) to (BLOCK_R,), always in the same order."""
    total = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    for start in range(0, num_parts, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask = (offs_p[:, None] < num_parts) & (offs_r[None, :] < num_rows)
        total += tl.load(parts_ptr + offs_p[:, None].to(tl.int64) * num_rows + offs_r[None, :], mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "num_parts", "num_edges"])
def head_finish_kernel(
    reward_parts_ptr, slope_parts_ptr, anchors_ptr, out_bias_ptr, rewards_ptr, slopes_ptr,
    num_rows, num_tokens, num_parts,
    edges_ptr, margin_ptr, weight_ptr, lengths_ptr, loss_ptr, loss_slopes_ptr, num_edges, smoothing, center,
    REDUCTION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Sum rewards from their parts; with edges, and then in a single program, compute also the loss."""
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = offs_r < num_rows
    rewards = sum_parts(reward_parts_ptr, offs_r, num_rows, num_parts, BLOCK_P, BLOCK_R)
    if out_bias_ptr is not None:
        rewards += tl.load(out_bias_ptr).to(tl.float32)
    if anchors_ptr is not None:
        anchors = tl.load(anchors_ptr + offs_r, mask=live, other=0)
        rewards = tl.where((anchors >= 0) & (anchors < num_tokens), rewards, float("nan"))
    tl.store(rewards_ptr + offs_r, rewards, mask=live)
    if slope_parts_ptr is not None:
        slopes = sum_parts(slope_parts_ptr, offs_r, num_rows, num_parts, BLOCK_P, BLOCK_R)
        tl.store(slopes_ptr + offs_r, slopes, mask=live)
    if edges_ptr is not None:
        # The edges read the rewards in any order, from memory: all must have been stored.
        tl.debug_barrier()
        loss, loss_slopes = loss_and_slopes(
            rewards_ptr, edges_ptr, margin_ptr, weight_ptr, lengths_ptr, offs_r, num_rows, num_edges,
            smoothing, center, REDUCTION, BLOCK_R, BLOCK_E,
        )  # fmt: skip
        tl.store(loss_slopes_ptr + offs_r, loss_slopes, mask=live)
        tl.store(loss_ptr, loss)


def forward_blocks(num_rows: int, itemsize: int) -> dict:
    """Return the block sizes of `head_fwd_kernel`; the reasons are in README.md."""
    few, some = num_rows <= 16, num_rows <= 64
    if itemsize == 4:
        # Without tensor cores a thread holds its operands for all of BLOCK_D in registers.
        rows, features, width, stages = (16, 16, 64, 6) if few else (64, 32, 16, 8) if some else (64, 64, 16, 4)
    else:
        rows, features, width, stages = (16, 16, 128, 8) if few else (64, 32, 64, 7) if some else (128, 64, 64, 4)
    return {
        "BLOCK_R": round_up(num_rows, 8, rows), "BLOCK_F": features, "BLOCK_D": width,
        "num_warps": 8 if itemsize == 2 and not some else 4, "num_stages": stages,
    }  # fmt: skip


def launch_reward_head_fwd(
    hidden, anchors, norm_weight, eps, weight, bias, out_weight, out_bias, activation, save, loss
):
    """Launch the forward pass of a two-layer head, with the loss if it is given and small enough.

    Args:
        hidden, anchors, norm_weight, weight, bias, out_weight, out_bias: as in api.py, layers unpacked.
        save: keep what the backward pass needs.
        loss: None, or (edges, margin, weight, lengths, label_smoothing, center, reduction). A single program
            then finishes, so rewards and edges should be few.

    Returns:
        (rewards (R,), active (R, F), gains (R, F), rstd (R,), slopes (R,), loss (), loss slopes (R,)), all
        float32: active is act(z), gains are d reward / d z = out_weight act'(z), slopes are
        sum_f gains_f (z_f - bias_f). What was not asked for is empty.
    """
    hidden, anchors = addressable(hidden, anchors)
    num_rows = hidden.shape[0] if anchors is None else anchors.shape[0]
    features, width = weight.shape
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    needs_slopes = save and norm_weight is not None
    # float16 ends at 65504, which hidden * norm_weight may pass before it is scaled by 1 / rms;
    # tfloat32 has the same 11 bits and the range of float32.
    stretched = norm_weight is not None and hidden.dtype == torch.float16
    operand = torch.float32 if stretched else hidden.dtype
    blocks = forward_blocks(num_rows, hidden.element_size())
    if stretched:
        blocks["BLOCK_D"] //= 2
    num_parts = triton.cdiv(features, blocks["BLOCK_F"])

    def empty(*shape):
        return torch.empty(shape, dtype=torch.float32, device=hidden.device)

    active, gains = (empty(num_rows if save else 0, features) for _ in range(2))
    rstd, slopes = (empty(num_rows if needs_slopes else 0) for _ in range(2))
    parts, slope_parts = empty(num_parts, num_rows), empty(num_parts, num_rows) if needs_slopes else None
    launch(
        head_fwd_kernel, (num_parts, triton.cdiv(num_rows, blocks["BLOCK_R"])),
        hidden_ptr=hidden, anchors_ptr=contiguous(anchors), norm_ptr=contiguous(norm_weight), weight_ptr=weight,
        bias_ptr=contiguous(bias), out_weight_ptr=contiguous(out_weight),
        active_ptr=active if save else None, gains_ptr=gains if save else None, rstd_ptr=rstd if needs_slopes else None,
        reward_parts_ptr=parts, slope_parts_ptr=slope_parts,
        num_rows=num_rows, num_tokens=hidden.shape[0], width=width, features=features,
        hidden_stride=hidden.stride(0), weight_stride=weight.stride(0), eps=eps,
        ACTIVATION=activation, OPERAND=OPERANDS[operand], PRECISION="tf32" if stretched else "ieee",
        EVEN_WEIGHT=features % blocks["BLOCK_F"] == 0 and width % blocks["BLOCK_D"] == 0,
        EVEN_HIDDEN=width % blocks["BLOCK_D"] == 0, **blocks,
    )  # fmt: skip
    rewards = empty(num_rows)
    outputs = _finish(parts, slope_parts, anchors, out_bias, rewards, slopes, hidden.shape[0], loss)
    return rewards, active, gains, rstd, slopes, *outputs


def _finish(parts, slope_parts, anchors, out_bias, rewards, slopes, num_tokens, loss):
    """Fill rewards and slopes from their parts; return (loss, loss slopes), both empty without a loss."""
    num_parts, num_rows = parts.shape
    value = parts.new_empty(() if loss else (0,))
    value_slopes = parts.new_empty(num_rows if loss else 0)
    names = ("edges_ptr", "margin_ptr", "weight_ptr", "lengths_ptr")
    absent = {**dict.fromkeys(names), "smoothing": 0.0, "center": 0.0, "REDUCTION": "mean"}
    arguments = loss_arguments(*loss) if loss else absent
    block = round_up(num_rows, 16, max(16, triton.next_power_of_2(num_rows)) if loss else 64)
    # Parts are read as many at once as possible: one by one would pay the memory's latency each time.
    block_p = round_up(num_parts, 16, max(32, 4096 // block))
    launch(
        head_finish_kernel, (max(1, triton.cdiv(num_rows, block)) if loss else triton.cdiv(num_rows, block),),
        reward_parts_ptr=parts, slope_parts_ptr=slope_parts, anchors_ptr=contiguous(anchors), out_bias_ptr=out_bias,
        rewards_ptr=rewards, slopes_ptr=slopes if slope_parts is not None else None,
        num_rows=num_rows, num_tokens=num_tokens, num_parts=num_parts,
        loss_ptr=value if loss else None, loss_slopes_ptr=value_slopes if loss else None,
        num_edges=loss[0].shape[0] if loss else 0, **arguments,
        BLOCK_P=block_p, BLOCK_R=block, BLOCK_E=BLOCK_E, num_warps=8 if block > 64 else 4, num_stages=2,
    )  # fmt: skip
    return value, value_slopes
