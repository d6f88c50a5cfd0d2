"""What the page shows of the server's last minute."""

import asyncio

import pytest

from fastrm.serve.activity import WINDOW, Activity, ActivityMiddleware


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


@pytest.mark.parametrize("method, path", [("POST", "/v1/rewards"), ("GET", "/metrics"), ("POST", "/" + "x" * 10_000)])
def test_the_middleware_keeps_posts_with_their_status_and_rewards(clock, method, path):
    async def app(scope, receive, send):
        scope["state"]["rewards"] = 4
        await send({"type": "http.response.start", "status": 418})
        await send({"type": "http.response.body", "body": b"tea"})

    async def send(message):
        sent.append(message["type"])

    sent, activity = [], Activity(clock)
    scope = {"type": "http", "method": method, "path": path, "state": {}}
    asyncio.run(ActivityMiddleware(app, activity)(scope, None, send))
    assert sent == ["http.response.start", "http.response.body"]
    kept = activity.report(0)["recent"]
    if method == "GET":
        assert kept == []
    else:
        assert [(one["status"], one["rewards"]) for one in kept] == [(418, 4)] and len(kept[0]["path"]) < 100


def test_the_middleware_keeps_what_fails(clock):
    async def app(scope, receive, send):
        raise ZeroDivisionError

    activity = Activity(clock)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(ActivityMiddleware(app, activity)({"type": "http", "method": "POST", "path": "/p"}, None, None))
    assert [one["status"] for one in activity.report(0)["recent"]] == [500]
