"""The command `fastrm serve`: loads the models, opens the port, and ends in order on a signal."""

import asyncio
import contextlib
import ipaddress
import math
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import uvicorn
from PIL import Image

from fastrm import errors
from fastrm.errors import ConfigError, DataError, GroupError, InterruptedRun
from fastrm.evaluate.ensemble import Ensemble
from fastrm.evaluate.models import open_models
from fastrm.evaluate.options import ModelChoice, ScoringOptions
from fastrm.serve.app import make_app
from fastrm.serve.caches import BoundedCache
from fastrm.serve.connections import Connections, allow_open
from fastrm.serve.scheduler import Scheduler
from fastrm.serve.scorer import Scorer
from fastrm.serve.settings import ServeSettings
from fastrm.serve.workers import Workers
from fastrm.stop import StopFlag, fail
from fastrm.ui import Display, make_console, message

# Seconds after a signal for the answers to requests that were accepted; StopFlag ends the process at 9.
_DRAIN_SECONDS = 8
_THREAD_SECONDS = 0.3  # for the threads, where answers are lost already


def serve(models: Sequence[str], choice: ModelChoice, options: ScoringOptions, settings: ServeSettings) -> None:
    """Serve models until a signal comes.

    Args:
        models: each a folder or an ensemble file, or ``name=`` in front of one.
        choice: how to combine them: with a rule, all are one model; else each is one by itself, with the route.
        options: of the models; those of data files are not used.

    Raises:
        ConfigError: for a port that cannot be opened, another host than loopback without a token, two models of one
            name, and as `open_models`.
        ExactnessError, DataError: as `warm_up`.
        InterruptedRun: if requests that were accepted had no answer in time.
    """
    check_host(settings)
    choices = name_models(models, choice)
    with contextlib.closing(open_port(settings)) as listener:
        settings = replace(settings, port=listener.getsockname()[1], media=options.limits)
        if settings.workers == 1:
            scheduler = load_scheduler(choices, options, settings)
        else:
            make, say = partial(load_worker, choices, options, settings), partial(message, make_console(stderr=True))
            scheduler = Workers(make, settings.workers, max_queue=settings.max_queue, say=say)
        connections = Connections(allow_open(settings.max_connections), settings.header_seconds)
        server = connections.make_server(make_app(scheduler, settings, connections), _DRAIN_SECONDS)
        with StopFlag() as stop:
            asyncio.run(_serve(server, scheduler, listener, settings, stop))
            if stop.signal:
                _leave(stop.signal, scheduler.num_lost)


def warm_up(model: Ensemble) -> None:
    """Score a text, and an image where the model reads them: what is checked or compiled at first use is done then.

    Raises:
        ExactnessError: as `RewardModel.score`.
        DataError: if one of them has no reward, as by a model whose weights are not finite.
    """
    groups = [{"prompt": "a", "responses": ["b", "c"]}]
    if all(member.network.encoder.vision is not None for member in model.members):
        groups.append({"prompt": "a", "images": [Image.new("RGB", (64, 64))], "responses": ["b", "c"]})
    for result in model.score(groups, on_error="return"):
        if isinstance(result, GroupError):
            names = ", ".join(model.names)
            raise DataError(f"{names}: cannot score even a short text or image: {result.message} ({result.code})")


def check_host(settings: ServeSettings) -> None:
    """Refuse a host that others can reach without a token, and a token that no header can hold.

    Raises:
        ConfigError: naming the option.
    """
    token = settings.token
    if token is not None and not (token and token.isascii() and token.isprintable()):
        raise ConfigError("--token: is empty or holds what a header cannot; take letters, digits and signs of ASCII")
    if token is None and not _is_loopback(settings.host):
        raise ConfigError(
            f"--host {settings.host}: others can reach it, and there is no token; set FASTRM_TOKEN or --token, or use "
            "127.0.0.1"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def name_models(models: Sequence[str], choice: ModelChoice) -> dict[str, ModelChoice]:
    """Return the models by the names that requests give; the name is the path as written if there is none.

    Raises:
        ConfigError: for two models of one name, and as `ModelChoice.check`.
    """
    places = [_named(model) for model in models]
    if choice.combine is not None:
        name = next((name for name, place in places if name != place), None) or places[0][0]
        choices = {name: replace(choice, models=tuple(Path(place) for _, place in places))}
    else:
        choices = {}
        for name, place in places:
            if name in choices:
                raise ConfigError(
                    f"two models are called {name}; name them: fastrm serve a={place} b=..., or make them one model "
                    "by --ensemble mean"
                )
            choices[name] = replace(choice, models=(Path(place),))
    for one in choices.values():
        one.check()
    return choices


def _named(model: str) -> tuple[str, str]:
    name, equals, place = model.partition("=")
    return (name, place) if equals and name and "/" not in name and place else (model, model)


def open_port(settings: ServeSettings) -> socket.socket:
    """Return a socket that listens at the host and port: connections wait until the server takes them.

    It listens at once, since two sockets may have one port until then, and the second server would fail only after it
    has loaded its models.

    Raises:
        ConfigError: if it cannot be opened, as where another program has it.
    """
    place = f"--host {settings.host} --port {settings.port}"
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[
            0
        ]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        if listener is not None:
            listener.close()
        raise ConfigError(f"{place}: {error.strerror}; take another port, or 0 for a free one") from None
    return listener


def load_scheduler(
    choices: dict[str, ModelChoice], options: ScoringOptions, settings: ServeSettings, *, silent: bool = False
) -> Scheduler:
    """Load and check models, and return the scheduler before them.

    Args:
        choices: by the names that requests give.
        silent: say nothing of it.

    Raises:
        ConfigError, StorageError, ExactnessError: as `open_models` and `warm_up`.
    """
    with Display(silent=silent) as display:
        loaded = {name: open_models(one, options, display) for name, one in choices.items()}
        for model in loaded.values():
            warm_up(model)
    return make_scheduler(loaded, options, settings)


def load_worker(
    choices: dict[str, ModelChoice], options: ScoringOptions, settings: ServeSettings, number: int
) -> Scheduler:
    """Return the scheduler of a worker, on a GPU of its own or with its share of the cores; the first one reports.

    Args:
        number: of the worker, from 0 on; with more workers than GPUs they share them.
    """
    errors.is_command_line = True  # messages name the options of the command that started this process
    torch.set_num_threads(max(1, torch.get_num_threads() // settings.workers))
    if options.device in ("auto", "cuda") and torch.cuda.is_available():
        options = replace(options, device=f"cuda:{number % torch.cuda.device_count()}")
    return load_scheduler(choices, options, settings, silent=number > 0)


def make_scheduler(models: dict[str, Ensemble], options: ScoringOptions, settings: ServeSettings) -> Scheduler:
    """Return the scheduler of loaded models, with the caches that the settings name."""
    images = BoundedCache(settings.image_cache_bytes)
    return Scheduler(
        [Scorer(name, model, options.tokens_per_pack, images) for name, model in models.items()],
        max_queue=settings.max_queue,
        window_ms=settings.window_ms,
        deterministic=settings.deterministic,
        rewards=BoundedCache(settings.reward_cache),
        images=images,
        max_responses=settings.max_responses,
    )


async def _serve(
    server: uvicorn.Server,
    scheduler: Scheduler | Workers,
    listener: socket.socket,
    settings: ServeSettings,
    stop: StopFlag,
) -> None:
    if isinstance(scheduler, Workers):
        await _start(scheduler, stop)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    while not (server.started or running.done()):
        await asyncio.sleep(0.01)
    if server.started and not running.done():
        message(make_console(), describe(scheduler, settings))
    while not (running.done() or stop.signal):
        await asyncio.sleep(0.1)
    scheduler.stop_accepting()
    server.should_exit = True
    await running


def _leave(stopped_by: str, num_lost: int) -> None:
    """End the command after a signal; the process too if a thread is stuck, for which Python would wait at its exit.

    Where no answer is lost, threads have the time until `StopFlag` ends the process.

    Raises:
        InterruptedRun: if requests that were accepted had no answer in time.
    """
    lost = f"stopped by {stopped_by}; {num_lost:,} groups had no answer in time"
    if stuck := _stuck_threads(_THREAD_SECONDS if num_lost else math.inf):
        os._exit(fail(InterruptedRun.exit_code, "InterruptedRun", f"{lost}; at work still: {', '.join(stuck)}"))
    if num_lost:
        raise InterruptedRun(lost)


def _stuck_threads(seconds: float) -> list[str]:
    """Return the names of the threads that Python waits for at its exit and that do not end within some seconds."""
    waited_for = [one for one in threading.enumerate() if not one.daemon and one is not threading.main_thread()]
    deadline = time.monotonic() + seconds
    while any(one.is_alive() for one in waited_for) and time.monotonic() < deadline:
        time.sleep(0.01)
    return [one.name for one in waited_for if one.is_alive()]


async def _start(workers: Workers, stop: StopFlag) -> None:
    """Start workers before the application does, which would have no way to pass their errors on."""
    starting = asyncio.create_task(workers.start())
    while not (starting.done() or stop.signal):
        await asyncio.sleep(0.05)
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        raise InterruptedRun(f"stopped by {stop.signal} while the workers loaded their models")
    await starting


def describe(scheduler: Scheduler | Workers, settings: ServeSettings) -> str:
    """Return the line that says where which models are served."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    by = f" by {settings.workers} workers" if settings.workers > 1 else ""
    return f"serving {', '.join(scheduler.models)}{by} at http://{host}:{settings.port}"
