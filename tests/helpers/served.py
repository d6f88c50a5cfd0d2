"""`fastrm serve` in a process of its own that has nothing to import, and clients that cost little."""

import http.client
import os
import re
import signal
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from fastapi import FastAPI
from starlette.routing import Route

from fastrm.model.export import save_model
from tests.helpers.killed_runs import ForkServer
from tests.helpers.support import make_model
from tests.helpers.waiting import PATIENCE, wait_until


def counts(few: int, many: int):
    """Parametrise a test's `count`: few by default, many with ``-m slow``."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


def routes_of(app: FastAPI) -> list[tuple[str, str]]:
    """Every path of an application with each of its methods."""
    return sorted((path, method) for path, methods in _paths(app.routes) for method in methods)


def _paths(routes: Iterable) -> Iterator[tuple[str, set[str]]]:
    for route in routes:
        if isinstance(route, Route) or hasattr(route, "methods"):
            yield route.path, route.methods
        else:
            yield from _paths(route.original_router.routes if hasattr(route, "original_router") else route.routes)


class Client:
    """A connection that is kept open from one request to the next, as long as the server does."""

    def __init__(self, port: int):
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Return the status, headers and body of an answer."""
        was_open = self._connection.sock is not None
        try:
            return self._ask(method, path, body, headers or {})
        except (http.client.RemoteDisconnected, ConnectionError):
            self._connection.close()
            if not was_open:
                raise
            return self._ask(method, path, body, headers or {})  # the server had closed it, which it may when idle

    def _ask(self, *request) -> tuple[int, http.client.HTTPMessage, bytes]:
        self._connection.request(*request)
        answer = self._connection.getresponse()
        return answer.status, answer.headers, answer.read()

    def close(self) -> None:
        self._connection.close()


@dataclass
class Served:
    """A server in a process.

    Attributes:
        code: of its exit, once `wait` has returned.
    """

    pid: int
    log: Path
    starter: ForkServer
    port: int = 0
    code: int | None = None
    _line: re.Pattern = field(default=re.compile(r" at http://127\.0\.0\.1:(\d+)$", re.MULTILINE), repr=False)

    def wait_for_port(self) -> None:
        wait_until(lambda: self._line.search(self.log.read_text()) or not psutil.pid_exists(self.pid))
        found = self._line.search(self.log.read_text())
        assert found, self.log.read_text()
        self.port = int(found[1])

    def client(self) -> Client:
        return Client(self.port)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), PATIENCE)

    def lines(self, word: str) -> list[str]:
        """What follows the word in the lines of the log that begin with it."""
        return re.findall(rf"^{word} (.*)$", self.log.read_text(), re.MULTILINE)

    def num_tasks(self) -> int:
        """The number of tasks in the event loop; with watched_serving.counting_tasks."""
        before = len(self.lines("tasks"))
        os.kill(self.pid, signal.SIGUSR2)
        wait_until(lambda: len(self.lines("tasks")) > before)
        return int(self.lines("tasks")[-1])

    def wait(self) -> int:
        """Return the exit code."""
        if self.code is None:
            self.code = self.starter.wait()
        return self.code


@contextmanager
def serving(
    starter: ForkServer, folder: Path, log: Path, *arguments, patch: str | None = None, token: str | None = None
) -> Iterator[Served]:
    """Serve a model's folder until the block is left."""
    log.touch()
    environment = {} if token is None else {"FASTRM_TOKEN": token}
    command = ["serve", f"tiny={folder}", "--port", 0, *arguments]
    served = Served(starter.command(command, log, patch, environment), log, starter)
    try:
        served.wait_for_port()
        yield served
    finally:
        if served.code is None:
            with suppress(ProcessLookupError):
                os.kill(served.pid, signal.SIGKILL)
            served.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder of a tiny model of images and text."""
    folder = tmp_path_factory.mktemp("served") / "model"
    save_model(make_model("qwen2_5_vl"), folder)
    return folder
