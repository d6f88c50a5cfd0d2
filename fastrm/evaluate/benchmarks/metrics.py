"""The parts of every benchmark's figures: shares of rows or ids, and weighted sums and means of shares.

A metric is a small expression: `Mean` over rows, ids or prompts, and sums and means of such means. It is not a function
of rows, since 95 % intervals need it for 10,000 resamples: how often each unit is drawn enters a `Mean` through two
sums alone, so that all of a benchmark's means for all resamples are one matrix product. An expression also says what
its units are, and those are what is resampled.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 10_000
# Resamples at a time: bounds the memory of the counts to a few tens of megabytes.
_CHUNK = 500


@dataclass(frozen=True)
class Mean:
    """The mean of `values` over the units that are `members`; NaN if there are none.

    Attributes:
        values: (U,) float64, 0 or 1 for a share.
        members: (U,) bool.
        unit: what is counted, and resampled: rows, ids or prompts.
    """

    values: np.ndarray
    members: np.ndarray
    unit: str = "rows"

    def of_all(self) -> float:
        """Return the mean over the benchmark as it is."""
        count = int(self.members.sum())
        return float(self.values[self.members].sum() / count) if count else float("nan")


@dataclass(frozen=True)
class Combination:
    """The sum of weight * part; NaN if a part is NaN."""

    parts: tuple[tuple[float, "Metric"], ...]


@dataclass(frozen=True)
class Average:
    """The weighted mean of the parts that have units, so that a file without some of them still has a figure.

    NaN if none has, or if one that has is NaN itself.
    """

    parts: tuple[tuple[float, "Metric"], ...]


Metric = Mean | Combination | Average
Metrics = dict[str, Metric]


def share(right: np.ndarray, members: np.ndarray | None = None, unit: str = "rows") -> Mean:
    """Return the share of units that are right (U,), among all or among `members` (U,) bool."""
    right = np.asarray(right, dtype=np.float64)
    return Mean(right, np.ones(len(right), bool) if members is None else np.asarray(members, bool), unit)


def average(parts: Iterable[Metric]) -> Average:
    """Return the plain mean of the metrics that have units."""
    return Average(tuple((1.0, part) for part in parts))


def mean_of(first: Metrics, second: Metrics) -> Metrics:
    """Return the metrics whose figures, of the rows and of any resample of them, are the means of two evaluations'.

    Both are of the same rows of one benchmark. A metric that has two names in both has two names here.
    """
    known: dict[tuple[int, int], Metric] = {}

    def mean(a: Metric, b: Metric) -> Metric:
        if (id(a), id(b)) not in known:
            if isinstance(a, Mean):
                found = Mean((a.values + b.values) / 2, a.members, a.unit)
            else:
                parts = zip(a.parts, b.parts, strict=True)
                found = type(a)(tuple((weight, mean(one, other)) for (weight, one), (_, other) in parts))
            known[id(a), id(b)] = found
        return known[id(a), id(b)]

    return {name: mean(metric, second[name]) for name, metric in first.items()}


def values_of(metrics: Metrics) -> dict[str, float]:
    """Return the figures; NaN where a metric has no units."""
    values = {id(mean): np.array([mean.of_all()]) for mean in _means(metrics.values())}
    return {name: float(_evaluate(metric, values)[0]) for name, metric in metrics.items()}


def bootstrap(
    metrics: Metrics, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> dict[str, tuple[float, float] | None]:
    """Return 95 % percentile intervals (Efron 1979): as many units as there are, drawn with replacement.

    Resamples in which a metric has no units do not count for it. Deterministic in the seed. None where
    the metric itself is NaN.
    """
    generator = np.random.default_rng(seed)
    means = list(_means(metrics.values()))
    units = {mean.unit: len(mean.values) for mean in means}
    by_unit = {unit: [mean for mean in means if mean.unit == unit] for unit in units}
    drawn = []
    for start in range(0, num_resamples, _CHUNK):
        size, values = min(_CHUNK, num_resamples - start), {}
        for unit, count in units.items():
            values |= _resampled_means(by_unit[unit], _counts(generator, size, count))
        drawn.append({name: _evaluate(metric, values) for name, metric in metrics.items()})
    return {name: _interval(np.concatenate([chunk[name] for chunk in drawn])) for name in metrics}


def _means(metrics) -> Mapping:
    """Return the distinct means that metrics are made of, in order."""
    found: dict[int, Mean] = {}
    pending = list(metrics)
    while pending:
        metric = pending.pop(0)
        if isinstance(metric, Mean):
            found.setdefault(id(metric), metric)
        else:
            pending += [part for _, part in metric.parts]
    return found.values()


def _counts(generator: np.random.Generator, size: int, num_units: int) -> np.ndarray:
    """Return (size, num_units) float64: how often each unit is drawn."""
    drawn = generator.integers(0, num_units, (size, num_units)) + num_units * np.arange(size)[:, None]
    return np.bincount(drawn.ravel(), minlength=size * num_units).reshape(size, num_units).astype(np.float64)


def _resampled_means(means: list[Mean], counts: np.ndarray) -> dict[int, np.ndarray]:
    """Return the resampled values (B,) of each mean, by its identity."""
    members = np.stack([mean.members for mean in means], axis=1).astype(np.float64)  # (U, M)
    sums = counts @ (np.stack([mean.values for mean in means], axis=1) * members)
    with np.errstate(invalid="ignore"):
        ratios = sums / (counts @ members)
    return {id(mean): ratios[:, number] for number, mean in enumerate(means)}


def _evaluate(metric: Metric, values: Mapping[int, np.ndarray]) -> np.ndarray:
    if isinstance(metric, Mean):
        return values[id(metric)]
    if isinstance(metric, Combination):
        return sum(weight * _evaluate(part, values) for weight, part in metric.parts)
    present = [_has_units(part, values) for _, part in metric.parts]
    terms = [weight * _evaluate(part, values) for weight, part in metric.parts]
    total = sum(np.where(has, term, 0.0) for has, term in zip(present, terms, strict=True))
    weights = sum(weight * has for has, (weight, _) in zip(present, metric.parts, strict=True))
    with np.errstate(invalid="ignore"):
        return total / weights


def _has_units(metric: Metric, values: Mapping[int, np.ndarray]) -> np.ndarray:
    if isinstance(metric, Mean):
        return ~np.isnan(values[id(metric)])
    return np.any([_has_units(part, values) for _, part in metric.parts], axis=0)


def _interval(values: np.ndarray) -> tuple[float, float] | None:
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)
