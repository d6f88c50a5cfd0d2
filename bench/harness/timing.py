"""The measurement of kernels: the correctness gate, interleaved timing, memory, the copy bandwidth."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from bench.training.comparison import peak_mib as resident_peak_mib

WARMUPS = 2
MIN_ROUNDS, MAX_ROUNDS = 20, 100
SHAPE_SECONDS = {"cuda": 1.0, "cpu": 0.3}  # of timing, for all variants of a shape; MIN_ROUNDS may take longer,
MOST_SECONDS = {"cuda": math.inf, "cpu": 6.0}  # but not longer than this
# About 2 ms at the clock of a data-centre GPU: longer than Python needs to launch an attention step.
HEAD_START_CYCLES = 4_000_000
COPY_BYTES = 2 << 30
MIB = 1 << 20

Named = dict[str, torch.Tensor]


class RedGate(AssertionError):
    """A variant computed something else: there is no figure for it."""


class DeviceLost(RuntimeError):
    """The device no longer answers, as after an illegal address; earlier measurements stay valid."""


class Budget:
    """The seconds that a run may take, counted from the making of this object."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


@dataclass
class Candidate:
    """One way to compute an operation, ready to run.

    Attributes:
        passes: what is timed, by direction; each call runs it once.
        steps: operations that one pass holds.
        queued: launch while the device is still busy, so that the time of launching stays hidden, as in a
            training step. Without it, launching counts wherever the device has to wait for it.
        once: a single operation, for peak memory; None where its memory is not the allocator's to see.
        build_ms: median time of building masks or layouts, which is not part of a pass.
        errors: largest error of each tensor over its limit; set by the gate.
        failed: why there are no figures.
    """

    name: str
    passes: dict[str, Callable[[], object]]
    steps: int = 1
    queued: bool = False
    once: Callable[[], object] | None = None
    build_ms: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    failed: str | None = None


@dataclass(frozen=True)
class Stats:
    """Seconds of one operation."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Stats":
        if len(samples) < 2:
            return cls(samples[0], samples[0], samples[0], len(samples))
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high, len(samples))


# The gate


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


# Timing


def measure(candidates: Sequence[Candidate], device: str, budget: Budget, drive=None) -> dict[str, dict[str, Stats]]:
    """Time all passes of all candidates in alternation.

    Args:
        drive: called with (ours, rest, rounds), where ours samples the first candidate's last pass and rest
            everything else, and calls them in turn for so many rounds; pytest-benchmark is such a driver.

    Returns:
        statistics by candidate and direction; candidates that fail are missing, and say so.
    """
    samples: dict[tuple[str, str], list[float]] = {}
    jobs = []
    round_seconds = 0.0
    for candidate in candidates:
        for direction in candidate.passes:
            start = time.perf_counter()
            attempt(candidate, lambda c=candidate, d=direction: _warm_up(c, d, device))
            round_seconds += (time.perf_counter() - start) / (WARMUPS + 1)
            samples[candidate.name, direction] = []
            jobs.append((candidate, direction))
    jobs = [job for job in jobs if job[0].failed is None]
    if not jobs:
        return {}
    ours = [job for job in jobs if job[0] is jobs[0][0]][-1]

    def sample(job):
        candidate, direction = job
        seconds = attempt(candidate, lambda: timed(candidate, direction, device))
        if seconds is not None:
            samples[candidate.name, direction].append(seconds / candidate.steps)

    def rest():
        for job in jobs:
            if job is not ours:
                sample(job)

    rounds = num_rounds(round_seconds, SHAPE_SECONDS[device], min(budget.left, MOST_SECONDS[device]))
    (drive or run_rounds)(lambda: sample(ours), rest, rounds)
    found: dict[str, dict[str, Stats]] = {}
    for candidate, direction in jobs:
        if candidate.failed is None and samples[candidate.name, direction]:
            found.setdefault(candidate.name, {})[direction] = Stats.of(samples[candidate.name, direction])
    return found


def num_rounds(round_seconds: float, wanted_seconds: float, left_seconds: float) -> int:
    """Return how many rounds fit in the wanted seconds: at least 20, but down to 3 if time is running out."""
    fit = max(MIN_ROUNDS, min(MAX_ROUNDS, int(wanted_seconds / max(round_seconds, 1e-9))))
    return max(3, min(fit, int(left_seconds / max(round_seconds, 1e-9))))


def run_rounds(ours, rest, rounds: int) -> None:
    """Run the rounds without pytest."""
    for _ in range(rounds):
        rest()
        ours()


def timed(candidate: Candidate, direction: str, device: str) -> float:
    """Return the seconds of one pass: by events on a GPU, by the clock elsewhere."""
    run = candidate.passes[direction]
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if candidate.queued:
        torch.cuda._sleep(HEAD_START_CYCLES)
    start.record()
    kept = run()
    end.record()
    torch.cuda.synchronize()
    del kept
    return start.elapsed_time(end) / 1e3  # milliseconds


def _warm_up(candidate: Candidate, direction: str, device: str) -> None:
    for _ in range(WARMUPS + 1):
        timed(candidate, direction, device)


def peak_mib(run: Callable[[], object], device: str) -> float | None:
    """Return how many MiB memory rises above rest while `run` runs."""
    if device == "cpu":
        return resident_peak_mib(run)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    resting = torch.cuda.memory_allocated()
    kept = run()
    torch.cuda.synchronize()
    del kept
    return (torch.cuda.max_memory_allocated() - resting) / MIB


def host_ms(build: Callable[[], object], repeats: int = 3) -> float:
    """Return the median milliseconds of building something on the host, with its copies to the device.

    The first call loads and compiles things that later ones find ready, so it is not counted.
    """
    build()
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        build()
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def copy_bytes_per_second(device: str) -> float | None:
    """Return the bandwidth of a large device-to-device copy, bytes read plus bytes written; None on a CPU."""
    if device == "cpu":
        return None
    source = torch.randint(0, 1 << 30, (COPY_BYTES // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    copy = Candidate("copy", {"copy": lambda: target.copy_(source)})
    _warm_up(copy, "copy", device)
    return 2 * COPY_BYTES / statistics.median(timed(copy, "copy", device) for _ in range(MIN_ROUNDS))


def captured(run: Callable[[], object]):
    """Capture `run` in a CUDA graph: return (replay, the result of run), into which each replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph.replay, outputs


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clean_memory() -> None:
    """Free the memory of the last shape, whose blocks would not fit the next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def figures(
    candidates: Sequence[Candidate], device: str, budget: Budget, drive=None, *, timed: bool = True
) -> dict[str, dict]:
    """Return the entries of the results file for all candidates: their times, by `measure`, and peak memory.

    Args:
        timed: False for what the gate found alone; nothing is run.
    """
    stats, peaks = {}, {}
    if timed:
        stats = measure(candidates, device, budget, drive)
        peaks = {c.name: peak_mib(c.once, device) for c in candidates if c.once and c.failed is None}
    return {
        c.name: {
            "failed": c.failed,
            "seconds": {
                direction: {"median": s.median, "quartiles": [s.low, s.high], "rounds": s.rounds}
                for direction, s in stats.get(c.name, {}).items()
            },
            "peak_mib": peaks.get(c.name),
            "build_ms": c.build_ms,
            "error_over_limit": c.errors,
        }
        for c in candidates
    }
