"""Bodies of requests: read off the event loop where they are not small, and bounded in all that are under way."""

import asyncio
import json
import socket
from contextlib import ExitStack

import httpx
import pytest
from pydantic import ValidationError

from fastrm.serve import app
from fastrm.serve.app import make_app
from fastrm.serve.protocols.openrlhf import GetReward
from fastrm.serve.protocols.r1_reward import GetRewardMllm
from fastrm.serve.protocols.sglang import Embeddings, NativeInput
from fastrm.serve.protocols.vllm import ChatInput, Score, TextInput
from fastrm.serve.scheduler import Scheduler
from fastrm.serve.settings import ServeSettings
from tests.helpers.servers import running
from tests.helpers.waiting import PATIENCE, wait_until


class Empty:
    """A model that no group reaches."""

    name, tokens_per_pack, reader = "empty", 100, None


def serve(settings=None):
    return running(make_app(Scheduler([Empty()]), settings or ServeSettings()))


def on_loop():
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("length, is_on_loop", [(10, True), (100_000, False)], ids=["small", "large"])
def test_a_body_that_is_not_small_is_decoded_and_checked_in_another_thread(monkeypatch, length, is_on_loop):
    found = []

    def noted(function):
        return lambda *arguments: found.append(on_loop()) or function(*arguments)

    monkeypatch.setattr(app, "decode_json", noted(app.decode_json))
    monkeypatch.setattr(GetReward, "model_validate", noted(GetReward.model_validate))
    with serve() as url:
        answer = httpx.post(f"{url}/get_reward", json={"query": "a" * length}, timeout=PATIENCE)
    assert answer.status_code == 400 and found == [is_on_loop] * 2


@pytest.mark.parametrize("value", ["[]", "{}", "0", '"a"'])
def test_a_body_of_very_many_values_is_refused_before_it_is_decoded(monkeypatch, value):
    monkeypatch.setattr(app, "_MAX_VALUES", 1000)
    with serve() as url:
        for count, status in ((200, 400), (1001, 413)):  # 400: what it has are no groups
            body = '{"group": [' + ",".join([value] * count) + "]}"
            answer = httpx.post(f"{url}/v1/rewards", content=body, timeout=PATIENCE)
            assert answer.status_code == status
    assert answer.json()["error"]["code"] == "REQUEST_TOO_LARGE"


def test_bodies_under_way_are_bounded_together_and_make_room_when_they_have_ended():
    settings = ServeSettings(max_body_bytes=1000)
    head = b"POST /v1/rewards HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"

    with serve(settings) as url, ExitStack() as stack:
        address = httpx.URL(url)
        sockets = [
            stack.enter_context(socket.create_connection((address.host, address.port), PATIENCE)) for _ in range(8)
        ]
        for sock in sockets:
            sock.sendall(head + b"{" + b" " * 989)

        def ask():
            return httpx.post(f"{url}/v1/rewards", content=json.dumps({"groups": 1}).ljust(900), timeout=PATIENCE)

        refused = []

        def is_full():
            answer = ask()
            refused.append(answer)
            return answer.status_code == 503

        wait_until(is_full)  # the server has read what the sockets sent
        assert refused[-1].json()["error"]["code"] == "BODIES_FULL" and refused[-1].headers["Retry-After"]
        assert all(answer.status_code == 400 for answer in refused[:-1])
        assert httpx.get(f"{url}/health", timeout=PATIENCE).status_code == 200
        for sock in sockets[:2]:
            sock.sendall(b"}" + b" " * 9)
            assert b" 400 " in sock.recv(65536)
        assert ask().status_code == 400


@pytest.mark.parametrize("kind", [GetReward, GetRewardMllm, NativeInput, Embeddings, TextInput, ChatInput, Score])
def test_a_list_of_wrong_entries_is_left_at_the_first(kind):
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({name: [1.5] * 1000 for name in kind.model_fields})
    assert caught.value.error_count() < 50
