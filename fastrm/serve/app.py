"""The HTTP application: what every kind of request shares.

A protocol is a module of fastrm/serve/protocols with `routes(service) -> APIRouter`, named in `PROTOCOLS`. Its
handlers read a body by `Service.read`, ask by `Service.score` or `Service.rewards`, and return plain data. They raise
`RequestError` for what is wrong; here it becomes ``{"error": {"code", "message"}}`` with its status:

    400 a body that is no JSON object, or not of the form       404 MODEL_UNKNOWN, NOT_FOUND
    401 UNAUTHORIZED; 403 FOREIGN_SITE                          405 METHOD_NOT_ALLOWED
    408 BODY_TIMEOUT
    413 REQUEST_TOO_LARGE                                       422 a group that cannot be scored: its own code
    503 QUEUE_FULL, BODIES_FULL, CLOSING, NOT_READY, with Retry-After       500 INTERNAL
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from importlib import import_module
from typing import TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Scope

from fastrm.data.sources.values import decode_json
from fastrm.errors import GroupError, RecordError
from fastrm.serve.activity import Activity
from fastrm.serve.body_limit import BodyLimit
from fastrm.serve.connections import Connections
from fastrm.serve.gate import Gate
from fastrm.serve.media import MediaPolicy
from fastrm.serve.metrics import Metrics
from fastrm.serve.problems import BadRequest, RequestError, TooLarge, refused_group
from fastrm.serve.rendered_text import RenderedTextReader
from fastrm.serve.scheduler import Scheduler, Scored
from fastrm.serve.settings import ServeSettings

# Modules of fastrm/serve/protocols, each with routes(service) -> APIRouter.
PROTOCOLS = ("native", "status", "page", "openrlhf", "vllm", "sglang", "slime", "r1_reward")

# Bodies up to so many bytes are decoded by the event loop's thread, which a hop to another would not relieve: of those
# that we tried the slowest, as many objects as there is room for, took 0.6 ms (the median of 30 on a CPU).
_SMALL_BODY = 16 * 1024
# Commas and opening brackets, of which each value has one: 11 million empty lists, as many as 32 MiB hold, stopped all
# threads of Python for 4 s and took 0.8 GB; of those with so many the slowest that we tried took 1.6 s.
_MAX_VALUES = 1_000_000

_Body = TypeVar("_Body")


class Service:
    """The server as a protocol's handlers see it: bodies as JSON, rewards of groups, and the settings.

    Attributes:
        scheduler: the models and their queue.
        settings: of the server.
        activity: the latest requests.
        metrics: the figures of /metrics.
    """

    def __init__(self, scheduler: Scheduler, settings: ServeSettings, connections: Connections | None = None):
        self.scheduler, self.settings = scheduler, settings
        self.activity = Activity()
        self.metrics = Metrics(scheduler, connections)
        self._media = MediaPolicy(settings.image_root, settings.allow_image_urls, settings.media)

    def observe(self, scope: Scope, status: int, seconds: float) -> None:
        """Count an answer; requests for rewards, which are POST, are also kept for the page."""
        path = getattr(scope.get("route"), "path", "other")
        self.metrics.observe(path, status, seconds)
        if scope["method"] == "POST":
            self.activity.add(path, status, seconds, scope.get("state", {}).get("rewards", 0))

    async def read(self, request: Request, form: Callable[[dict], _Body] = dict) -> _Body:
        """Return the body of a request, which must be a JSON object, in the form that a protocol gives it.

        Decoding and `form` run in a thread of their own, unless the body is small.

        Raises:
            TooLarge: over `max_body_bytes`, where the rest is not read, or with very many values.
            Unavailable: BODIES_FULL, as `BodyLimit`.
            BadRequest: BAD_JSON, DUPLICATE_KEY or BAD_REQUEST; and what `form` raises.
        """
        data = await self._read_bytes(request)
        if len(data) <= _SMALL_BODY:
            return form(_decode(data))
        return await asyncio.to_thread(lambda: form(_decode(data)))

    async def _read_bytes(self, request: Request) -> bytes:
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                return await self._read_bounded(request)
        except TimeoutError:
            seconds = self.settings.body_seconds
            raise RequestError(408, "BODY_TIMEOUT", f"the body took more than {seconds:g} s; send it at once") from None
        except ClientDisconnect:
            raise RequestError(499, "CLIENT_LEFT", "the client closed the connection inside its body") from None

    async def _read_bounded(self, request: Request) -> bytes:
        limit, body = self.settings.max_body_bytes, bytearray()
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > limit:
            raise TooLarge(f"the body has {int(declared):,} bytes, limit {limit:,}; send fewer groups a request")
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise TooLarge(f"the body has more than {limit:,} bytes; send fewer groups a request")
        return bytes(body)

    def check_count(self, num_groups: int) -> None:
        """Refuse more groups than a request may have, before any work for them.

        Raises:
            TooLarge: for more than `max_groups`, or than the queue holds.
        """
        limit = min(self.settings.max_groups, self.scheduler.max_queue)
        if num_groups > limit:
            raise TooLarge(f"the request has {num_groups:,} groups, limit {limit:,}; send fewer a request")

    async def score(self, request: Request, groups: Sequence[dict], model: object = None) -> Scored:
        """Return the rewards of groups, or the reason in the place of each that has none.

        If the client goes away meanwhile, its groups leave the queue.

        Args:
            request: whose body has been read.
            groups: as `Scheduler.score` takes them; of paths and URLs only what the settings allow is opened.
            model: the name that the request gives; None: the first model.

        Raises:
            RequestError: TooLarge for more than `max_groups`; UnknownModel; Unavailable.
        """
        self.check_count(len(groups))
        work = asyncio.ensure_future(self.scheduler.submit(groups, model, self._media.resolver))
        leaving = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise RequestError(499, "CLIENT_LEFT", "the client closed the connection before its answer")
            scored = work.result()
            request.state.rewards = sum(len(one) for one in scored.results if not isinstance(one, GroupError))
            return scored
        except asyncio.CancelledError:  # by the end of the server: a client that leaves cancels no handler
            self.scheduler.num_lost += len(groups)
            raise
        finally:
            for task in (work, leaving):
                task.cancel()
            await asyncio.gather(work, leaving, return_exceptions=True)

    def reader(self, model: object = None) -> RenderedTextReader:
        """Return the reader of texts that a trainer has rendered with a model's chat template.

        Raises:
            UnknownModel: for a name that is not served.
        """
        return self.scheduler.find(model).reader

    async def rewards(self, request: Request, groups: Sequence[dict], model: object = None) -> Scored:
        """Return the rewards of groups, for answers that have no place for errors.

        Raises:
            RequestError: as `score`; status 422 for the first group that has no rewards.
        """
        scored = await self.score(request, groups, model)
        for result in scored.results:
            if isinstance(result, GroupError):
                raise refused_group(result)
        return scored


def _decode(data: bytes) -> dict:
    if sum(map(data.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise TooLarge(
            f"the body has more than {_MAX_VALUES:,} commas and opening brackets; send fewer groups a request"
        )
    try:
        body = decode_json(data.decode())
    except RecordError as error:
        raise BadRequest(error.code, error.message) from None
    except (ValueError, RecursionError) as error:
        raise BadRequest("BAD_JSON", f"the body is no JSON: {error}; send a JSON object") from None
    if not isinstance(body, dict):
        raise BadRequest("BAD_REQUEST", f"the body is a {type(body).__name__}; send a JSON object")
    return body


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def make_app(scheduler: Scheduler, settings: ServeSettings, connections: Connections | None = None) -> FastAPI:
    """Return the application. It starts the scheduler and, at its end, waits for what was accepted.

    Args:
        connections: of the server that runs it, for /metrics; None: of a server that does not count them.
    """

    @asynccontextmanager
    async def run(_: FastAPI) -> AsyncIterator[None]:
        async with scheduler:
            yield

    app = FastAPI(title="fastrm", lifespan=run, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    service = Service(scheduler, settings, connections)
    for name in PROTOCOLS:
        app.include_router(import_module(f"fastrm.serve.protocols.{name}").routes(service))
    app.add_exception_handler(RequestError, _answer_problem)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_internal)
    app.add_middleware(BodyLimit, max_bytes=settings.max_bytes_in_flight)  # behind the gate: strangers take no room
    app.add_middleware(Gate, token=settings.token, observe=service.observe, host=settings.host)
    return app


def error_body(code: str, message: str) -> dict:
    """Return the JSON of an error."""
    return {"error": {"code": code, "message": message}}


async def _answer_problem(_: Request, error: RequestError) -> JSONResponse:
    return JSONResponse(error_body(error.code, error.message), error.status, error.headers)


async def _answer_http(request: Request, error: HTTPException) -> JSONResponse:
    codes = {404: "NOT_FOUND", 405: "METHOD_NOT_ALLOWED"}
    message = f"{request.method} {request.scope['path']}: {error.detail}"
    return JSONResponse(
        error_body(codes.get(error.status_code, "HTTP_ERROR"), message), error.status_code, error.headers
    )


async def _answer_internal(_: Request, error: Exception) -> JSONResponse:
    message = "the server failed at this request; its log says why, and other requests are not affected"
    return JSONResponse(error_body("INTERNAL", message), 500)
