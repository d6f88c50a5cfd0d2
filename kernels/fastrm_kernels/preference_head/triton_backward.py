"""Backward kernels of the two-layer head. Derivation, bytes and block sizes are in README.md.

With u = d loss / d rewards and the saved gains = d reward / d z = out_weight act'(z), dz = gains u and

    d weight = dz x,   d x = dz^T weight,   d bias = sum_r dz,   d out_weight = sum_r u act(z)

dz is never stored: every program makes the part that it needs, one product per element.
"""

import torch
import triton
import triton.language as tl

from fastrm_kernels.launch import launch
from fastrm_kernels.preference_head.triton_primitives import (
    OPERANDS,
    addressable,
    contiguous,
    load_saved,
    load_vector,
    round_up,
    row_offsets,
)

# One launch does everything up to here; beyond, rows are cut into blocks and a product gets its own launch.
ONE_LAUNCH_ROWS = 64
# Elements of a tile of the small vectors' gradients in that launch; a head of few columns and many features
# has few programs to share them out among, and they get a launch of their own.
MAX_VECTOR_TILE = 4096

VECTORS = ("grad_bias_ptr", "grad_out_weight_ptr", "grad_out_bias_ptr")


@triton.jit
def upstream(grad_loss_ptr, loss_slopes_ptr, grad_rewards_ptr, grad_stride, offs_r, num_rows):
    """Return u (BLOCK_R,), the gradient of the rewards: through the loss plus directly."""
    live = offs_r < num_rows
    total = tl.zeros(offs_r.shape, tl.float32)
    if grad_loss_ptr is not None:
        total += tl.load(grad_loss_ptr) * tl.load(loss_slopes_ptr + offs_r, mask=live, other=0.0)
    if grad_rewards_ptr is not None:
        total += tl.load(grad_rewards_ptr + offs_r.to(tl.int64) * grad_stride, mask=live, other=0.0)
    return total


@triton.jit
def load_states(hidden_ptr, rows, offs_d, width, EVEN: tl.constexpr):
    ptrs = hidden_ptr + rows[:, None] + offs_d[None, :]
    return tl.load(ptrs) if EVEN else tl.load(ptrs, mask=offs_d[None, :] < width, other=0.0)


@triton.jit
def normalize(states, norm_ptr, rstd_ptr, offs_r, offs_d, num_rows, width):
    """Return x (BLOCK_R, BLOCK_D), float32: the states after the norm, if there is one."""
    x = states.to(tl.float32)
    if norm_ptr is not None:
        x *= load_vector(rstd_ptr, offs_r, num_rows)[:, None] * load_vector(norm_ptr, offs_d, width)[None, :]
    return x


@triton.jit
def load_weights(weight_ptr, offs_f, offs_d, features, width, stride, EVEN: tl.constexpr):
    """Load weights, transposed: (BLOCK_D, BLOCK_F)."""
    ptrs = weight_ptr + offs_f[None, :].to(tl.int64) * stride + offs_d[:, None]
    if EVEN:
        weight = tl.load(ptrs)
    else:
        weight = tl.load(ptrs, mask=(offs_f[None, :] < features) & (offs_d[:, None] < width), other=0.0)
    return weight


@triton.jit
def store_rows(
    grad_x, hidden_ptr, rows, norm_ptr, rstd_ptr, slopes_ptr, u, grad_rows_ptr, norm_parts_ptr,
    offs_d, offs_r, num_rows, width,
):  # fmt: skip
    """Apply the norm's backward to grad_x (BLOCK_D, BLOCK_R); store row gradients and the norm weight's part.

    With n = h rstd and x = g n:  d h = rstd (g dx - n mean_d(g dx n)),  d g = sum_r dx n,  and the mean
    needs no pass over the row: sum_d dx x = sum_f dz (z - bias) = u * slope, which the forward pass has saved.
    """
    inside = (offs_d[:, None] < width) & (offs_r[None, :] < num_rows)
    if norm_ptr is not None:
        h = tl.load(hidden_ptr + rows[None, :] + offs_d[:, None], mask=inside, other=0.0).to(tl.float32)
        rstd = load_vector(rstd_ptr, offs_r, num_rows)[None, :]
        n = h * rstd
        if norm_parts_ptr is not None:
            part = norm_parts_ptr + tl.program_id(1).to(tl.int64) * width + offs_d
            tl.store(part, tl.sum(grad_x * n, 1).to(norm_parts_ptr.dtype.element_ty), mask=offs_d < width)
        mean = u * load_vector(slopes_ptr, offs_r, num_rows) / width
        grad_x = rstd * (grad_x * load_vector(norm_ptr, offs_d, width)[:, None] - n * mean[None, :])
    if grad_rows_ptr is not None:
        ptrs = grad_rows_ptr + offs_r[None, :].to(tl.int64) * width + offs_d[:, None]
        tl.store(ptrs, grad_x.to(grad_rows_ptr.dtype.element_ty), mask=inside)


@triton.jit
def vector_gradients(
    active_ptr, gains_ptr, grad_loss_ptr, loss_slopes_ptr, grad_rewards_ptr, grad_stride,
    grad_bias_ptr, grad_out_weight_ptr, grad_out_bias_ptr, num_rows, features, offs_f,
    BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Store gradients of the first bias and last weight for BLOCK_F features; program 0 also of the last bias."""
    grad_bias = tl.zeros((BLOCK_F,), tl.float32)
    grad_out_weight = tl.zeros((BLOCK_F,), tl.float32)
    grad_out_bias = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, num_rows, BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)
        u = upstream(grad_loss_ptr, loss_slopes_ptr, grad_rewards_ptr, grad_stride, offs_r, num_rows)
        grad_bias += tl.sum(load_saved(gains_ptr, offs_f, offs_r, features, num_rows, False) * u[None, :], 1)
        grad_out_weight += tl.sum(load_saved(active_ptr, offs_f, offs_r, features, num_rows, False) * u[None, :], 1)
        grad_out_bias += u
    inside = offs_f < features
    if grad_bias_ptr is not None:
        tl.store(grad_bias_ptr + offs_f, grad_bias.to(grad_bias_ptr.dtype.element_ty), mask=inside)
    if grad_out_weight_ptr is not None:
        tl.store(grad_out_weight_ptr + offs_f, grad_out_weight.to(grad_out_weight_ptr.dtype.element_ty), mask=inside)
    if grad_out_bias_ptr is not None and tl.program_id(0) == 0:
        tl.store(grad_out_bias_ptr, tl.sum(grad_out_bias, 0).to(grad_out_bias_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def head_bwd_kernel(
    hidden_ptr, anchors_ptr, norm_ptr, weight_ptr, active_ptr, gains_ptr, rstd_ptr, slopes_ptr,
    grad_loss_ptr, loss_slopes_ptr, grad_rewards_ptr, grad_rows_ptr, norm_parts_ptr, grad_weight_ptr,
    grad_bias_ptr, grad_out_weight_ptr, grad_out_bias_ptr,
    num_rows, num_tokens, width, features, hidden_stride, weight_stride, grad_stride,
    OPERAND: tl.constexpr, EVEN_WIDTH: tl.constexpr, EVEN_FEATURES: tl.constexpr,
    EVEN_ROWS: tl.constexpr, NEEDS_ROWS: tl.constexpr, NEEDS_VECTORS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Compute all gradients for at most BLOCK_R rows: program i has columns [i BLOCK_D, (i + 1) BLOCK_D).

    A weight tile is read once, for d x, and the tile of d weight at the same place is written once. The
    small vectors are shared out among the programs, BLOCK_V features each.
    """
    offs_r = tl.arange(0, BLOCK_R)
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = row_offsets(anchors_ptr, offs_r, num_rows, num_tokens, hidden_stride)
    u = upstream(grad_loss_ptr, loss_slopes_ptr, grad_rewards_ptr, grad_stride, offs_r, num_rows)
    if grad_weight_ptr is not None:
        states = load_states(hidden_ptr, rows, offs_d, width, EVEN_WIDTH)
        x = normalize(states, norm_ptr, rstd_ptr, offs_r, offs_d, num_rows, width).to(OPERAND)
    grad_x = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    for start in range(0, features, BLOCK_F):
        offs_f = start + tl.arange(0, BLOCK_F)
        gains = load_saved(gains_ptr, offs_f, offs_r, features, num_rows, EVEN_FEATURES and EVEN_ROWS)
        dz = (gains * u[None, :]).to(OPERAND)
        if NEEDS_ROWS:
            weight = load_weights(
                weight_ptr, offs_f, offs_d, features, width, weight_stride, EVEN_FEATURES and EVEN_WIDTH
            )
            grad_x = tl.dot(weight.to(OPERAND), dz, grad_x, input_precision="ieee")
        if grad_weight_ptr is not None:
            grad_weight = tl.dot(dz, x, input_precision="ieee").to(grad_weight_ptr.dtype.element_ty)
            ptrs = grad_weight_ptr + offs_f[:, None].to(tl.int64) * width + offs_d[None, :]
            if EVEN_FEATURES and EVEN_WIDTH:
                tl.store(ptrs, grad_weight)
            else:
                tl.store(ptrs, grad_weight, mask=(offs_f[:, None] < features) & (offs_d[None, :] < width))
    if NEEDS_ROWS:
        store_rows(
            grad_x, hidden_ptr, rows, norm_ptr, rstd_ptr, slopes_ptr, u, grad_rows_ptr, norm_parts_ptr,
            offs_d, offs_r, num_rows, width,
        )  # fmt: skip
    if NEEDS_VECTORS:
        vector_gradients(
            active_ptr, gains_ptr, grad_loss_ptr, loss_slopes_ptr, grad_rewards_ptr, grad_stride,
            grad_bias_ptr, grad_out_weight_ptr, grad_out_bias_ptr, num_rows, features,
            tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V), BLOCK_V, BLOCK_R,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def head_bwd_input_kernel(
    hidden_ptr, anchors_ptr, norm_ptr, weight_ptr, gains_ptr, rstd_ptr, slopes_ptr,
    grad_loss_ptr, loss_slopes_ptr, grad_rewards_ptr, grad_rows_ptr, norm_parts_ptr,
    num_rows, num_tokens, width, features, hidden_stride, weight_stride, grad_stride,
    OPERAND: tl.constexpr, EVEN_WIDTH: tl.constexpr, EVEN_FEATURES: tl.constexpr,
    EVEN_ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute gradients of the rows: program (i, j) has columns of block i and rows of block j."""
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    u = upstream(grad_loss_ptr, loss_slopes_ptr, grad_rewards_ptr, grad_stride, offs_r, num_rows)
    grad_x = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    for start in range(0, features, BLOCK_F):
        offs_f = start + tl.arange(0, BLOCK_F)
        gains = load_saved(gains_ptr, offs_f, offs_r, features, num_rows, EVEN_FEATURES and EVEN_ROWS)
        dz = (gains * u[None, :]).to(OPERAND)
        weight = load_weights(weight_ptr, offs_f, offs_d, features, width, weight_stride, EVEN_FEATURES and EVEN_WIDTH)
        grad_x = tl.dot(weight.to(OPERAND), dz, grad_x, input_precision="ieee")
    rows = row_offsets(anchors_ptr, offs_r, num_rows, num_tokens, hidden_stride)
    store_rows(
        grad_x, hidden_ptr, rows, norm_ptr, rstd_ptr, slopes_ptr, u, grad_rows_ptr, norm_parts_ptr,
        offs_d, offs_r, num_rows, width,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def head_bwd_weight_kernel(
    hidden_ptr, anchors_ptr, norm_ptr, gains_ptr, rstd_ptr,
    grad_loss_ptr, loss_slopes_ptr, grad_rewards_ptr, grad_weight_ptr,
    num_rows, num_tokens, width, features, hidden_stride, grad_stride,
    OPERAND: tl.constexpr, EVEN_WIDTH: tl.constexpr, EVEN_FEATURES: tl.constexpr,
    EVEN_ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute the weight's gradient: program (i, j) has features of block i and columns of block j."""
    offs_f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    grad_weight = tl.zeros((BLOCK_F, BLOCK_D), tl.float32)
    for start in range(0, num_rows, BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)
        u = upstream(grad_loss_ptr, loss_slopes_ptr, grad_rewards_ptr, grad_stride, offs_r, num_rows)
        gains = load_saved(gains_ptr, offs_f, offs_r, features, num_rows, EVEN_FEATURES and EVEN_ROWS)
        dz = (gains * u[None, :]).to(OPERAND)
        rows = row_offsets(anchors_ptr, offs_r, num_rows, num_tokens, hidden_stride)
        states = load_states(hidden_ptr, rows, offs_d, width, EVEN_WIDTH)
        x = normalize(states, norm_ptr, rstd_ptr, offs_r, offs_d, num_rows, width)
        grad_weight = tl.dot(dz, x.to(OPERAND), grad_weight, input_precision="ieee")
    ptrs = grad_weight_ptr + offs_f[:, None].to(tl.int64) * width + offs_d[None, :]
    mask = (offs_f[:, None] < features) & (offs_d[None, :] < width)
    tl.store(ptrs, grad_weight.to(grad_weight_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def head_bwd_vector_kernel(
    active_ptr, gains_ptr, grad_loss_ptr, loss_slopes_ptr, grad_rewards_ptr,
    grad_bias_ptr, grad_out_weight_ptr, grad_out_bias_ptr, num_rows, features, grad_stride,
    BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Compute gradients of the small vectors, where no other kernel sees all rows."""
    vector_gradients(
        active_ptr, gains_ptr, grad_loss_ptr, loss_slopes_ptr, grad_rewards_ptr, grad_stride,
        grad_bias_ptr, grad_out_weight_ptr, grad_out_bias_ptr, num_rows, features,
        tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F), BLOCK_F, BLOCK_R,
    )  # fmt: skip


def backward_blocks(kernel: str, num_rows: int, itemsize: int) -> dict:
    """Return the block sizes of the backward kernels (all, input, weight); the reasons are in README.md."""
    if kernel == "all":
        rows = round_up(num_rows, 16, ONE_LAUNCH_ROWS)
        if itemsize == 4:
            features, stages = (16, 8) if rows == 64 else (32, 6)
        else:
            features, stages = (128, 5) if rows == 16 else (64, 5)
        return {"BLOCK_R": rows, "BLOCK_F": features, "BLOCK_D": 32, "num_warps": 4, "num_stages": stages}
    if itemsize == 4:
        rows, features, warps = (64, 16, 8) if kernel == "input" else (16, 64, 4)
        return {"BLOCK_R": rows, "BLOCK_F": features, "BLOCK_D": 64, "num_warps": warps, "num_stages": 4}
    features = 64 if kernel == "input" else 128
    return {"BLOCK_R": 64, "BLOCK_F": features, "BLOCK_D": 128, "num_warps": 8, "num_stages": 3}


def launch_reward_head_bwd(
    grad_loss, loss_slopes, grad_rewards, hidden, anchors, norm_weight, weight, bias, out_weight, out_bias,
    active, gains, rstd, slopes, needs,
):  # fmt: skip
    """Launch the backward pass of a two-layer head and return its gradients.

    Args:
        grad_loss, loss_slopes: () and (R,) float32, or None: d / d rewards is grad_loss * loss_slopes ...
        grad_rewards: (R,) float32 or None: ... plus this.
        hidden, anchors, norm_weight, weight, bias, out_weight, out_bias: as given to the forward pass.
        active, gains, rstd, slopes: saved by it.
        needs: which of the six gradients below are wanted.

    Returns:
        [gradients of rows (R, D), norm_weight, weight, bias, out_weight, out_bias] in their parameters'
        dtypes; empty where not wanted or where the parameter is None.
    """
    hidden, anchors = addressable(hidden, anchors)
    num_rows, (features, width) = gains.shape[0], weight.shape
    wanted = [
        (hidden, (num_rows, width)), *((p, p.shape if p is not None else ()) for p in
        (norm_weight, weight, bias, out_weight, out_bias)),
    ]  # fmt: skip
    needs = [need and parameter is not None for need, (parameter, _) in zip(needs, wanted, strict=True)]
    new = torch.empty if num_rows > 0 else torch.zeros
    grads = [
        new(shape, dtype=p.dtype, device=p.device) if need else hidden.new_empty(0)
        for need, (p, shape) in zip(needs, wanted, strict=True)
    ]
    if num_rows == 0 or not any(needs):
        return grads
    pointers = [grad if need else None for need, grad in zip(needs, grads, strict=True)]
    names = ("grad_rows_ptr", "norm_parts_ptr", "grad_weight_ptr", "grad_bias_ptr", "grad_out_weight_ptr",
             "grad_out_bias_ptr")  # fmt: skip
    outputs = dict(zip(names, pointers, strict=True))
    arguments = {
        "hidden_ptr": hidden, "anchors_ptr": contiguous(anchors), "norm_ptr": contiguous(norm_weight),
        "weight_ptr": weight if weight.stride(1) == 1 else weight.contiguous(),
        "active_ptr": active, "gains_ptr": gains,
        "rstd_ptr": None if norm_weight is None else rstd, "slopes_ptr": None if norm_weight is None else slopes,
        "grad_loss_ptr": grad_loss, "loss_slopes_ptr": None if grad_loss is None else loss_slopes,
        "grad_rewards_ptr": grad_rewards, "grad_stride": 0 if grad_rewards is None else grad_rewards.stride(0),
        "num_rows": num_rows, "num_tokens": hidden.shape[0], "width": width, "features": features,
        "hidden_stride": hidden.stride(0), "OPERAND": OPERANDS[hidden.dtype],
    }  # fmt: skip
    arguments["weight_stride"] = arguments["weight_ptr"].stride(0)
    run = _one_launch if num_rows <= ONE_LAUNCH_ROWS else _launch_products
    run(arguments, outputs)
    return grads


def _blocks(kernel, arguments) -> dict:
    blocks = backward_blocks(kernel, arguments["num_rows"], arguments["hidden_ptr"].element_size())
    return {
        **blocks,
        "EVEN_ROWS": arguments["num_rows"] % blocks["BLOCK_R"] == 0,
        "EVEN_FEATURES": arguments["features"] % blocks["BLOCK_F"] == 0,
        "EVEN_WIDTH": arguments["width"] % blocks["BLOCK_D"] == 0,
    }


def _one_launch(arguments, outputs) -> None:
    blocks = _blocks("all", arguments)
    grid = triton.cdiv(arguments["width"], blocks["BLOCK_D"])
    needs_vectors = any(outputs[name] is not None for name in VECTORS)
    share = triton.next_power_of_2(triton.cdiv(arguments["features"], grid))
    apart = share * blocks["BLOCK_R"] > MAX_VECTOR_TILE
    # One block of rows: its part of the norm weight's gradient is the whole, in the parameter's dtype.
    launch(
        head_bwd_kernel, (grid,), **arguments, **outputs, **blocks,
        NEEDS_ROWS=outputs["grad_rows_ptr"] is not None or outputs["norm_parts_ptr"] is not None,
        NEEDS_VECTORS=needs_vectors and not apart, BLOCK_V=1 if apart else share,
    )  # fmt: skip
    if needs_vectors and apart:
        _launch_vectors(arguments, outputs)


def _launch_products(arguments, outputs) -> None:
    rows, norm, weight = (outputs[name] for name in ("grad_rows_ptr", "norm_parts_ptr", "grad_weight_ptr"))
    num_rows, width, features = (arguments[name] for name in ("num_rows", "width", "features"))
    if rows is not None or norm is not None:
        blocks = _blocks("input", arguments)
        row_blocks = triton.cdiv(num_rows, blocks["BLOCK_R"])
        parts = None if norm is None else torch.empty(row_blocks, width, dtype=torch.float32, device=norm.device)
        used = {name: value for name, value in arguments.items() if name != "active_ptr"}
        launch(
            head_bwd_input_kernel, (triton.cdiv(width, blocks["BLOCK_D"]), row_blocks), **used, **blocks,
            grad_rows_ptr=rows, norm_parts_ptr=parts,
        )  # fmt: skip
        if norm is not None:
            norm.copy_(parts.sum(0))
    if weight is not None:
        blocks = _blocks("weight", arguments)
        unused = ("weight_ptr", "weight_stride", "slopes_ptr", "active_ptr")
        launch(
            head_bwd_weight_kernel,
            (triton.cdiv(features, blocks["BLOCK_F"]), triton.cdiv(width, blocks["BLOCK_D"])),
            **{name: value for name, value in arguments.items() if name not in unused}, **blocks,
            grad_weight_ptr=weight,
        )  # fmt: skip
    if any(outputs[name] is not None for name in VECTORS):
        _launch_vectors(arguments, outputs)


def _launch_vectors(arguments, outputs) -> None:
    used = ("active_ptr", "gains_ptr", "grad_loss_ptr", "loss_slopes_ptr", "grad_rewards_ptr", "num_rows",
            "features", "grad_stride")  # fmt: skip
    launch(
        head_bwd_vector_kernel, (triton.cdiv(arguments["features"], 32),), **{name: arguments[name] for name in used},
        **{name: outputs[name] for name in VECTORS}, BLOCK_F=32, BLOCK_R=64, num_warps=4, num_stages=3,
    )  # fmt: skip
