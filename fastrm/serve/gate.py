"""The layer before all routes: the token, pages of other sites, and a count of every answer with its time."""

import base64
import binascii
import hmac
import ipaddress
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Paths that answer without the token, since who asks them has none: routers and load balancers, and a browser for the
# files of the page, which hold nothing of the models.
OPEN_PATHS = frozenset({"/health", "/", "/page/page.css", "/page/page.js", "/page/examples.js"})


class Gate:
    """An ASGI application that passes on what carries the token, and nothing that a page of another site asks.

    A browser sends what any page asks of a loopback address, and names the page in ``Origin``. A page may also give
    its own name the server's address, and then read the answers: where no token is asked for, and the server is thus
    on loopback alone, ``Host`` has to be an address, localhost, or `host`.

    The token comes as ``Authorization: Bearer TOKEN``, or as the password of ``Authorization: Basic``, which clients
    send by themselves for a URL of the form http://user:TOKEN@host/: trainers have no setting for headers.

    Args:
        app: that answers.
        token: None: every request passes.
        observe: called with each request and the status and seconds of its answer, when that has ended; status 0
            stands for a connection that was lost before.
        host: a name that the server has besides.
    """

    def __init__(
        self, app: ASGIApp, token: str | None, observe: Callable[[Scope, int, float], None], host: str = "localhost"
    ):
        self._app, self._observe, self._host = app, observe, host
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if self._is_foreign(scope):
                await _FOREIGN(scope, receive, watch)
            elif self._may_pass(scope):
                await self._app(scope, receive, watch)
            else:
                await _UNAUTHORIZED(scope, receive, watch)
        finally:
            self._observe(scope, status, time.perf_counter() - started)

    def _is_foreign(self, scope: Scope) -> bool:
        hosts, origins = (
            [value.decode("latin-1").lower() for name, value in scope["headers"] if name == wanted]
            for wanted in (b"host", b"origin")
        )
        if any(origin.partition("://")[2] not in hosts for origin in origins):
            return True
        return self._token is None and not all(map(self._is_own, hosts))

    def _is_own(self, place: str) -> bool:
        try:
            name = urlsplit(f"//{place}").hostname
            if name is None or name in ("localhost", self._host.lower()):
                return name is not None
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _may_pass(self, scope: Scope) -> bool:
        if self._token is None or scope["path"] in OPEN_PATHS:
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(_token_of(given[0]), self._token)


def _token_of(header: bytes) -> bytes:
    kind, _, value = header.partition(b" ")
    if kind.lower() == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return value.strip() if kind.lower() == b"bearer" else b""


_UNAUTHORIZED = JSONResponse(
    {"error": {"code": "UNAUTHORIZED", "message": "send the server's token as Authorization: Bearer TOKEN"}},
    401,
    {"WWW-Authenticate": 'Basic realm="fastrm: any name, the token as password", Bearer'},
)
_FOREIGN = JSONResponse(
    {"error": {"code": "FOREIGN_SITE", "message": "asked by a page of another site, or by a name that is not this "
               "server's; ask by its address, or serve with a token"}},
    403,
)  # fmt: skip
