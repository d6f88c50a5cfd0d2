"""The layer before all routes: the token, and a count of every answer with its time."""

import base64
import binascii
import hmac
import time
from collections.abc import Callable

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Paths that answer without the token, since who asks them has none: routers and load balancers, and a browser for the
# files of the page, which hold nothing of the models.
OPEN_PATHS = frozenset({"/health", "/", "/page/page.css", "/page/page.js", "/page/examples.js"})


class Gate:
    """An ASGI application that passes on what carries the token.

    The token comes as ``Authorization: Bearer TOKEN``, or as the password of ``Authorization: Basic``, which clients
    send by themselves for a URL of the form http://user:TOKEN@host/: trainers have no setting for headers.

    Args:
        app: that answers.
        token: None: every request passes.
        observe: called with each request and the status and seconds of its answer, when that has ended; status 0
            stands for a connection that was lost before.
    """

    def __init__(self, app: ASGIApp, token: str | None, observe: Callable[[Scope, int, float], None]):
        self._app, self._observe = app, observe
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
            if self._may_pass(scope):
                await self._app(scope, receive, watch)
            else:
                await _UNAUTHORIZED(scope, receive, watch)
        finally:
            self._observe(scope, status, time.perf_counter() - started)

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
