"""The groups that wait for a pack: requests with one prompt are one of them, and `choose` takes a pack of them."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastrm.data.group import num_common
from fastrm.errors import RecordError
from fastrm.serve.scorer import Prepared, Scorer, join

# A pack up to this many tokens may take any group that fits: a smaller one would be no faster on a GPU.
SMALL_PACK = 2048


@dataclass(eq=False)
class Ask:
    """A group of a request: what was prepared, and who waits for it."""

    prepared: Prepared
    answer: asyncio.Future
    came_at: float


@dataclass(eq=False)
class Waiting:
    """The asks with one prompt that will be computed as one group.

    `num_tokens` is at least what the joined group has: what a later ask shares with the first one is counted by the
    common beginning of their first responses.
    """

    scorer: Scorer
    asks: list[Ask] = field(default_factory=list)
    num_tokens: int = 0

    @property
    def came_at(self) -> float:
        return self.asks[0].came_at

    def room_for(self, prepared: Prepared) -> bool:
        return self.num_tokens + self._added(prepared) <= self.scorer.tokens_per_pack

    def add(self, ask: Ask) -> None:
        self.num_tokens += self._added(ask.prepared)
        self.asks.append(ask)

    def apart(self) -> list["Waiting"]:
        """Return a group for each ask that is still waited for."""
        return [Waiting(self.scorer, [ask], ask.prepared.num_tokens) for ask in self.asks if not ask.answer.done()]

    def _added(self, prepared: Prepared) -> int:
        if not self.asks:
            return prepared.num_tokens
        first, second = (part.ready[0].group.responses[0].tokens for part in (self.asks[0].prepared, prepared))
        return prepared.num_tokens - num_common(first, second)


def choose(waiting: Sequence[Waiting], overdue_before: float) -> list[Waiting]:
    """Return the groups of the next pack, all of one model.

    Args:
        waiting: in the order of coming.
        overdue_before: groups that came before this time go first.
    """
    overdue = [one for one in waiting if one.came_at < overdue_before]
    others = sorted((one for one in waiting if one.came_at >= overdue_before), key=lambda one: one.num_tokens)
    pack: list[Waiting] = []
    total = 0
    for one in [*overdue, *others]:
        if pack and one.scorer is not pack[0].scorer:
            continue
        fits = total + one.num_tokens <= one.scorer.tokens_per_pack
        if not pack or (fits and one.num_tokens <= max(total, SMALL_PACK - total)):
            pack.append(one)
            total += one.num_tokens
    return pack


def compute(pack: Sequence[Waiting]) -> list[list[list[float] | RecordError]]:
    """Compute a pack; return for each of its groups the answers to its asks."""
    joined = [join([ask.prepared for ask in waiting.asks]) for waiting in pack]
    results = pack[0].scorer.run([group for group, _ in joined])
    return [
        [result if isinstance(result, RecordError) else [result[place] for place in places] for places in parts]
        for result, (_, parts) in zip(results, joined, strict=True)
    ]
