"""The client of a fastrm server: the call of `fastrm.RewardModel.score` by URL, and the rules for trying again."""

import asyncio
import os
import random
import re
import time
import weakref
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import httpx

from fastrm.errors import ConfigError, GroupError, ServerError
from fastrm.rl.wire import Request, Result, make_requests, read_answer

MAX_WAIT = 30.0  # seconds between two tries
PATH = "/v1/rewards"
# Paths of the server that trainers' own clients are given.
_ROUTES = (PATH, "/get_reward", "/get_reward_mllm", "/classify", "/pooling", "/score", "/v1/embeddings", "/slime")
_OVERLOADED = 503
_AWAY = (502, 504)  # what a balancer says while the server behind it is away
_JSON = {"Content-Type": "application/json"}

# What came of one try: an answer, or the error of the connection.
Outcome = httpx.Response | Exception
# The connection is lost, or half an answer came: of a damaged one httpx says that it cannot be decoded.
LOST = (httpx.TransportError, httpx.DecodingError, TimeoutError)


def check_url(url: str, name: str = "url") -> None:
    """Refuse what is no URL of a server.

    Args:
        name: of the argument or option, for the message.

    Raises:
        ConfigError: for another scheme, or a URL that cannot be parsed, such as one with letters as its port.
    """
    try:
        is_http = httpx.URL(url).scheme in ("http", "https")
    except httpx.InvalidURL:
        is_http = False
    if not is_http:
        raise ConfigError(f"{name}: got {url!r}, wanted one such as http://127.0.0.1:8000")


def post_whole(client: httpx.Client, url: str, seconds: float, **request: Any) -> httpx.Response:
    """Send a POST request and return its answer, which must have come whole after some seconds.

    Args:
        client: whose own limit of time is for each part of an exchange: an answer that trickles would never end.
        request: as `httpx.Client.stream` takes it.

    Raises:
        httpx.TransportError, httpx.DecodingError, TimeoutError: `LOST`, for a connection or an answer that is lost.
    """
    end = time.monotonic() + seconds
    with client.stream("POST", url, **request) as response:
        parts = []
        for part in response.iter_raw():
            parts.append(part)
            if time.monotonic() > end:
                raise TimeoutError(f"no whole answer in {seconds:g} s")
    return httpx.Response(response.status_code, headers=response.headers, content=b"".join(parts))


def retry_after(answer: httpx.Response) -> float:
    """Return the seconds for which a server wants to be left alone by its Retry-After; 0 where it says nothing.

    It may be a number, or a date, which is taken by the server's own clock if the answer has its Date.
    """
    named = answer.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,15}(\.\d*)?", named, re.ASCII):
        return float(named)
    try:
        now = answer.headers.get("Date")
        seconds = parsedate_to_datetime(named).timestamp() - (
            time.time() if now is None else parsedate_to_datetime(now).timestamp()
        )
    except (ValueError, TypeError, OverflowError):  # neither
        return 0.0
    return max(seconds, 0.0)


class Client:
    """A scorer of responses by a fastrm server, in place of a model in this process.

        client = Client("http://127.0.0.1:8000")
        client.score([{"prompt": "Which digit?", "images": ["7.png"], "responses": ["seven", "two"]}])

    Overload and lost connections are tried again, after a time that doubles with each try and is no shorter than the
    server names. Lost connections are counted by tries, overload by time: a server that says so is at work. A request
    that the server refuses is not tried again: it would be refused again. Threads, event loops and forked processes may
    share a client.

    Attributes:
        url: of the server, without a path.
        num_retries: of all calls so far.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        token: str | None = None,
        timeout: float = 180.0,
        tries: int = 8,
        patience: float = 600.0,
        max_groups: int = 64,
    ):
        """Choose a server; nothing is sent yet.

        Args:
            model: its name at the server; default: the first there.
            token: the server's, if it wants one; default: FASTRM_TOKEN of the environment.
            timeout: seconds for one try.
            tries: of one request, the first included, overload not counted.
            patience: seconds for which the server may answer one request with overload.
            max_groups: of one request; the server refuses more than 64.

        Raises:
            ConfigError: for a URL that is none, or a number that is not positive.
        """
        check_url(url)
        if route := next((route for route in _ROUTES if url.rstrip("/").endswith(route)), None):
            raise ConfigError(f"url: got {url!r}, wanted it without {route}: this client asks {PATH} of the server")
        if min(timeout, tries, patience, max_groups) <= 0:
            numbers = f"timeout {timeout:g}, tries {tries}, patience {patience:g}, max_groups {max_groups}"
            raise ConfigError(f"{numbers}: all must be positive")
        self.url, self.model, self.num_retries = url.rstrip("/"), model, 0
        self.timeout, self.tries, self.patience, self.max_groups = timeout, tries, patience, max_groups
        self._token = token or os.environ.get("FASTRM_TOKEN")
        self._open()

    def __reduce__(self):
        kept = {name: getattr(self, name) for name in ("model", "timeout", "tries", "patience", "max_groups")}
        return _rebuild, (self.url, {"token": self._token, **kept})

    def score(self, groups: Sequence[dict], *, on_error: Literal["raise", "return"] = "raise") -> list[Result]:
        """Return the rewards of every response, as `fastrm.RewardModel.score`.

        Args:
            groups: images are paths, which are read here, bytes, Pillow images, or URLs, which the server must allow.

        Raises:
            GroupError: for the first group that cannot be scored, unless `on_error` is return.
            ServerError: if the server is away for all tries, overloaded for longer than `patience`, refuses the
                request, or answers with no rewards.
        """
        results: dict[int, Result] = {}
        for request in make_requests(groups, self.max_groups, self.model):
            if isinstance(request, Request):
                body, tried = request.body, _Tried()
                while (wait := self._take(request, self._post(body), tried)) is not None:
                    time.sleep(wait)
            results.update(_by_number(request))
        return _in_order(results, on_error)

    async def score_async(
        self, groups: Sequence[dict], *, on_error: Literal["raise", "return"] = "raise"
    ) -> list[Result]:
        """Return the rewards as `score` does, without blocking the event loop."""
        results: dict[int, Result] = {}
        for request in await asyncio.to_thread(lambda: list(make_requests(groups, self.max_groups, self.model))):
            if isinstance(request, Request):
                body, tried = request.body, _Tried()
                while (wait := self._take(request, await self._post_async(body), tried)) is not None:
                    await asyncio.sleep(wait)
            results.update(_by_number(request))
        return _in_order(results, on_error)

    def _open(self) -> None:
        self._owner = os.getpid()
        self._client = httpx.Client(**self._settings())
        self._async_clients: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def _reopen_if_forked(self) -> None:
        # Connections that were inherited are the parent's: each process would read answers to the other.
        if self._owner != os.getpid():
            self._open()

    def _settings(self) -> dict:
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        return {"timeout": self.timeout, "headers": headers, "limits": httpx.Limits(max_connections=256)}

    def _post(self, body: bytes) -> Outcome:
        self._reopen_if_forked()
        try:
            return post_whole(self._client, self.url + PATH, self.timeout, content=body, headers=_JSON)
        except LOST as error:
            return error

    async def _post_async(self, body: bytes) -> Outcome:
        self._reopen_if_forked()
        loop = asyncio.get_running_loop()
        if loop not in self._async_clients:  # a connection belongs to the event loop that opened it
            self._async_clients[loop] = httpx.AsyncClient(**self._settings())
        try:
            async with asyncio.timeout(self.timeout):
                return await self._async_clients[loop].post(self.url + PATH, content=body, headers=_JSON)
        except LOST as error:
            return error

    def _take(self, request: Request, outcome: Outcome, tried: "_Tried") -> float | None:
        """Take the outcome of a try: fill the results and return None, or return seconds to wait before the next.

        Raises:
            ServerError: if there is no next try.
        """
        place = self.url + PATH
        if isinstance(outcome, Exception):
            said = f"{type(outcome).__name__}: {outcome}"
        elif outcome.status_code == 200:
            try:
                request.results = read_answer(request, outcome.json())
            except ValueError as error:
                raise ServerError(f"{place}: the answer has {error}; is this a fastrm server?") from error
            return None
        else:
            said = f"HTTP {outcome.status_code}: {outcome.text.strip()[:500] or outcome.reason_phrase}"
            if outcome.status_code == _OVERLOADED:
                return self._wait_for_room(place, said, outcome, tried)
            if outcome.status_code not in _AWAY:
                raise ServerError(f"{place}: {said}; it is not asked again, correct what was sent")
        tried.lost += 1
        if tried.lost == self.tries:
            raise ServerError(f"{place}: no rewards in {self.tries} tries, at last {said}; is `fastrm serve` running?")
        self.num_retries += 1
        return _wait(outcome, tried)

    def _wait_for_room(self, place: str, said: str, outcome: httpx.Response, tried: "_Tried") -> float:
        tried.overloaded += 1
        wait, taken = _wait(outcome, tried), time.monotonic() - tried.started
        if taken + wait > self.patience:
            raise ServerError(
                f"{place}: overloaded for {taken:.1f} s, at last {said}; raise patience ({self.patience:g} s), "
                "send less at a time, or serve more replicas"
            )
        self.num_retries += 1
        return wait


class _Tried:
    """The tries of one request so far."""

    def __init__(self):
        self.started, self.lost, self.overloaded = time.monotonic(), 0, 0


def _rebuild(url: str, arguments: dict) -> Client:
    return Client(url, **arguments)


def _wait(outcome: Outcome, tried: _Tried) -> float:
    """Return the seconds until the next try: no less than the server asks for, up to `MAX_WAIT`, and a random part."""
    named = retry_after(outcome) if isinstance(outcome, httpx.Response) else 0.0
    # An exponent over 9 is past the largest wait. Clients that failed together must not come back together.
    grown = 0.5 * 2.0 ** min(tried.lost + tried.overloaded - 1, 9)
    return min(max(named, grown), MAX_WAIT) * random.uniform(1.0, 1.5)


def _by_number(request: Request | tuple[int, GroupError]) -> dict[int, Result]:
    if isinstance(request, Request):
        return dict(zip(request.numbers, request.results, strict=True))
    return dict([request])


def _in_order(results: dict[int, Result], on_error: str) -> list[Result]:
    if on_error not in ("raise", "return"):
        raise ConfigError(f"on_error: got {on_error!r}, wanted one of raise, return")
    ordered = [results[number] for number in sorted(results)]
    if on_error == "raise":
        for result in ordered:
            if isinstance(result, GroupError):
                raise result
    return ordered
