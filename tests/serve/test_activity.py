"""What the page shows of the server's last minute."""

import pytest
from fastapi.testclient import TestClient

from fastrm.evaluate.ensemble import Ensemble
from fastrm.serve.activity import WINDOW, Activity
from fastrm.serve.app import make_app
from fastrm.serve.scheduler import Scheduler
from fastrm.serve.scorer import Scorer
from fastrm.serve.settings import ServeSettings


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_nothing_yet(clock):
    report = Activity(clock).report(waiting=3)
    assert report == {
        "waiting": 3, "rewards_per_second": 0.0, "latency_ms": {"p50": None, "p99": None}, "recent": [],
    }  # fmt: skip


def test_latencies_are_of_good_answers_and_the_rate_of_the_time_that_has_passed(clock):
    activity = Activity(clock)
    for number in range(1, 101):
        activity.add("/v1/rewards", 200, number / 1000, 8)
    activity.add("/v1/rewards", 503, 99.0, 0)
    clock.now += 10
    report = activity.report(0)
    assert report["latency_ms"] == {"p50": pytest.approx(50), "p99": pytest.approx(99)}
    assert report["rewards_per_second"] == pytest.approx(100 * 8 / 10)
    assert [request["status"] for request in report["recent"]] == [503, *[200] * 19]


def test_what_is_older_than_the_window_counts_no_more_and_is_still_shown(clock):
    activity = Activity(clock)
    activity.add("/v1/rewards", 200, 5.0, 100)
    clock.now += WINDOW + 1
    activity.add("/slime", 200, 0.25, 2)
    report = activity.report(0)
    assert report["rewards_per_second"] == pytest.approx(2 / WINDOW)
    assert report["latency_ms"]["p99"] == 250
    assert [request["path"] for request in report["recent"]] == ["/slime", "/v1/rewards"]


def test_where_more_requests_come_than_are_kept_the_rate_is_of_their_time(clock, monkeypatch):
    monkeypatch.setattr("fastrm.serve.activity._KEPT", 10)
    activity = Activity(clock)
    for _ in range(50):
        clock.now += 0.5
        activity.add("/v1/rewards", 200, 0.1, 3)
    assert activity.report(0)["rewards_per_second"] == pytest.approx(3 * 10 / 4.5)


def test_the_application_keeps_what_was_asked_for_rewards(model):
    scheduler = Scheduler([Scorer("tiny", Ensemble([model]), 8192)])
    with TestClient(make_app(scheduler, ServeSettings(token="secret"))) as client:
        client.post("/v1/rewards", json={})
        client.headers["Authorization"] = "Bearer secret"
        client.get("/metrics")
        client.post("/" + "x" * 10_000)
        client.post("/v1/rewards", content=b"{")
        good, bad = {"prompt": "the", "responses": ["a", "b", "c"]}, {"prompt": "the"}
        client.post("/v1/rewards", json={"groups": [good, bad, good]})
        kept = client.get("/activity").json()["recent"]
    assert [(one["path"], one["status"], one["rewards"]) for one in kept] == [
        ("/v1/rewards", 200, 6), ("/v1/rewards", 400, 0), ("other", 404, 0), ("other", 401, 0),
    ]  # fmt: skip
