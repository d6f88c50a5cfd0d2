"""Means over seeds with Student's t-intervals (Student 1908), without scipy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

_INTERVALS = 512  # intervals of Simpson's rule: its error at 97.5 % is below 1e-9 for every number of seeds


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval.

    Attributes:
        half: half width of the 95 % t-interval; None for a single value, which says nothing about the spread.
        num: number of values.
    """

    mean: float
    half: float | None
    num: int

    @property
    def excludes_zero(self) -> bool:
        """True if the whole interval is on one side of 0."""
        return self.half is not None and abs(self.mean) > self.half


def estimate(values: Sequence[float]) -> Estimate:
    """Estimate the mean of values that are independent and normal, with half the width of its 95 % interval.

    Raises:
        ValueError: for no values.
    """
    if not values:
        raise ValueError("no values to take the mean of")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Estimate(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Estimate(mean, t_quantile(len(values) - 1) * math.sqrt(variance / len(values)), len(values))


def paired_difference(values: dict[int, float], reference: dict[int, float]) -> Estimate | None:
    """Estimate the mean of value - reference over the seeds that both have; None if they share none."""
    shared = [values[seed] - reference[seed] for seed in values if seed in reference]
    return estimate(shared) if shared else None


@cache
def t_quantile(degrees: int) -> float:
    """Return the 97.5 % point of Student's t distribution.

    With x = sqrt(degrees) * tan(angle) the density becomes a multiple of cos(angle)^(degrees - 1), which is smooth:
    Simpson's rule integrates it, bisection finds the angle.
    """
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if scale * _integral(middle, degrees - 1) < 0.475:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(low)


def _integral(end: float, power: int) -> float:
    """Integrate cos(angle)^power from 0 to `end`."""
    width = end / _INTERVALS
    weights = (1 if n in (0, _INTERVALS) else 4 if n % 2 else 2 for n in range(_INTERVALS + 1))
    return math.fsum(weight * math.cos(n * width) ** power for n, weight in enumerate(weights)) * width / 3
