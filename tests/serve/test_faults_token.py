"""Without the server's token there is nothing to be had, on any route and by no trick with lengths.

`python -m pytest -m slow -s tests/serve/test_faults_token.py` sends 1,000 wrong tokens and 1,000 requests that
contradict themselves.
"""

import random
import socket
import string
from collections import Counter
from contextlib import suppress

import pytest

from fastrm.serve.app import make_app
from fastrm.serve.scheduler import Scheduler
from fastrm.serve.settings import ServeSettings
from tests.helpers.killed_runs import server  # noqa: F401  (fixture)
from tests.helpers.served import counts, folder, routes_of, serving  # noqa: F401  (fixture)

TOKEN = "a-secret"
# Every route and its method: a new one is entered here, and in OPEN only if nothing of the models can be had by it.
ROUTES = {
    ("GET", "/"), ("GET", "/activity"), ("GET", "/health"), ("GET", "/metrics"), ("GET", "/page/examples.js"),
    ("GET", "/page/page.css"), ("GET", "/page/page.js"), ("GET", "/v1/models"), ("POST", "/classify"),
    ("POST", "/get_reward"), ("POST", "/get_reward_mllm"), ("POST", "/pooling"), ("POST", "/score"), ("POST", "/slime"),
    ("POST", "/v1/embeddings"), ("POST", "/v1/rewards"), ("POST", "/v1/score"),
}  # fmt: skip
OPEN = {"/", "/health", "/page/examples.js", "/page/page.css", "/page/page.js"}
METHODS = ["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "HEAD", "TRACE", "BREW"]


@pytest.fixture(scope="module")
def served(server, folder, tmp_path_factory):  # noqa: F811
    with serving(server, folder, tmp_path_factory.mktemp("served") / "log", token=TOKEN) as served:
        yield served


def wrong_header(rng):
    """Headers with a token that is missing, near the right one, of another scheme, long, or any bytes."""
    near = rng.choice([TOKEN[:-1], TOKEN + "s", TOKEN.upper(), f"{TOKEN} {TOKEN}", f"{TOKEN}\t1", "", TOKEN[::-1]])
    text = "".join(rng.choices(string.ascii_letters + "=:,;/+-_", k=rng.choice([1, 8, 100, 10_000])))
    odd = bytes(rng.randrange(0x80, 0x100) for _ in range(8)).decode("latin-1")
    value = rng.choice([near, text, odd])
    name = rng.choice(["Authorization"] * 4 + ["X-Token", "Cookie", "Proxy-Authorization"])
    scheme = rng.choice(["Bearer ", "bearer  ", "Basic ", "Token ", "Digest ", "Bearer,", ""])
    return {} if rng.random() < 0.1 else {name: scheme + (value if name == "Authorization" else TOKEN)}


@counts(100, 1000)
def test_a_wrong_token_opens_no_route_by_any_method(served, count):
    rng, client, statuses = random.Random(count), served.client(), Counter()
    closed = [(method, path) for path in sorted({path for _, path in ROUTES} - OPEN) for method in METHODS]
    for number in range(count):
        method, path = closed[number % len(closed)]
        headers = wrong_header(rng)
        status, _, text = client.ask(method, path, b"{}" if method == "POST" else None, headers)
        statuses[status] += 1
        assert status in (400, 401) and b"fastrm_" not in text, (method, path, headers, text)
    print(f"{count} wrong tokens: {statuses}")
    assert client.ask("GET", "/metrics", headers={"Authorization": f"Bearer {TOKEN}"})[0] == 200


INSIDE = b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"
LENGTHS = [b"0", b"2", b"5", b"-1", b"+2", b"0x2", b"2, 3", b"2 ", b" 2", b"1e1", b"9" * 30, b"\xb2", b"02"]
CODINGS = [b"chunked", b"Chunked", b"chunked, identity", b"identity", b"xchunked", b"chunked\t", b"gzip, chunked", b""]
NAMES = [b"Content-Length", b"content-length", b"Content_Length", b"Content-Length "]


def contradictory(rng):
    """A request with up to two lengths and two codings, in any order, whose body holds another request."""
    headers = [b"Host: a"]
    headers += [rng.choice(NAMES) + b":" + rng.choice(LENGTHS) for _ in range(rng.randint(0, 2))]
    headers += [b"Transfer-Encoding:" + rng.choice(CODINGS) for _ in range(rng.randint(0, 2))]
    rng.shuffle(headers)
    method, path = rng.choice(sorted(ROUTES - {("GET", place) for place in OPEN}))
    end = rng.choice([b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r"])
    line = f"{method} {path} HTTP/{rng.choice(['1.1', '1.1', '1.0', '2.0', '0.9'])}".encode()
    chunk = b"%x" % len(INSIDE) + rng.choice([b"", b";a=b", b" "])
    body = rng.choice([b"{}", b"0\r\n\r\n", chunk + b"\r\n" + INSIDE + b"\r\n0\r\n\r\n", b"zz\r\n", b""])
    return end.join([line, *headers, b"", b""]) + body + INSIDE * rng.choice([0, 1, 3, 20])


@counts(100, 1000)
def test_contradictory_and_pipelined_requests_give_nothing(served, count):
    rng, statuses = random.Random(count), Counter()
    for _ in range(count):
        request = contradictory(rng)
        with served.connect() as sock:
            answer = bytearray()
            with suppress(OSError):  # it was refused, and the connection closed, before all of it was sent
                sock.sendall(request)
                sock.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                while part := sock.recv(65536):
                    answer += part
        found = [line.split()[1] for line in bytes(answer).splitlines() if line.startswith(b"HTTP/1.1")]
        statuses.update(found or [b"none"])
        assert set(found) <= {b"400", b"401"} and b"fastrm_" not in answer, (request, answer)
    print(f"{count} contradictory requests: {statuses}")
    assert served.client().ask("GET", "/health")[0] == 200


def test_every_route_is_known_and_only_the_open_ones_answer(served):
    assert {(method, path) for path, method in routes_of(make_app(Scheduler([]), ServeSettings()))} == ROUTES
    client = served.client()
    answered = {path for method, path in ROUTES if client.ask(method, path)[0] != 401}
    assert answered == OPEN
