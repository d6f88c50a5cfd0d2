"""Malformed requests, bodies that do not come, and overload; -m slow has more of them."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from fastrm.evaluate.ensemble import Ensemble
from fastrm.serve.app import make_app
from fastrm.serve.scheduler import Scheduler
from fastrm.serve.scorer import Scorer
from fastrm.serve.settings import ServeSettings
from tests.helpers.request_bodies import GOOD
from tests.helpers.served import counts
from tests.helpers.servers import running
from tests.helpers.waiting import PATIENCE


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
