"""The bound of the memory that bodies take: of all requests together, from the first byte to the end of the answer."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastrm.serve.problems import Unavailable


class BodyLimit:
    """An ASGI application that passes requests on until their bodies have too many bytes together.

    A handler that reads a body above the limit meets `Unavailable` (BODIES_FULL), and the rest of it is not read.

    Args:
        app: that answers, and turns `Unavailable` into an answer.
        max_bytes: of the bodies of all requests that have no answer yet, as far as they have arrived.
    """

    def __init__(self, app: ASGIApp, max_bytes: int):
        self._app, self._max_bytes, self._num_bytes = app, max_bytes, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        held = 0

        async def counted() -> Message:
            nonlocal held
            message = await receive()
            size = len(message.get("body", b""))
            if self._num_bytes + size > self._max_bytes:
                raise Unavailable(
                    "BODIES_FULL",
                    f"the bodies of requests without an answer have {self._num_bytes:,} bytes together, limit "
                    f"{self._max_bytes:,}; try again later",
                )
            held += size
            self._num_bytes += size
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            self._num_bytes -= held
