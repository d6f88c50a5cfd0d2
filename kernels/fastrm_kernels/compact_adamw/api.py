"""The public function of the compact AdamW update: checks shared by all implementations, then dispatch.

The formulas are in reference.py, the kernel's derivation in README.md.
"""

import torch

from fastrm_kernels.compact_adamw import reference
from fastrm_kernels.compact_adamw.reference import BLOCK
from fastrm_kernels.dispatch import pick

NUM_COEFFICIENTS = 7


def compact_adamw(weight, gradient, exp_avg, exp_avg_sq, noise, coefficients, *, impl="auto") -> None:
    """Apply one AdamW update to a run of elements, in place.

    Args:
        weight: contiguous float32 or bfloat16; (n, 256) with 8-bit moments, else (n, 1).
        gradient: contiguous float32, of the same shape.
        exp_avg, exp_avg_sq: a tuple of one float32 tensor of that shape; or of (codes (n, 256) uint8, scale (n, 1)
            float32, `MomentCode`) in 8 bits, both or neither. exp_avg's code has negative values,
            exp_avg_sq's has none.
        noise: contiguous int16 of the same shape, uniform, to round a bfloat16 weight stochastically; else None.
        coefficients: (7,) float32 on the same device: share of the weight that is kept, shares of the new gradient
            in both moments, step size with the first moment's bias correction, the second's correction, eps, and
            the factor of the gradient.
        impl: auto, triton or eager; an explicit one never falls back.

    The result is a pure function of the arguments, bitwise the same from run to run with either implementation.
    Between the two it differs by roundings: Triton on a GPU fuses multiplications with additions, which may move
    a moment to the neighbouring code and a weight to the neighbouring bfloat16.

    Raises:
        ValueError: for shapes or dtypes that do not fit, or an impl that cannot run here.
    """
    _check(weight, gradient, exp_avg, exp_avg_sq, noise, coefficients)
    # The kernel reads bfloat16 as bits: what decides is where the gradient is.
    if pick("compact_adamw", impl, gradient) == "eager":
        reference.compact_adamw(weight, gradient, exp_avg, exp_avg_sq, noise, coefficients)
        return
    from fastrm_kernels.compact_adamw.triton_update import launch_compact_adamw

    launch_compact_adamw(weight, gradient, exp_avg, exp_avg_sq, noise, coefficients)


def _check(weight, gradient, exp_avg, exp_avg_sq, noise, coefficients) -> None:
    width = BLOCK if len(exp_avg) == 3 else 1
    if weight.ndim != 2 or weight.shape[1] != width or weight.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"weight: got {tuple(weight.shape)} {weight.dtype}, wanted (n, {width}) float32 or bfloat16")
    if (noise is None) != (weight.dtype is torch.float32):
        raise ValueError(f"noise: wanted for a bfloat16 weight and for no other, got a weight in {weight.dtype}")
    if len(exp_avg) != len(exp_avg_sq) or len(exp_avg) not in (1, 3):
        raise ValueError("exp_avg, exp_avg_sq: wanted both as (moment,) or both as (codes, scale, code)")
    storage = torch.float32 if width == 1 else torch.uint8
    wanted = {
        "gradient": (gradient, weight.shape, torch.float32),
        "exp_avg": (exp_avg[0], weight.shape, storage),
        "exp_avg_sq": (exp_avg_sq[0], weight.shape, storage),
        "noise": (noise, weight.shape, torch.int16),
        "coefficients": (coefficients, (NUM_COEFFICIENTS,), torch.float32),
    }
    if width > 1:
        for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
            wanted[f"scale of {name}"] = (moment[1], (weight.shape[0], 1), torch.float32)
    for name, (tensor, shape, dtype) in wanted.items():
        if tensor is not None and (tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_contiguous()):
            got = f"{tuple(tensor.shape)} {tensor.dtype}, strides {tensor.stride()}"
            raise ValueError(f"{name}: got {got}, wanted {tuple(shape)} {dtype}, contiguous")
    if not weight.is_contiguous():
        raise ValueError(f"weight: got strides {weight.stride()}, wanted contiguous")
