"""Schedulers in other processes behind the interface of one: rewards are asked where a group's prompt belongs."""

import asyncio
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import astuple
from typing import NamedTuple

from fastrm.data.sources.media import Resolve, any_path
from fastrm.errors import GroupError
from fastrm.serve.admission import Admission
from fastrm.serve.rendered_text import RenderedTextReader
from fastrm.serve.scheduler import Counts, Scored

# The keys of a group that say nothing of its prompt.
_NOT_OF_PROMPT = ("responses", "id", "source", "preferences", "scores")


# Makes for each group the function that opens its images and videos.
MakeResolve = Callable[[], Resolve]


def every_file() -> Resolve:
    """Return a function that opens every file which the process can read."""
    return any_path


class Served(NamedTuple):
    """A model that is served elsewhere: its name, and its reader of rendered text."""

    name: str
    reader: RenderedTextReader


class Dispatcher(Admission[Served], ABC):
    """The interface of one scheduler before several places that score groups.

    Args:
        max_queue: of `Admission`; what the places have been asked counts.
    """

    def __init__(self, max_queue: int):
        super().__init__({}, max_queue)

    @property
    @abstractmethod
    def counts(self) -> Counts:
        """The sums over all places since the start."""

    @abstractmethod
    def place_of(self, prompt: bytes) -> Hashable:
        """Return the place of the groups whose `prompt_hash` is given."""

    @abstractmethod
    async def ask(self, place: Hashable, groups: list[dict], model: str, resolver: MakeResolve) -> Scored:
        """Return the answer of a place to groups of its own."""

    async def submit(
        self, groups: Sequence[dict], model: str | None = None, resolver: MakeResolve = every_file
    ) -> Scored:
        """Return rewards as `Scheduler.submit` does; the resolver goes to another process with the groups.

        Raises:
            UnknownModel, Unavailable: as there; Unavailable also if a place is lost before its answer.
        """
        name = self.find(model).name
        self._admit(len(groups))
        try:
            return await self._spread(groups, name, resolver)
        finally:
            self._num_accepted -= len(groups)

    async def _spread(self, groups: Sequence[dict], model: str, resolver: MakeResolve) -> Scored:
        """Ask each place for its groups, and put the answers into the order of the groups."""
        # In a thread: an image of 20 MB takes tens of milliseconds, for which nobody else would be answered.
        prompts = await asyncio.to_thread(lambda: list(map(prompt_hash, groups)))
        parts: dict[Hashable, list[int]] = {}
        for number, prompt in enumerate(prompts):
            parts.setdefault(self.place_of(prompt), []).append(number)
        asked = [self.ask(place, [groups[n] for n in numbers], model, resolver) for place, numbers in parts.items()]
        found = await asyncio.gather(*asked)
        results: list[list[float] | GroupError | None] = [None] * len(groups)
        for numbers, scored in zip(parts.values(), found, strict=True):
            for number, result in zip(numbers, scored.results, strict=True):
                results[number] = _numbered(number, result)
        return Scored(results, model, sum(scored.num_tokens for scored in found))


def _numbered(number: int, result: list[float] | GroupError) -> list[float] | GroupError:
    return GroupError(number, result.id, result.code, result.message) if isinstance(result, GroupError) else result


def prompt_hash(group: object) -> bytes:
    """Return a hash that is equal for groups with equal prompts and images, as they were sent.

    No text is made of the whole: that would take as much memory again, and all other threads would wait for it.
    """
    if isinstance(group, dict):
        group = {key: value for key, value in group.items() if key not in _NOT_OF_PROMPT}
    digest, values = hashlib.blake2b(), [group]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            digest.update(b"{%d" % len(value))
            for key in sorted(value, key=str):
                values += (key, value[key])
        elif isinstance(value, (list, tuple)):
            digest.update(b"[%d" % len(value))
            values += value
        else:
            text = value if isinstance(value, str) else repr(value)
            data = text.encode(errors="surrogatepass")
            digest.update(b'%c%d"' % (b"s" if isinstance(value, str) else b"v", len(data)))
            digest.update(data)
    return digest.digest()


def summed(parts: Iterable[Counts]) -> Counts:
    """Return the sums of counts."""
    columns = zip(*map(astuple, [Counts(), *parts]), strict=True)
    return Counts(*map(sum, columns))
