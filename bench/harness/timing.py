"""The rule by which everything is timed: variants take turns, a median and quartiles of several rounds are kept."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

FEWEST = 3  # rounds where the time runs out
# About 2 ms at the clock of a data-centre GPU: longer than Python needs to launch an attention step.
HEAD_START_CYCLES = 4_000_000


class Budget:
    """The seconds that a run may take, counted from the making of this object."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


class Stopwatch:
    """A context manager that measures the seconds of its block; the device finishes its work before and after.

    Attributes:
        wall: by the clock.
        cpu: of CPU time, over all threads.
    """

    wall: float
    cpu: float

    def __enter__(self) -> "Stopwatch":
        synchronize()
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            synchronize()
        self.wall, self.cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu


def timed(run: Callable[[], object], device: str, *, queued: bool = False) -> float:
    """Return the seconds of one call: by events on a GPU, by the clock elsewhere.

    Args:
        queued: launch while the device is still busy, so that the time of launching stays hidden.
    """
    if device == "cpu":
        with Stopwatch() as watch:
            run()
        return watch.wall
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if queued:
        torch.cuda._sleep(HEAD_START_CYCLES)
    start.record()
    kept = run()
    end.record()
    torch.cuda.synchronize()
    del kept
    return start.elapsed_time(end) / 1e3  # milliseconds


@dataclass(frozen=True)
class Stats:
    """Median and quartiles of the seconds of several rounds."""

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

    def to_json(self) -> dict:
        return {"median": self.median, "quartiles": [self.low, self.high], "rounds": self.rounds}


@dataclass(frozen=True)
class Rounds:
    """A number of rounds: at least `least`, and up to `most` while the time lasts."""

    least: int
    most: int

    def fitting(self, round_seconds: float, wanted_seconds: float, left_seconds: float) -> int:
        """Return how many rounds fit in the wanted seconds; fewer than `least` where even those left are too few."""
        fit = max(self.least, min(self.most, int(wanted_seconds / max(round_seconds, 1e-9))))
        return max(FEWEST, min(fit, int(left_seconds / max(round_seconds, 1e-9))))

    def during(self, seconds: float) -> Iterator[int]:
        """Yield the numbers of rounds for as long as the seconds last."""
        budget = Budget(seconds)
        for number in range(self.most):
            if number < self.least or budget.left > 0:
                yield number


def in_turns(samplers: Sequence[Callable[[], object]], rounds: Iterable[int]) -> None:
    """Call all in turn, once in every round, so that a slow phase of the machine falls on all of them."""
    for _ in rounds:
        for sample in samplers:
            sample()


def synchronize() -> None:
    """Wait until the GPU, if it is in use, has done all that it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
