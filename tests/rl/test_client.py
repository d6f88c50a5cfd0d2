"""The client by URL: one question for each prompt, trying again as the server means it, and no wait without an end."""

import asyncio
import json
import os
import pickle
import socket
import threading
import time

import numpy as np
import pytest

from fastrm.errors import ConfigError, GroupError
from fastrm.evaluate.reward_model import RewardModel
from fastrm.rl.client import Client, ServerError
from tests.helpers.reward_server import CountingScorer, Reply, real_server, reward_server
from tests.helpers.support import make_image, make_model
from tests.helpers.waiting import PATIENCE

IMAGE_PART, TEXT_PART = {"type": "image"}, {"type": "text", "text": "So?"}
GROUPS = [{"prompt": f"question {n}", "responses": ["yes", "no", f"{n}"]} for n in range(5)]


def by_both(client, groups, **options):
    """The results of the two ways to call a client, which must be equal."""
    found = client.score(groups, **options)
    assert [str(one) for one in asyncio.run(client.score_async(groups, **options))] == [str(one) for one in found]
    return found


def assert_close(found, wanted):
    """Rewards agree to rounding: what else is packed with a group is not the same each time."""
    assert [len(one) for one in found] == [len(one) for one in wanted]
    assert np.concatenate(found) == pytest.approx(np.concatenate(wanted), abs=1e-5)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr("fastrm.rl.client.random.uniform", lambda low, high: 0.01)


def test_rewards_by_url_are_those_of_the_model():
    model = RewardModel(make_model("qwen2_5_vl"))
    image = make_image(60, 40).data
    groups = [
        {"prompt": "What is it?", "images": [image], "responses": ["a cat", "a dog", "a cat"]},
        {"messages": [{"role": "user", "content": [IMAGE_PART | {"image": image}, TEXT_PART]}], "responses": ["yes"]},
        {"prompt": "Is this a <<image>>?", "responses": ["no", ""]},
    ]  # fmt: skip
    pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    other = RewardModel(make_model("qwen2_5_vl", seed=1))
    with real_server(tiny=model, other=other) as url:
        assert_close(Client(url).score(groups), model.score(groups))
        assert_close(asyncio.run(Client(url).score_async(groups)), model.score(groups))
        assert_close(Client(url, model="other").score(groups), other.score(groups))
        bad = [groups[0], {"prompt": "x", "images": [b"no image"], "responses": ["a"]}, groups[2]]
        found = Client(url).score(bad, on_error="return")
        assert_close(found[::2], model.score(groups[::2]))
        assert (found[1].index, found[1].code) == (1, "IMAGE_FORMAT")
        with pytest.raises(ServerError, match=r"HTTP 404: .*MODEL_UNKNOWN"):
            Client(url, model="third").score(groups)
        with pytest.raises(ServerError, match=r"HTTP 413: .*REQUEST_TOO_LARGE"):
            Client(url, max_groups=100).score(GROUPS * 13)
        assert_close(Client(url).score(GROUPS * 13), model.score(GROUPS) * 13)


def test_many_groups_go_in_requests_that_the_server_takes(monkeypatch):
    with reward_server(CountingScorer()) as (url, bodies):
        whole = Client(url).score(GROUPS)
        assert by_both(Client(url, max_groups=2), GROUPS) == whole
        assert [len(body["groups"]) for body in bodies] == [5, 2, 2, 1, 2, 2, 1]
        bodies.clear()
        monkeypatch.setattr("fastrm.rl.wire.MAX_BYTES", len(json.dumps(GROUPS[0])) * 4)
        assert Client(url).score(GROUPS) == whole and len(bodies) > 1


def test_a_group_that_cannot_be_sent_or_scored_is_named_alone(tmp_path):
    groups = [GROUPS[0], {"prompt": "x", "images": [str(tmp_path / "none.png")], "responses": ["a"]},
              {"prompt": "x", "responses": ["unscorable"]}, {"prompt": "x", "responses": []}, GROUPS[1]]  # fmt: skip
    with reward_server(CountingScorer()) as (url, _):
        found = by_both(Client(url), groups, on_error="return")
        assert found[::4] == Client(url).score(GROUPS[:2])
        assert [(one.index, one.code) for one in found[1:4]] == [(1, "IMAGE_MISSING"), (2, "TOO_LONG"), (3, "BAD_ROW")]
        with pytest.raises(GroupError, match=r"none\.png"):
            Client(url).score(groups)


@pytest.mark.parametrize(
    "reply",
    [Reply(503, headers={"Retry-After": "0"}), Reply(503), Reply(502), Reply(504), Reply(hang_up=True),
     Reply(headers={"Content-Encoding": "gzip"})],
    ids=["503 with a time", "503", "502", "504", "lost connection", "damaged"],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_overload_and_lost_connections_are_tried_again(reply, is_async):
    with reward_server(CountingScorer(), [reply, reply]) as (url, bodies):
        client = Client(url)
        found = asyncio.run(client.score_async(GROUPS)) if is_async else client.score(GROUPS)
        assert found == Client(url).score(GROUPS)
        assert client.num_retries == 2 and len(bodies) == 4


def test_waits_grow_and_are_never_shorter_than_the_server_says(monkeypatch):
    """A server that is overloaded says one second to all; clients that believe it alone come back together for ever."""
    waits = []
    monkeypatch.setattr("fastrm.rl.client.time.sleep", waits.append)
    monkeypatch.setattr("fastrm.rl.client.random.uniform", lambda low, high: low)
    named = ("1", "1", "1", "1", "7", "86400", "soon", "-3")
    with reward_server(CountingScorer(), [Reply(503, headers={"Retry-After": value}) for value in named]) as (url, _):
        Client(url).score(GROUPS)
    assert waits == [1.0, 1.0, 2.0, 4.0, 8.0, 30.0, 30.0, 30.0]
    waits.clear()
    monkeypatch.setattr("fastrm.rl.client.random.uniform", lambda low, high: high)
    with reward_server(CountingScorer(), [Reply(503, headers={"Retry-After": "1"})]) as (url, _):
        Client(url).score(GROUPS)
    assert waits[0] > 1, "clients that were refused together come back at different times"


@pytest.mark.parametrize("is_async", [False, True])
def test_overload_is_waited_for_by_time_and_not_by_tries(is_async):
    replies = [Reply(503, headers={"Retry-After": "1"})] * 20
    with reward_server(CountingScorer(), replies) as (url, bodies):
        client = Client(url, tries=2)
        found = asyncio.run(client.score_async(GROUPS)) if is_async else client.score(GROUPS)
        assert found == Client(url).score(GROUPS) and len(bodies) == 22
    with reward_server(CountingScorer(), replies) as (url, bodies):
        with pytest.raises(ServerError, match=r"overloaded for [0-9.]+ s, at last HTTP 503.*; raise patience"):
            client = Client(url, patience=1e-9)
            asyncio.run(client.score_async(GROUPS)) if is_async else client.score(GROUPS)
        assert len(bodies) == 1


def test_a_forked_process_opens_a_connection_of_its_own():
    """Two processes on one connection would read each other's answers, and the server parts of two requests."""
    with reward_server(CountingScorer()) as (url, bodies):
        client = Client(url, tries=1)
        whole = client.score(GROUPS)
        child = os.fork()
        if child == 0:
            right = False
            try:
                right = client.score(GROUPS) == whole
            finally:
                os._exit(0 if right else 1)
        assert os.waitpid(child, 0)[1] == 0 and client.score(GROUPS) == whole
        parent, forked, parent_again = (body["peer"] for body in bodies)
        assert parent == parent_again != forked


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 429, 500])
@pytest.mark.parametrize("is_async", [False, True])
def test_what_the_server_refuses_is_not_repeated(status, is_async):
    reply = Reply(status, b'{"code": "BAD_ROW", "message": "a number, wanted text"}')
    with reward_server(CountingScorer(), [reply] * 9) as (url, bodies):
        with pytest.raises(ServerError, match=rf"{url}/v1/rewards: HTTP {status}: .*wanted text"):
            asyncio.run(Client(url).score_async(GROUPS)) if is_async else Client(url).score(GROUPS)
        assert len(bodies) == 1


@pytest.mark.parametrize("is_async", [False, True])
def test_a_server_that_is_gone_is_named(is_async):
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # nobody listens here
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        with pytest.raises(ServerError, match=rf"{url}/v1/rewards: no rewards in 3 tries, at last ConnectError"):
            client = Client(url, tries=3)
            asyncio.run(client.score_async(GROUPS)) if is_async else client.score(GROUPS)


@pytest.mark.parametrize("trickles", [False, True], ids=["silent", "trickling"])
@pytest.mark.parametrize("is_async", [False, True])
def test_a_server_that_does_not_finish_is_left(trickles, is_async):
    """A server that trickles keeps the connection busy for ever, so that a limit on silence is not enough."""
    ends = threading.Event()

    def serve(listener):
        while not ends.is_set():
            try:
                connection = listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=trickle, args=(connection,), daemon=True).start()

    def trickle(connection):
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" if trickles else b"")
        while not ends.wait(0.02):
            try:
                connection.sendall(b" " if trickles else b"")
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        client = Client(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.3, tries=2)
        started = time.monotonic()
        with pytest.raises(ServerError, match=r"no rewards in 2 tries, at last (TimeoutError|ReadTimeout)"):
            asyncio.run(client.score_async(GROUPS)) if is_async else client.score(GROUPS)
        assert time.monotonic() - started < PATIENCE
        ends.set()


@pytest.mark.parametrize(
    "body, said",
    [
        (b"[]", 'no list under "rewards"'), (b"not JSON", "Expecting value"),
        (b'{"rewards": [[1.0]]}', "rewards of 1 groups, wanted 5"),
        (b'{"rewards": [[1, 2, 3], [1, 2], null, null, null]}', "2 rewards, wanted 3"),
        (b'{"rewards": [null, [1, 2], null, null, null]}', "None rewards, wanted 3"),
        (b'{"rewards": [[1, 2, NaN], null, null, null, null]}', "no finite numbers"),
        (b'{"rewards": [[1, 2, true], null, null, null, null]}', "no finite numbers"),
    ],
)  # fmt: skip
def test_what_are_no_rewards_is_refused(body, said):
    with reward_server(CountingScorer(), [Reply(body=body)]) as (url, _), pytest.raises(ServerError, match=said):
        Client(url).score(GROUPS)


def test_settings_that_cannot_be_are_named():
    for url in ("127.0.0.1:8000", "", "ftp://x"):
        with pytest.raises(ConfigError, match=r"wanted one such as http://"):
            Client(url)
    with pytest.raises(ConfigError, match="all must be positive"):
        Client("http://x", tries=0)
    with pytest.raises(ConfigError, match="all must be positive"):
        Client("http://x", patience=0)
    with reward_server(CountingScorer()) as (url, _), pytest.raises(ConfigError, match="on_error"):
        Client(url).score(GROUPS, on_error="ignore")


def test_token_is_sent_and_a_client_can_go_to_another_process(monkeypatch):
    monkeypatch.delenv("FASTRM_TOKEN", raising=False)
    with reward_server(CountingScorer()) as (url, bodies):
        client = pickle.loads(pickle.dumps(Client(url + "/", token="secret", tries=3, patience=7)))
        assert (client.tries, client.patience) == (3, 7) and client.score(GROUPS[:1]) == Client(url).score(GROUPS[:1])
        monkeypatch.setenv("FASTRM_TOKEN", "of the environment")
        Client(url).score(GROUPS[:1])
    assert [body["token"] for body in bodies] == ["Bearer secret", None, "Bearer of the environment"]
