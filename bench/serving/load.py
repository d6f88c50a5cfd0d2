"""Load on a reward server: clients that wait for each answer (closed loop), or requests at times of their own (open).

The client is a few lines of HTTP/1.1 on asyncio, as a library's client takes a millisecond of CPU time for a request,
which on two cores the server would lack.
"""

import asyncio
import contextlib
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answer:
    """An answer of the server.

    Attributes:
        began: when the request was due, in seconds of `time.perf_counter`. Every request that waits has a connection of
            its own; one that this client or the server was too busy for is sent later, and the wait counts.
        seconds: from then to the whole answer.
        status: of HTTP; 0 where the connection broke.
        body: the JSON of a 200, else None.
    """

    began: float
    seconds: float
    status: int
    body: dict | None


@dataclass
class Load:
    """The answers of one load.

    Attributes:
        seconds: of the measured part.
        answers: of a closed loop those that came in it, of an open loop those to requests that were due in it.
    """

    seconds: float
    answers: list[Answer] = field(default_factory=list)

    @property
    def good(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.status == 200]

    @property
    def failed(self) -> dict[int, int]:
        """The number of answers of each status but 200."""
        statuses = [answer.status for answer in self.answers if answer.status != 200]
        return {status: statuses.count(status) for status in sorted(set(statuses))}

    @property
    def rewards_per_second(self) -> float:
        return sum(len(group) for answer in self.good for group in answer.body["rewards"]) / self.seconds

    def latency(self, share: float) -> float:
        """Return the seconds within which so large a share of the good answers came; NaN of none."""
        ordered = sorted(answer.seconds for answer in self.good)
        return ordered[math.ceil(share * len(ordered)) - 1] if ordered else math.nan


class _Connections:
    """Connections to one server, kept open and used again."""

    def __init__(self, url: str, token: str | None = None):
        parts = urlsplit(url)
        self._host, self._port = parts.hostname, parts.port
        authorization = f"Authorization: Bearer {token}\r\n" if token else ""
        self._head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        self._head += authorization
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, body: bytes, began: float) -> Answer:
        """Send a request and return its answer."""
        try:
            reader, writer = self._free.pop() if self._free else await asyncio.open_connection(self._host, self._port)
            writer.write(f"{self._head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            await writer.drain()
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            status = int(head.split(" ", 2)[1])
            length = int(head.split("content-length:", 1)[1].split("\r\n", 1)[0])
            content = await reader.readexactly(length)
        except (OSError, EOFError):  # EOFError: asyncio.IncompleteReadError
            return Answer(began, time.perf_counter() - began, 0, None)
        self._free.append((reader, writer))
        return Answer(began, time.perf_counter() - began, status, json.loads(content) if status == 200 else None)

    def close(self) -> None:
        for _, writer in self._free:
            writer.close()


def closed_loop(
    url: str, bodies: Iterator[bytes], clients: int, seconds: float, warm_up: float, token: str | None = None
) -> Load:
    """Let clients send requests for a while, each the next as soon as it has its answer.

    Args:
        bodies: taken in turns by all clients together.
        seconds: of the measured part, after `warm_up` seconds.
    """
    return asyncio.run(_closed_loop(url, bodies, clients, seconds, warm_up, token))


async def _closed_loop(
    url: str, bodies: Iterator[bytes], clients: int, seconds: float, warm_up: float, token: str | None
) -> Load:
    connections, load = _Connections(url, token), Load(seconds)
    begin = time.perf_counter() + warm_up
    end = begin + seconds

    async def client() -> None:
        while (now := time.perf_counter()) < end:
            answer = await connections.post(next(bodies), now)
            # What ended in the measured part, so that long requests are not left out.
            if begin <= answer.began + answer.seconds < end:
                load.answers.append(answer)
            if answer.status != 200:
                await asyncio.sleep(0.05)  # as a client that is told to come again

    await asyncio.gather(*(client() for _ in range(clients)))
    connections.close()
    return load


def open_loop(
    url: str, bodies: Iterator[bytes], rate: float, seconds: float, warm_up: float, seed: int = 0,
    token: str | None = None,
) -> Load:  # fmt: skip
    """Send requests at random times (a Poisson process) whether or not earlier ones are answered.

    Args:
        rate: of requests, in 1/s.
        seconds: of the measured part, after `warm_up` seconds.
    """
    return asyncio.run(_open_loop(url, bodies, rate, seconds, warm_up, random.Random(seed), token))


async def _open_loop(
    url: str, bodies: Iterator[bytes], rate: float, seconds: float, warm_up: float, chance: random.Random,
    token: str | None,
) -> Load:  # fmt: skip
    connections, load = _Connections(url, token), Load(seconds)
    due = time.perf_counter()
    begin = due + warm_up
    end, sent = begin + seconds, []
    while (due := due + chance.expovariate(rate)) < end:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        sent.append(asyncio.create_task(connections.post(next(bodies), due)))
    answers = await asyncio.gather(*sent)
    load.answers = [answer for answer in answers if answer.began >= begin]
    with contextlib.suppress(OSError):
        connections.close()
    return load
