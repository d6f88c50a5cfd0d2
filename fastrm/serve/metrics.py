"""GET /metrics in Prometheus' text format: counts of answers, groups, packs, caches and connections, and the queue."""

from collections.abc import Iterator
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fastrm.serve.connections import Connections
from fastrm.serve.scheduler import Scheduler

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The figures of one server.

    Args:
        scheduler, connections: whose counts are read when they are asked for; no connections: none are counted.
    """

    def __init__(self, scheduler: Scheduler, connections: Connections | None = None):
        self._registry = CollectorRegistry()
        self._registry.register(_Counts(scheduler))
        if connections is not None:
            self._registry.register(_OpenAndClosed(connections))
        self._answers = Histogram(
            "fastrm_request_seconds",
            "Seconds from a request to the end of its answer.",
            ("path", "status"),
            buckets=_SECONDS,
            registry=self._registry,
        )

    def observe(self, path: str, status: int, seconds: float) -> None:
        """Count an answer; status 0 stands for a connection that was lost before it."""
        self._answers.labels(path, str(status)).observe(seconds)

    def text(self) -> bytes:
        """Return all figures as Prometheus reads them."""
        return generate_latest(self._registry)


class _Counts(Collector):
    """The scheduler's counts, read when they are asked for."""

    def __init__(self, scheduler: Scheduler):
        self._scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "fastrm_queue_groups", "Groups that were accepted and have no answer yet.", self._scheduler.queue_length
        )
        for name, value in asdict(self._scheduler.counts).items():
            yield CounterMetricFamily(
                f"fastrm_{name}", f"{name.replace('_', ' ')} since the start.".capitalize(), value
            )


class _OpenAndClosed(Collector):
    """The counts of connections, read when they are asked for."""

    def __init__(self, connections: Connections):
        self._connections = connections

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("fastrm_connections", "Connections that are open.", self._connections.num_open)
        closed = CounterMetricFamily(
            "fastrm_closed_connections", "Connections that were closed at a bound: too many, or slow headers.",
            labels=["reason"],
        )  # fmt: skip
        closed.add_metric(["full"], self._connections.num_refused)
        closed.add_metric(["headers"], self._connections.num_timed_out)
        yield closed
