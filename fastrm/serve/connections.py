"""The HTTP server under the application: how many connections it has, and how long they may say nothing.

uvicorn bounds the silence after an answer, but a client that connects and sends nothing, or a byte of its headers now
and then, keeps its connection for ever. The body's time is bounded by the application, as it begins after the headers.
"""

import asyncio
import contextlib
import resource

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastrm.json_files import to_json

# Seconds that a connection may be idle. A client that keeps it for longer than the server sends requests into one that
# is being closed: aiohttp keeps connections for 15 s, requests for ever, and uvicorn's default is 5 s.
_KEEP_ALIVE_SECONDS = 75
_OTHER_FILES = 256  # that the process has open besides connections: models, pipes, images of `--image-root`


class Connections:
    """The bounds of a server's connections, and the counts of those that reached them.

    Args:
        max_open: the number of connections at a time; one more is answered with 503 and closed at once.
        header_seconds: from the beginning of a connection, or of a later request on it, to the end of the headers; a
            connection that takes longer is closed.

    Attributes:
        num_open: the number of connections now.
        num_refused, num_timed_out: since the start, by `max_open` and by `header_seconds`.
    """

    def __init__(self, max_open: int, header_seconds: float):
        self.max_open, self.header_seconds = max_open, header_seconds
        self.num_open = self.num_refused = self.num_timed_out = 0

    def make_server(self, app: ASGIApp, drain_seconds: float) -> uvicorn.Server:
        """Return the HTTP server of an application, which leaves signals to its caller.

        Args:
            drain_seconds: for answers, after it was told to exit.
        """
        config = uvicorn.Config(
            app,
            http=self._make_protocol,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=drain_seconds,
        )
        return _Quiet(config)

    def _make_protocol(self, **arguments) -> asyncio.Protocol:
        return _Bounded(self, **arguments)


def allow_open(max_connections: int) -> int:
    """Return how many connections the process can have, having raised its limit of open files as far as it needs.

    Args:
        max_connections: the number that is wanted, and the most that is returned.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return max(1, soft - _OTHER_FILES)
    return max_connections


class _Quiet(uvicorn.Server):
    """A server that leaves signals to `StopFlag`."""

    @contextlib.contextmanager
    def capture_signals(self):
        yield


class _Bounded(H11Protocol):
    """A connection within the bounds of `Connections`, whichever other parsers are installed: h11 bounds headers."""

    def __init__(self, bounds: Connections, **arguments):
        super().__init__(**arguments)
        self._bounds = bounds
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._bounds.num_open += 1
        if self._bounds.num_open > self._bounds.max_open:
            self._bounds.num_refused += 1
            transport.write(_FULL)
            transport.close()
        else:
            self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._bounds.num_open -= 1
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self.cycle  # of the latest request whose headers have ended
        if before is None or before.response_complete:
            self._expect_headers()
        super().data_received(data)
        if self.cycle is not before:
            self._stop_timer()

    def _expect_headers(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(self._bounds.header_seconds, self._give_up)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _give_up(self) -> None:
        self._bounds.num_timed_out += 1
        self.transport.abort()  # `close` would wait for a client that does not read the answer before


_FULL_BODY = to_json(
    {"error": {"code": "CONNECTIONS_FULL", "message": "the server has as many connections as it may; try again later"}}
).encode()
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(_FULL_BODY), _FULL_BODY)
)
