"""The latest doings of a reward server, as its page shows them: requests, rate and latency of the last minute."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

WINDOW = 60.0  # seconds that rate and latency are of
_KEPT = 10_000  # requests; of more in a minute the latest count
_SHOWN = 20  # requests in a report


@dataclass(frozen=True)
class Request:
    """An answered request.

    Attributes:
        ended: when its answer ended, in seconds of the log's clock.
        path: of its route.
        seconds: from its arrival until then.
        rewards: the number of rewards in the answer.
    """

    ended: float
    path: str
    status: int
    seconds: float
    rewards: int


class Activity:
    """The requests of the last minute.

    Args:
        clock: returns seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time.time):
        self._clock, self._started = clock, clock()
        self._requests: deque[Request] = deque(maxlen=_KEPT)

    def add(self, path: str, status: int, seconds: float, rewards: int) -> None:
        """Keep a request whose answer has just ended."""
        self._requests.append(Request(self._clock(), path, status, seconds, rewards))

    def report(self, waiting: int) -> dict:
        """Return the figures as the page reads them.

        Args:
            waiting: the number of requests that wait to be computed.
        """
        now = self._clock()
        since = max(self._started, now - WINDOW)
        if len(self._requests) == _KEPT:
            since = max(since, self._requests[0].ended)
        recent = [request for request in self._requests if request.ended >= since]
        milliseconds = sorted(1000 * request.seconds for request in recent if request.status == 200)
        return {
            "waiting": waiting,
            "rewards_per_second": sum(request.rewards for request in recent) / max(1.0, now - since),
            "latency_ms": {"p50": _quantile(milliseconds, 0.50), "p99": _quantile(milliseconds, 0.99)},
            "recent": [
                {"time": one.ended, "path": one.path, "status": one.status, "rewards": one.rewards,
                 "ms": 1000 * one.seconds}
                for one in list(self._requests)[: -_SHOWN - 1 : -1]
            ],
        }  # fmt: skip


def _quantile(ordered: list[float], share: float) -> float | None:
    """Return the smallest value that so large a share of the values do not exceed; None of no values."""
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else None
