"""The server as an application of Ray Serve: replicas with the models, on any number of machines, behind one port.

    serve run configs/serve/ray.yaml     # with FASTRM_TOKEN set

`Front` has the routes and no model. `Scorers` are the replicas. Ray's consistent hashing finds the replica of a
group's prompt and images, so that a prompt's rollouts meet.
"""

import asyncio
import contextlib
import os
from contextvars import Context
from pathlib import Path
from typing import Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from fastrm.errors import ConfigError
from fastrm.evaluate.options import ModelChoice, ScoringOptions
from fastrm.serve.app import make_app
from fastrm.serve.command import check_host, load_scheduler, name_models
from fastrm.serve.dispatch import Dispatcher, MakeResolve, Served, summed
from fastrm.serve.problems import RequestError, Unavailable
from fastrm.serve.rendered_text import RenderedTextReader
from fastrm.serve.scheduler import Counts, Scored
from fastrm.serve.settings import ServeSettings

# Without replicas to fall back on a busy one keeps its prompts: a group waits for it.
_BY_PROMPT = RequestRouterConfig(
    request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter",
    request_router_kwargs={"num_fallback_replicas": 0},
)

_SECONDS_BETWEEN_LOOKS = 1.0  # at how many replicas run


class Arguments(BaseModel):
    """The arguments of the application, `args` in a configuration of Ray Serve: options of `fastrm serve`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    models: list[str]
    ensemble: Literal["mean"] | None = None
    device: str = "auto"
    dtype: str = "auto"
    tokens_per_pack: int = 32768
    max_queue: int = 1024
    image_root: str | None = None
    allow_image_urls: bool = False
    check_exactness: bool = True
    normalize: bool = False

    def options(self) -> ScoringOptions:
        """Return the options of the models."""
        return ScoringOptions(
            tokens_per_pack=self.tokens_per_pack, device=self.device, dtype=self.dtype,
            check_exactness=self.check_exactness, normalize=self.normalize,
        )  # fmt: skip

    def settings(self, token: str) -> ServeSettings:
        """Return the settings of the server, whose host is open, since Ray's proxies listen where Ray was told to."""
        root = None if self.image_root is None else Path(self.image_root)
        return ServeSettings(
            host="0.0.0.0", token=token, max_queue=self.max_queue, image_root=root,
            allow_image_urls=self.allow_image_urls,
        )  # fmt: skip


@serve.deployment(request_router_config=_BY_PROMPT)
class Scorers:
    """A replica: a scheduler with the models."""

    async def __init__(self, choices: dict[str, ModelChoice], options: ScoringOptions, settings: ServeSettings):
        self._scheduler = load_scheduler(choices, options, settings, silent=True)
        await self._scheduler.__aenter__()

    async def readers(self) -> dict[str, RenderedTextReader]:
        """Return the readers of rendered text of all models, by their names."""
        return {name: scorer.reader for name, scorer in self._scheduler.served.items()}

    async def score(
        self, groups: list[dict], model: str, resolver: MakeResolve
    ) -> tuple[str, Scored | tuple[str, str], Counts]:
        """Return this replica's name, its answer or the code and message of its refusal, and its counts."""
        try:
            answer = await self._scheduler.submit(groups, model, resolver)
        except RequestError as error:
            answer = error.code, error.message
        return serve.get_replica_context().replica_tag, answer, self._scheduler.counts

    async def check_health(self) -> None:
        """Raise an error, upon which Ray replaces this replica, if the scheduler computes nothing any more."""
        if not self._scheduler.is_ready:
            raise RuntimeError("the scheduler has ended, or all of its latest groups have failed")


class Replicas(Dispatcher):
    """The interface of one scheduler before the replicas.

    Args:
        scorers: the handle of their deployment.
        max_queue: of `Dispatcher`.
    """

    def __init__(self, scorers: DeploymentHandle, max_queue: int):
        super().__init__(max_queue)
        self._scorers = scorers
        self._counts: dict[str, Counts] = {}
        self._has_running = False

    async def __aenter__(self) -> "Replicas":
        readers = await self._scorers.readers.remote()
        self.served = {name: Served(name, reader) for name, reader in readers.items()}
        self._has_running = True  # one has just answered
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_) -> None:
        await self.drain()
        self._watching.cancel()

    @property
    def counts(self) -> Counts:
        """The sums of what each replica said last, those that were lost included."""
        return summed(self._counts.values())

    @property
    def is_ready(self) -> bool:
        """True while requests are accepted and a replica runs; without one they wait until Ray has started it."""
        return not self.is_closing and self._has_running

    def place_of(self, prompt: bytes) -> str:
        """Return the key by which Ray finds the replica of a prompt."""
        return prompt.hex()

    async def ask(self, place: str, groups: list[dict], model: str, resolver: MakeResolve) -> Scored:
        """Return the answer of a replica.

        Raises:
            Unavailable: if it dies before, or refuses.
        """
        # Ray's router tells waiting calls apart by the id of the HTTP request, which it takes from the context: of two
        # calls of one request it would answer one. In an empty context each call has an id of its own.
        call = self._scorers.options(session_id=place).score
        response = Context().run(call.remote, groups, model, resolver)
        try:
            name, answer, counts = await response
        except asyncio.CancelledError:  # the client has left
            response.cancel()
            raise
        except RayActorError as error:
            raise Unavailable("WORKER_LOST", f"a replica died before it had an answer ({error}); ask again") from None
        self._counts[name] = counts
        if isinstance(answer, tuple):
            raise Unavailable(*answer)
        return answer

    async def _watch(self) -> None:
        """Ask Ray again and again whether a replica runs; while Ray's controller is away, its last word holds."""
        app, deployment = serve.get_replica_context().app_name, self._scorers.deployment_name
        while True:
            await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)
            with contextlib.suppress(RayError, KeyError):
                status = await asyncio.to_thread(serve.status)
                states = status.applications[app].deployments[deployment].replica_states
                self._has_running = states.get("RUNNING", 0) > 0


@serve.deployment
@serve.ingress()
class Front:
    """The routes, before the replicas."""

    def __init__(self, scorers: DeploymentHandle, settings: ServeSettings):
        self._scorers, self._settings = scorers, settings

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application, for which Ray asks once, in the process that is to run it."""
        return make_app(Replicas(self._scorers, self._settings.max_queue), self._settings)


def build(args: Arguments) -> serve.Application:
    """Return the application that a configuration of Ray Serve names; FASTRM_TOKEN is its token.

    Raises:
        ConfigError: without a token, and for models that cannot be named.
    """
    token = os.environ.get("FASTRM_TOKEN")
    if not token:
        raise ConfigError("FASTRM_TOKEN is not set, and Ray's port may be open to others; set it before Ray starts")
    settings = args.settings(token)
    check_host(settings)
    choices = name_models(args.models, ModelChoice((), args.ensemble))
    # A request has a group at least: the front refuses by itself, and beyond that Ray does, with 503 too.
    bound = {"max_ongoing_requests": 2 * args.max_queue}
    scorers = Scorers.options(**bound).bind(choices, args.options(), settings)
    return Front.options(**bound, max_queued_requests=args.max_queue).bind(scorers, settings)
