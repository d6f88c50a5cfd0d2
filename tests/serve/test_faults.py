"""Malformed requests, bodies that do not come, overload, bombs and single responses; -m slow has more of them."""

import base64
import io
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image

from fastrm.evaluate.ensemble import Ensemble
from fastrm.evaluate.reward_model import RewardModel
from fastrm.serve.app import make_app
from fastrm.serve.scheduler import Scheduler
from fastrm.serve.scorer import Scorer
from fastrm.serve.settings import ServeSettings
from tests.helpers.request_bodies import GOOD
from tests.helpers.served import counts
from tests.helpers.servers import running
from tests.helpers.support import make_image, make_model, words
from tests.helpers.waiting import PATIENCE

BAND = 1e-6
@pytest.fixture(scope="module")
def model():
    return RewardModel(make_model("qwen2_5_vl"))


def serve(model, settings=None, scorer=None, **options):
    scheduler = Scheduler([scorer or Scorer("tiny", Ensemble([model]), 8192)], **options)
    return running(make_app(scheduler, settings or ServeSettings()))


@pytest.fixture(scope="module")
def url(model):
    with serve(model) as url:
        yield url


def check_works(model, url):
    answer = httpx.post(f"{url}/v1/rewards", json={"groups": [GOOD]}, timeout=PATIENCE)
    assert answer.json()["rewards"] == model.score([GOOD])
    assert httpx.get(f"{url}/health", timeout=PATIENCE).json()["queue"] == 0


RAW = {
    "two lengths": b"POST /v1/rewards HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "length and chunks": b"POST /v1/rewards HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked"
    b"\r\n\r\n0\r\n\r\nGET /metrics HTTP/1.1\r\nHost: a\r\n\r\n",
    "no request": b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
    "negative length": b"POST /v1/rewards HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n{}",
    "bad chunk": b"POST /v1/rewards HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
    "pipelined": b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n" * 20,
}


@pytest.mark.parametrize("kind", RAW)
def test_malformed_requests_give_nothing_without_the_token(model, kind):
    with serve(model, ServeSettings(token="secret")) as url:
        address = httpx.URL(url)
        with socket.create_connection((address.host, address.port), PATIENCE) as sock:
            sock.sendall(RAW[kind])
            sock.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: sock.recv(65536), b""))
        statuses = [line.split()[1] for line in answer.splitlines() if line.startswith(b"HTTP/1.1")]
        assert set(statuses) <= {b"400", b"401"} and b"fastrm_" not in answer
        assert httpx.get(f"{url}/health").status_code == 200


def test_a_body_that_does_not_come_is_given_up(model):
    with serve(model, ServeSettings(body_seconds=0.2)) as url:
        address = httpx.URL(url)
        with socket.create_connection((address.host, address.port), PATIENCE) as sock:
            sock.sendall(b"POST /v1/rewards HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
            assert b" 408 " in sock.recv(65536)
        check_works(model, url)


@counts(100, 1000)
def test_overload_is_answered_with_503_and_hang_ups_leave_nothing_behind(model, count, monkeypatch):
    num_clients, bound = 20, 8
    scorer, refused = Scorer("tiny", Ensemble([model]), 8192), threading.Event()
    compute = scorer.run
    # Nothing is computed before a request was refused: there are more clients than places in the queue.
    monkeypatch.setattr(scorer, "run", lambda groups: compute(groups) if refused.wait(PATIENCE) else None)
    with serve(model, scorer=scorer, max_queue=bound) as url:
        lengths, ended = [], threading.Event()

        def watch():
            while not ended.wait(0.01):
                lengths.append(httpx.get(f"{url}/health", timeout=PATIENCE).json()["queue"])

        def ask(number):
            body = {"groups": [{"prompt": f"the cat {number}", "responses": ["yes", "no"]}]}
            if number % 10 == 0:  # leaves before its answer
                address = httpx.URL(url)
                text = json.dumps(body).encode()
                head = b"POST /v1/rewards HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(text)
                with socket.create_connection((address.host, address.port), PATIENCE) as sock:
                    sock.sendall(head + text)
                return None
            answer = httpx.post(f"{url}/v1/rewards", json=body, timeout=PATIENCE)
            if answer.status_code == 503:
                refused.set()
            return answer

        watching = threading.Thread(target=watch)
        watching.start()
        with ThreadPoolExecutor(num_clients) as clients:
            answers = [answer for answer in clients.map(ask, range(count)) if answer is not None]
        ended.set()
        watching.join(PATIENCE)
        assert {answer.status_code for answer in answers} == {200, 503} and max(lengths) <= bound
        for answer in answers:
            if answer.status_code == 503:
                assert answer.headers["Retry-After"] and answer.json()["error"]["code"] == "QUEUE_FULL"
        check_works(model, url)


def png_of(width, height):
    """A PNG that declares a size and holds next to nothing."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    "data", [png_of(50_000, 50_000), png_of(10**6, 60), b"", b"GIF89a", make_image(56, 56).data[:200]]
)
def test_image_bombs_are_refused_and_others_have_their_rewards(model, url, data):
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    bomb = {"prompt": "a", "images": [uri], "responses": ["b"]}
    rewards = httpx.post(f"{url}/v1/rewards", json={"groups": [bomb, GOOD]}, timeout=PATIENCE).json()["rewards"]
    assert rewards[0]["error"]["code"].startswith(("IMAGE_", "BAD_"))
    assert rewards[1:] == model.score([GOOD])


@counts(40, 1000)
def test_pairs_asked_in_any_order_and_company_prefer_the_same_response(model, count):
    rng = np.random.default_rng(count)
    pairs = [{"prompt": words(rng, int(rng.integers(2, 60))), "responses": [words(rng, int(rng.integers(1, 40)))
              for _ in range(2)]} for _ in range(count)]  # fmt: skip
    wanted = np.array(model.score(pairs))
    asked = [(number, side) for number in range(count) for side in (0, 1)]
    rng.shuffle(asked)

    with serve(model, window_ms=20) as url, ThreadPoolExecutor(24) as clients:

        def ask(place):
            number, side = place
            group = {"prompt": pairs[number]["prompt"], "responses": [pairs[number]["responses"][side]]}
            answer = httpx.post(f"{url}/v1/rewards", json={"groups": [group]}, timeout=PATIENCE)
            return answer.json()["rewards"][0][0]

        found = np.zeros_like(wanted)
        for (number, side), reward in zip(asked, clients.map(ask, asked), strict=True):
            found[number, side] = reward
    assert np.abs(found - wanted).max() <= BAND
    flipped = (np.diff(found) > 0) != (np.diff(wanted) > 0)
    assert not (flipped & (np.abs(np.diff(wanted)) > 2 * BAND)).any()
