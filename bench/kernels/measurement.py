"""The measurement of kernels: candidates that are timed in turns, CUDA graphs, and the entries of the results."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from bench.harness.gate import attempt
from bench.harness.memory import peak_mib
from bench.harness.timing import Budget, Rounds, Stats, Stopwatch, in_turns, timed

WARMUPS = 2
ROUNDS = Rounds(20, 100)
SHAPE_SECONDS = {"cuda": 1.0, "cpu": 0.3}  # of timing, for all variants of a shape; the least rounds may take longer,
MOST_SECONDS = {"cuda": math.inf, "cpu": 6.0}  # but not longer than this


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
            with Stopwatch() as watch:
                attempt(candidate, lambda c=candidate, d=direction: _warm_up(c, d, device))
            round_seconds += watch.wall / (WARMUPS + 1)
            samples[candidate.name, direction] = []
            jobs.append((candidate, direction))
    jobs = [job for job in jobs if job[0].failed is None]
    if not jobs:
        return {}
    ours = [job for job in jobs if job[0] is jobs[0][0]][-1]

    def sample(job):
        candidate, direction = job
        seconds = attempt(candidate, lambda: one_pass(candidate, direction, device))
        if seconds is not None:
            samples[candidate.name, direction].append(seconds / candidate.steps)

    def rest():
        for job in jobs:
            if job is not ours:
                sample(job)

    rounds = ROUNDS.fitting(round_seconds, SHAPE_SECONDS[device], min(budget.left, MOST_SECONDS[device]))
    if drive is not None:
        drive(lambda: sample(ours), rest, rounds)
    else:
        in_turns([rest, lambda: sample(ours)], range(rounds))
    found: dict[str, dict[str, Stats]] = {}
    for candidate, direction in jobs:
        if candidate.failed is None and samples[candidate.name, direction]:
            found.setdefault(candidate.name, {})[direction] = Stats.of(samples[candidate.name, direction])
    return found


def one_pass(candidate: Candidate, direction: str, device: str) -> float:
    """Return the seconds of one pass."""
    return timed(candidate.passes[direction], device, queued=candidate.queued)


def _warm_up(candidate: Candidate, direction: str, device: str) -> None:
    for _ in range(WARMUPS + 1):
        one_pass(candidate, direction, device)


def host_ms(build: Callable[[], object], repeats: int = 3) -> float:
    """Return the median milliseconds of building something on the host, with its copies to the device.

    The first call loads and compiles things that later ones find ready, so it is not counted.
    """
    build()
    times = []
    for _ in range(repeats):
        with Stopwatch() as watch:
            build()
        times.append(1e3 * watch.wall)
    return statistics.median(times)


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
            "seconds": {direction: s.to_json() for direction, s in stats.get(c.name, {}).items()},
            "peak_mib": peaks.get(c.name),
            "build_ms": c.build_ms,
            "error_over_limit": c.errors,
        }
        for c in candidates
    }
