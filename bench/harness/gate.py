"""The gate: no figure for a variant that computes something else, and the others go on where one fails."""

import gc
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from bench.harness.timing import synchronize

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4

Named = dict[str, torch.Tensor]


class RedGate(AssertionError):
    """A variant computed something else: there is no figure for it."""


class DeviceLost(RuntimeError):
    """The device no longer answers, as after an illegal address; earlier measurements stay valid."""


def error_limits(eager: Sequence[Named], truth: Sequence[Named]) -> dict[str, float]:
    """Return twice (the largest error of same-dtype eager code + a rounding of the largest value), by tensor.

    Args:
        eager, truth: the same tensors for each of several draws. One draw of a scalar would not do: it can
            be exact by luck.
    """
    limits = {}
    for name in truth[0]:
        error = max(largest_error(a[name], b[name]) for a, b in zip(eager, truth, strict=True))
        scale = max(float(b[name].abs().max()) for b in truth)
        limits[name] = 2 * (error + torch.finfo(eager[0][name].dtype).eps * scale)
    return limits


def largest_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Return max abs(found - truth); NaN if either has one."""
    if found.shape != truth.shape:
        raise RedGate(f"got shape {tuple(found.shape)}, wanted {tuple(truth.shape)}")
    return float((found.detach().double() - truth).abs().max())


def check(found: Sequence[Named], truth: Sequence[Named], limits: dict[str, float]) -> dict[str, float]:
    """Return errors over their limits, by tensor name.

    Raises:
        RedGate: if one is beyond its limit or not a number.
    """
    errors = {}
    for name, limit in limits.items():
        error = max((largest_error(a[name], b[name]) for a, b in zip(found, truth, strict=True)), key=_nan_last)
        if not error <= limit:  # true for NaN as well
            raise RedGate(f"{name}: error {error:.3e}, wanted at most {limit:.3e}")
        errors[name] = error / limit if limit else 0.0
    return errors


def _nan_last(error: float) -> float:
    return math.inf if math.isnan(error) else error


class Attempted(Protocol):
    """A candidate, or whatever else may fail while others go on."""

    name: str
    failed: str | None


def attempt(candidate: Attempted, action: Callable[[], object]):
    """Run an action of a candidate; if it fails, the candidate says why and the others go on.

    Raises:
        DeviceLost: if the device does not answer afterwards.
    """
    if candidate.failed is not None:
        return None
    try:
        return action()
    except Exception as error:
        candidate.failed = describe(error)
    gc.collect()  # frames of the failed call may hold large tensors
    try:
        synchronize()
    except Exception as error:
        raise DeviceLost(f"after {candidate.name} failed with {candidate.failed}: {describe(error)}") from error
    return None


def describe(error: Exception, limit: int = 160) -> str:
    """Describe an error by its kind and first line, for a cell of a table."""
    lines = str(error).strip().splitlines() or [""]
    kind = "red gate" if isinstance(error, RedGate) else type(error).__name__
    return f"{kind}: {lines[0]}"[:limit]
