"""The compact AdamW update in one pass over memory; formulas in reference.py, bytes and instructions in README.md."""

import torch
import triton
import triton.language as tl

from fastrm_kernels.compact_adamw.reference import BLOCK, FIRST_BITS, LAST_CELL
from fastrm_kernels.launch import launch


@triton.jit
def read_moment(moment_ptr, scale_ptr, values_ptr, row, offs, live):
    """Return a moment (BLOCK,) in float32, decoded where it is stored as codes with a scale."""
    if scale_ptr is None:
        moment = tl.load(moment_ptr + offs, mask=live, other=0.0)
    else:
        codes = tl.load(moment_ptr + offs, mask=live, other=0).to(tl.int32)
        moment = tl.load(values_ptr + codes) * tl.load(scale_ptr + row)
    return moment


@triton.jit
def write_moment(
    moment_ptr, scale_ptr, cells_ptr, row, offs, live, moment,
    SIGNED: tl.constexpr, FIRST_BITS: tl.constexpr, LAST_CELL: tl.constexpr,
):  # fmt: skip
    """Store a moment as it is, or as the nearest codes of its shares of the row's largest magnitude."""
    if scale_ptr is None:
        tl.store(moment_ptr + offs, moment, mask=live)
    else:
        scale = tl.max(tl.abs(moment), 0)
        tl.store(scale_ptr + row, scale)
        # The smallest normal float32, as in reference.py.
        divisor = tl.full(moment.shape, 1.0, tl.float32) * tl.maximum(scale, 1.1754943508222875e-38)
        bits = tl.div_rn(moment, divisor).to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        cell = tl.minimum(tl.maximum((magnitude >> 16) - FIRST_BITS, 0), LAST_CELL)
        if SIGNED:
            cell += tl.where(bits < 0, LAST_CELL + 1, 0)
        entry = tl.load(cells_ptr + cell)
        code = tl.where((magnitude & 0xFFFF) >= ((entry >> 16) & 0xFFFF), entry >> 8, entry)
        tl.store(moment_ptr + offs, (code & 0xFF).to(tl.uint8), mask=live)


@triton.jit
def compact_adamw_kernel(
    weight_ptr, gradient_ptr, first_ptr, first_scale_ptr, first_values_ptr, first_cells_ptr,
    second_ptr, second_scale_ptr, second_values_ptr, second_cells_ptr, noise_ptr, coefficients_ptr, num_elements,
    FIRST_BITS: tl.constexpr, LAST_CELL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update elements [i BLOCK, (i + 1) BLOCK) in program i, one warp. With noise, weights are bits of bfloat16."""
    row = tl.program_id(0)
    offs = row * BLOCK + tl.arange(0, BLOCK)
    live = offs < num_elements
    first = read_moment(first_ptr, first_scale_ptr, first_values_ptr, row, offs, live)
    second = read_moment(second_ptr, second_scale_ptr, second_values_ptr, row, offs, live)
    gradient = tl.load(gradient_ptr + offs, mask=live, other=0.0) * tl.load(coefficients_ptr + 6)
    first += (gradient - first) * tl.load(coefficients_ptr + 1)
    second += (gradient * gradient - second) * tl.load(coefficients_ptr + 2)
    weight = tl.load(weight_ptr + offs, mask=live, other=0)
    if noise_ptr is not None:
        weight = (weight.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    divisor = tl.sqrt(second) * tl.load(coefficients_ptr + 4) + tl.load(coefficients_ptr + 5)
    weight = weight * tl.load(coefficients_ptr) - tl.load(coefficients_ptr + 3) * first / divisor
    if noise_ptr is not None:
        noise = tl.load(noise_ptr + offs, mask=live, other=0).to(tl.int32) & 0xFFFF
        weight = ((weight.to(tl.int32, bitcast=True) + noise) >> 16).to(tl.int16)
    tl.store(weight_ptr + offs, weight, mask=live)
    write_moment(first_ptr, first_scale_ptr, first_cells_ptr, row, offs, live, first, True, FIRST_BITS, LAST_CELL)
    write_moment(second_ptr, second_scale_ptr, second_cells_ptr, row, offs, live, second, False, FIRST_BITS, LAST_CELL)


def launch_compact_adamw(weight, gradient, exp_avg, exp_avg_sq, noise, coefficients) -> None:
    """Update in place; arguments as in api.py. Fewer than 2^31 elements."""
    num_elements = weight.numel()
    assert num_elements < 2**31, num_elements
    moments = {}
    for name, moment in (("first", exp_avg), ("second", exp_avg_sq)):
        stored, scale, code = moment if len(moment) == 3 else (*moment, None, None)
        moments |= {
            f"{name}_ptr": stored, f"{name}_scale_ptr": scale,
            f"{name}_values_ptr": None if code is None else code.values,
            f"{name}_cells_ptr": None if code is None else code.cells,
        }  # fmt: skip
    launch(
        compact_adamw_kernel, (triton.cdiv(num_elements, BLOCK),),
        weight_ptr=weight if noise is None else weight.view(torch.int16), gradient_ptr=gradient, **moments,
        noise_ptr=noise, coefficients_ptr=coefficients, num_elements=num_elements,
        FIRST_BITS=FIRST_BITS, LAST_CELL=LAST_CELL, BLOCK=BLOCK, num_warps=1, num_stages=1,
    )  # fmt: skip
