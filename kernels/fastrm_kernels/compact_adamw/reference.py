"""Eager specification of AdamW on compact weights and moments.

    g' = s g                                                   s = coefficients[6]
    m' = m + (g' - m) new1,  v' = v + (g'^2 - v) new2          float32, whatever m and v are stored in
    w' = kept w - rate m' / (sqrt(v') correction + eps)        float32, then rounded to the weight's dtype

which is AdamW (Loshchilov and Hutter 2019) for kept = 1 - lr decay, new1 = 1 - beta1, new2 = 1 - beta2,
rate = lr / (1 - beta1^t), correction = (1 - beta2^t)^-1/2. `s` is the factor that normalises and clips the
gradient: multiplied here, it costs no pass over memory of its own.

A moment of 8 bits is (codes, scale, code): rows of 256 elements, one scale a row, and value = code.values[c] scale
(Dettmers et al. 2022, arXiv 2110.02861, section 2.1, with torchao's block size). The scale is the row's largest
magnitude, the code that of the nearest value as torchao finds it.

bfloat16 weights are rounded stochastically: uniform bits are added below bfloat16's last one and cut off.
"""

from dataclasses import dataclass, replace

import torch

# Elements that share one scale in the 8-bit code.
BLOCK = 256
# A cell is a run of 2^16 float32 magnitudes that have the same upper 16 bits. Cell 0 begins at 2^-23 and takes all
# below it too; cell LAST_CELL is that of 1.0 and all above.
FIRST_BITS = (127 - 23) << 7
LAST_CELL = 23 << 7


@dataclass(frozen=True)
class MomentCode:
    """The 256 values that a code of 8 bits may stand for, and a table that finds the nearest without a search.

    Attributes:
        values: (256,) float32, ascending, within [-1, 1].
        cells: (2, LAST_CELL + 1) int32, for non-negative and for negative numbers, each by cell of the magnitude:
            code of its first number (8 bits), of its last (8 bits), and the lower 16 bits of the first magnitude that
            has the latter. No cell has more than two codes.
    """

    values: torch.Tensor
    cells: torch.Tensor

    @staticmethod
    def from_values(values: torch.Tensor) -> "MomentCode":
        """Return the code of 256 ascending values (256,), made on the CPU.

        Raises:
            ValueError: if values lie so close together that some cell has more than two codes.
        """
        magnitude = (torch.arange(LAST_CELL + 1, dtype=torch.int64) + FIRST_BITS) << 16
        rows = []
        for sign in (0, -(2**31)):

            def codes_at(low, sign=sign):
                numbers = (magnitude + low + sign).to(torch.int32).view(torch.float32)
                return nearest_codes(numbers, values).to(torch.int64)

            first, last = codes_at(0), codes_at(0xFFFF)
            below = nearest_codes(torch.tensor([0.0 if sign == 0 else -0.0]), values)
            if (first - last).abs().max() > 1 or first[0] != below or last[0] != below or first[-1] != last[-1]:
                raise ValueError("values: two of them are too close together, or too close to 0 or 1, for one table")
            # Bisection: the first of 2^16 numbers that has the last one's code.
            low, high = torch.zeros_like(first), torch.full_like(first, 0xFFFF)
            for _ in range(16):
                middle = (low + high) // 2
                reached = codes_at(middle) == last
                low, high = torch.where(reached, low, middle + 1), torch.where(reached, middle, high)
            rows.append((first | last << 8 | high << 16).to(torch.int32))
        return MomentCode(values, torch.stack(rows))

    def to(self, device: torch.device) -> "MomentCode":
        """Return the same code with its tensors on `device`."""
        return replace(self, values=self.values.to(device), cells=self.cells.to(device))


def compact_adamw(weight, gradient, exp_avg, exp_avg_sq, noise, coefficients) -> None:
    """Apply one AdamW update to a run of elements, in place; arguments as in api.py."""
    kept, new1, new2, rate, correction, eps, scale = coefficients.unbind()
    gradient = gradient * scale
    first = _read(exp_avg).lerp(gradient, new1)
    second = _read(exp_avg_sq).lerp(gradient.square(), new2)
    # The update is taken from the moments before they are rounded to codes.
    updated = weight.float() * kept - rate * first / (second.sqrt() * correction + eps)
    _write(exp_avg, first)
    _write(exp_avg_sq, second)
    weight.copy_(updated if noise is None else round_stochastically(updated, noise))


def round_stochastically(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Round float32 values to bfloat16 so that the expectation over `noise` equals `values`.

    Adds uniform bits below bfloat16's last one and cuts them off: in the sign-magnitude format the carry
    goes away from zero, with a probability equal to the distance from the neighbour nearer to zero.

    Args:
        values: finite float32.
        noise: int16 of the same shape, uniform over all 2^16 values.
    """
    bits = values.view(torch.int32) + (noise.to(torch.int32) & 0xFFFF)
    return (bits & -0x10000).view(torch.float32).to(torch.bfloat16)  # exact: the cut bits are zero


def nearest_codes(numbers: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return uint8 codes of float32 numbers: the nearest value, the upper one from the middle between two on.

    Bitwise what torchao.optim.quant_utils.quantize_8bit_with_qmap finds.
    """
    below = (torch.bucketize(numbers, values, right=True) - 1).clamp(min=0)
    above = (below + 1).clamp(max=len(values) - 1)
    low, high = values[below], values[above]
    return torch.where(numbers - low >= (high - low) * 0.5, above, below).to(torch.uint8)


def _read(moment: tuple) -> torch.Tensor:
    if len(moment) == 1:
        return moment[0]
    codes, scale, code = moment
    return code.values[codes.int()] * scale


def _write(moment: tuple, values: torch.Tensor) -> None:
    if len(moment) == 1:
        moment[0].copy_(values)
        return
    codes, scale, code = moment
    scale.copy_(values.abs().amax(-1, keepdim=True))
    # torchao does not scale below 1e-12, but second moments of clipped gradients are that small.
    codes.copy_(nearest_codes(values / scale.clamp(min=torch.finfo(torch.float32).tiny), code.values))
