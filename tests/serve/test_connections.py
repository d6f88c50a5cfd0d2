"""Bounds of connections: their number, how long their headers may take, and how long they may be idle."""

import asyncio
import json
import resource
import socket
import threading
import time
from contextlib import closing, contextmanager
from http.client import HTTPConnection

import pytest

from fastrm.serve import connections as module
from fastrm.serve.app import make_app
from fastrm.serve.connections import Connections, allow_open
from fastrm.serve.scheduler import Scheduler
from fastrm.serve.settings import ServeSettings
from tests.helpers.waiting import PATIENCE, wait_until

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Application:
    """An ASGI application whose answer to every request takes some seconds.

    Attributes:
        num_asked: the number of requests.
    """

    def __init__(self, seconds=0.0):
        self._seconds, self.num_asked = seconds, 0

    async def __call__(self, scope, receive, send):
        assert scope["type"] == "http"  # uvicorn first asks for a lifespan; an error means that there is none
        self.num_asked += 1
        await asyncio.sleep(self._seconds)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"{}"})


@contextmanager
def served(app, bounds):
    """Serve an application in a thread; yields its address."""
    server = bounds.make_server(app, PATIENCE)
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        running = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        running.start()
        try:
            wait_until(lambda: server.started or not running.is_alive())
            yield listener.getsockname()
        finally:
            server.should_exit = True
            running.join(PATIENCE)


def send_until_closed(sock, more):
    """Send bytes again and again until the server has closed the connection; return what it has sent."""
    sock.settimeout(0.01)
    found, deadline = b"", time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            sock.sendall(more)
            if not (data := sock.recv(65536)):
                return found
            found += data
        except TimeoutError:
            continue
        except ConnectionError:
            return found
    raise AssertionError("the server has kept the connection")


# What a client sends at once, and what it goes on with.
SLOW = {
    "silent": (b"", b""),
    "line": (b"POST /v1/rew", b"a"),
    "headers": (b"POST /v1/rewards HTTP/1.1\r\nHost: localhost\r\nX-A: ", b"a"),
    "later request": (REQUEST, b"a"),
    "body after the answer": (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000\r\n\r\n", b"a"),
}


@pytest.mark.parametrize("kind", SLOW)
def test_a_connection_whose_headers_do_not_come_is_closed_and_counted(kind):
    first, more = SLOW[kind]
    is_later = kind in ("later request", "body after the answer")
    bounds = Connections(10, header_seconds=PATIENCE if is_later else 0.3)
    with served(Application(), bounds) as address, socket.create_connection(address, PATIENCE) as sock:
        sock.sendall(first)
        if is_later:  # the time begins anew with the first byte after an answer
            assert b"200 OK" in sock.recv(65536)
            bounds.header_seconds = 0.3
        assert send_until_closed(sock, more) in (b"", b"{}")
        wait_until(lambda: bounds.num_open == 0)
        assert bounds.num_timed_out == 1 and bounds.num_refused == 0


@pytest.mark.parametrize("num_requests", [1, 3], ids=["one", "pipelined"])
def test_headers_that_have_come_give_the_answer_all_its_time(num_requests):
    """Also where the answer takes longer than the headers may."""
    app, bounds = Application(seconds=0.5), Connections(10, header_seconds=0.2)
    with served(app, bounds) as address:
        while True:
            with socket.create_connection(address, PATIENCE) as sock:
                sock.sendall(REQUEST * num_requests)
                found = b""
                while found.count(b"{}") < num_requests and (data := sock.recv(65536)):
                    found += data
                if found or app.num_asked:
                    break  # else this client was too slow for the server, beside other work
        assert found.count(b"{}") == num_requests


def test_connections_over_the_bound_get_503_and_make_no_trouble_for_the_others():
    bounds = Connections(2, header_seconds=PATIENCE)
    with served(Application(), bounds) as address:
        kept = [socket.create_connection(address, PATIENCE) for _ in range(2)]
        wait_until(lambda: bounds.num_open == 2)
        with closing(HTTPConnection(*address, timeout=PATIENCE)) as client:
            client.connect()
            wait_until(lambda: bounds.num_refused == 1)
            answer = client.response_class(client.sock)
            answer.begin()
            assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
            assert json.loads(answer.read())["error"]["code"] == "CONNECTIONS_FULL"
        wait_until(lambda: bounds.num_open == 2)
        kept.pop().close()
        wait_until(lambda: bounds.num_open == 1)
        with socket.create_connection(address, PATIENCE) as sock:
            for one in (sock, *kept):
                one.sendall(REQUEST)
                assert one.recv(65536).startswith(b"HTTP/1.1 200")
        assert bounds.num_refused == 1 and bounds.num_timed_out == 0
        for one in kept:
            one.close()


@pytest.mark.parametrize("seconds", [None, 0], ids=["as it is", "none"])
def test_a_connection_is_kept_for_longer_than_trainers_clients_keep_it(monkeypatch, seconds):
    if seconds is not None:
        monkeypatch.setattr(module, "_KEEP_ALIVE_SECONDS", seconds)
    assert (module._KEEP_ALIVE_SECONDS > 15) == (seconds is None)  # 15 s: aiohttp
    bounds = Connections(10, PATIENCE)
    with served(Application(), bounds) as address, closing(HTTPConnection(*address, timeout=PATIENCE)) as client:
        client.request("GET", "/")
        assert client.getresponse().read() == b"{}"
        connection = client.sock
        if seconds == 0:
            assert connection.recv(1) == b""
        else:
            client.request("GET", "/")
            assert client.getresponse().read() == b"{}" and client.sock is connection


def test_metrics_count_connections():
    bounds = Connections(1, 10.0)
    app = make_app(Scheduler([]), ServeSettings(), bounds)
    with served(app, bounds) as address, closing(HTTPConnection(*address, timeout=PATIENCE)) as client:
        client.connect()
        wait_until(lambda: bounds.num_open == 1)
        with socket.create_connection(address, PATIENCE) as refused:
            assert b"CONNECTIONS_FULL" in refused.recv(65536)
        wait_until(lambda: bounds.num_open == 1)
        client.request("GET", "/metrics")
        lines = client.getresponse().read().decode().splitlines()
    assert "fastrm_connections 1.0" in lines
    assert 'fastrm_closed_connections_total{reason="full"} 1.0' in lines
    assert 'fastrm_closed_connections_total{reason="headers"} 0.0' in lines


INFINITE = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    "soft, hard, found, raised",
    [(8192, 8192, 4096, 8192), (1024, 65536, 4096, 4352), (1024, INFINITE, 4096, 4352), (1024, 1024, 768, 1024),
     (100, 200, 1, 200), (INFINITE, INFINITE, 4096, INFINITE)],
)  # fmt: skip
def test_the_bound_is_within_the_files_that_the_process_may_open(monkeypatch, soft, hard, found, raised):
    limits = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, given: limits.append(given))
    assert allow_open(4096) == found and limits[-1] == (raised, hard)
