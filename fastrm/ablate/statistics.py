"""Means over seeds with Student's t-intervals (Student 1908)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


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


def t_quantile(degrees: int) -> float:
    """Return the 97.5 % point of Student's t distribution."""
    return float(stats.t.ppf(0.975, degrees))
