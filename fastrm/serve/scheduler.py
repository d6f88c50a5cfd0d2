"""The scheduler: what is asked at about the same time is computed together, and answered as soon as it is known.

    score() --> prepare (threads) --> waiting groups --> packs, one after another (one thread) --> score() returns
                 parse, tokenise       equal prompts        Scorer.run
                                       are one group

- Requests with equal prompt and images join one group as long as it waits, so that its prompt is computed once.
- The first group that comes to an idle server waits `window_ms` for company; a busy server gathers while it computes.
- A pack is filled with the shortest groups first, and takes no group that would more than double the pack
  (`_SMALL_PACK` tokens are always allowed), so that a long group does not hold back short ones. A group that has
  waited for `patience_ms` is taken before all others, oldest first, so that it is not put off for ever.
- Each group is answered when its pack ends. If a pack fails as a whole, its groups are computed one by one, so that
  one that cannot be computed harms no other.
- A request that is cancelled leaves the queue, unless its pack is already computed.

All state belongs to the event loop's thread; other threads get what they need and return results.
"""

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from fastrm.data.sources.groups import group_record
from fastrm.data.sources.media import Resolve, any_path
from fastrm.errors import ConfigError, ExactnessError, GroupError, RecordError
from fastrm.evaluate.scoring import group_error
from fastrm.serve.problems import Unavailable, UnknownModel
from fastrm.serve.scorer import Prepared, Scorer, join

_LOG = logging.getLogger(__name__)
# A pack up to this many tokens may take any group that fits: a smaller one would be no faster on a GPU.
_SMALL_PACK = 2048
_PREPARING_THREADS = 4


@dataclass(frozen=True)
class Scored:
    """The answer to one call of `Scheduler.submit`.

    Attributes:
        results: for each group, the rewards of its responses, finite floats, or why it has none.
        model: the name of the model that scored.
        num_tokens: of all groups, each counted by itself with its prompt once; 0 for those that were refused.
    """

    results: list[list[float] | GroupError]
    model: str
    num_tokens: int


@dataclass(eq=False)
class _Ask:
    """A group of a request: what was prepared, and who waits for it."""

    prepared: Prepared
    answer: asyncio.Future
    came_at: float


@dataclass(eq=False)
class _Waiting:
    """The asks with one prompt that will be computed as one group.

    `num_tokens` is at least what the joined group has: what a later ask shares with the first one is counted by the
    common beginning of their first responses.
    """

    scorer: Scorer
    asks: list[_Ask] = field(default_factory=list)
    num_tokens: int = 0

    @property
    def came_at(self) -> float:
        return self.asks[0].came_at

    def room_for(self, prepared: Prepared) -> bool:
        return self.num_tokens + self._added(prepared) <= self.scorer.tokens_per_pack

    def add(self, ask: _Ask) -> None:
        self.num_tokens += self._added(ask.prepared)
        self.asks.append(ask)

    def _added(self, prepared: Prepared) -> int:
        return prepared.num_tokens - (num_common(self.asks[0].prepared, prepared) if self.asks else 0)


def num_common(one: Prepared, other: Prepared) -> int:
    """Return the number of tokens with which the first conversations of two groups of one prompt begin alike."""
    first, second = (part.ready[0].group.responses[0].tokens for part in (one, other))
    length = min(len(first), len(second))
    differs = np.flatnonzero(first[:length] != second[:length])
    return int(differs[0]) if len(differs) else length


class Scheduler:
    """A queue before one or more models, for any number of concurrent callers in one event loop.

        async with Scheduler([scorer]) as scheduler:
            await scheduler.score([{"prompt": "2 + 2?", "responses": ["4", "5"]}])

    Args:
        scorers: the models; the first one answers where none is named.
        max_queue: the number of groups that may wait or be computed; more are refused with `Unavailable`.
        window_ms: milliseconds that the first group waits for others, if nothing is being computed.
        patience_ms: milliseconds after which a group is taken before shorter ones.
        resolve: opens the paths of images and videos; default: every file that this process can read.

    Raises:
        ConfigError: for two models of one name.
    """

    def __init__(
        self,
        scorers: Sequence[Scorer],
        *,
        max_queue: int = 1024,
        window_ms: float = 3.0,
        patience_ms: float = 2000.0,
        resolve: Resolve = any_path,
    ):
        self.scorers = {scorer.name: scorer for scorer in scorers}
        for name in self.scorers:
            if sum(scorer.name == name for scorer in scorers) > 1:
                raise ConfigError(f"model {name}: stands for two models; name them, as a=runs/a/model b=runs/b/model")
        self.max_queue, self.window, self.patience = max_queue, window_ms / 1e3, patience_ms / 1e3
        self._resolve = resolve
        self._num_accepted = 0
        self._waiting: list[_Waiting] = []
        self._open: dict[tuple, _Waiting] = {}
        self._came = asyncio.Event()
        self._preparing = ThreadPoolExecutor(_PREPARING_THREADS, "fastrm-prepare")
        self._computing = ThreadPoolExecutor(1, "fastrm-compute")
        self._loop: asyncio.Task | None = None
        self._is_closing = False

    async def __aenter__(self) -> "Scheduler":
        self._loop = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_) -> None:
        await self.close()

    @property
    def models(self) -> list[str]:
        """The names of the models, the default first."""
        return list(self.scorers)

    @property
    def queue_length(self) -> int:
        """The number of groups that were accepted and have no answer yet."""
        return self._num_accepted

    @property
    def is_ready(self) -> bool:
        """True while requests are accepted and packs are computed."""
        return not self._is_closing and self._loop is not None and not self._loop.done()

    async def score(self, groups: Sequence[dict], model: str | None = None) -> list[list[float] | GroupError]:
        """Return the rewards of every group's responses, as `RewardModel.score` with ``on_error="return"``.

        Args:
            groups: as `RewardModel.score` takes them.
            model: one of `models`; None: the first.

        Returns:
            for each group its rewards, finite floats, or a `GroupError` in their place.

        Raises:
            UnknownModel: for another name.
            Unavailable: if the queue has no room for all of the groups, or the scheduler is closing.
        """
        return (await self.submit(groups, model)).results

    async def submit(self, groups: Sequence[dict], model: str | None = None) -> Scored:
        """Return what `score` does, with the name of the model and counts.

        Raises:
            UnknownModel, Unavailable: as `score`.
        """
        scorer = self.find(model)
        self._admit(len(groups))
        try:
            found = await asyncio.gather(*(self._score_group(scorer, index, one) for index, one in enumerate(groups)))
        finally:
            self._num_accepted -= len(groups)
        return Scored([result for result, _ in found], scorer.name, sum(num_tokens for _, num_tokens in found))

    async def close(self) -> None:
        """Refuse what comes from now on, and return when all that was accepted has its answer."""
        self._is_closing = True
        while self._num_accepted:
            await asyncio.sleep(0.01)
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
        self._preparing.shutdown(wait=False)
        self._computing.shutdown(wait=False)

    def find(self, model: str | None) -> Scorer:
        """Return the model of a name, or the first for None.

        Raises:
            UnknownModel: for another name.
        """
        if model is None:
            return next(iter(self.scorers.values()))
        if not isinstance(model, str) or model not in self.scorers:
            raise UnknownModel(model, self.models)
        return self.scorers[model]

    def _admit(self, num_groups: int) -> None:
        if self._is_closing:
            raise Unavailable("CLOSING", "the server is ending; ask another one")
        if self._num_accepted + num_groups > self.max_queue:
            raise Unavailable(
                "QUEUE_FULL",
                f"{self._num_accepted:,} groups wait, {num_groups:,} more would be over the limit of "
                f"{self.max_queue:,}; try again later",
            )
        self._num_accepted += num_groups

    async def _score_group(self, scorer: Scorer, index: int, group: dict) -> tuple[list[float] | GroupError, int]:
        loop = asyncio.get_running_loop()
        try:
            prepared = await loop.run_in_executor(self._preparing, self._prepare, scorer, group, index)
            ask = _Ask(prepared, loop.create_future(), time.monotonic())
            self._enqueue(scorer, ask)
            return await ask.answer, prepared.num_tokens
        except RecordError as error:
            return group_error(index, group, error), 0
        except Exception as error:
            _LOG.exception("a group could not be computed")
            code = "INEXACT" if isinstance(error, ExactnessError) else "INTERNAL"
            problem = RecordError(code, f"the server failed at this group ({type(error).__name__}); its log says why")
            return group_error(index, group, problem), 0

    def _prepare(self, scorer: Scorer, group: dict, index: int) -> Prepared:
        return scorer.prepare(group_record(group, index, resolve=self._resolve))

    def _enqueue(self, scorer: Scorer, ask: _Ask) -> None:
        key = (scorer.name, ask.prepared.key)
        waiting = self._open.get(key)
        if waiting is None or not waiting.room_for(ask.prepared):
            waiting = self._open[key] = _Waiting(scorer)
            self._waiting.append(waiting)
        waiting.add(ask)
        self._came.set()

    async def _run(self) -> None:
        while True:
            was_idle = not self._waiting
            while not self._waiting:
                self._came.clear()
                await self._came.wait()
            if was_idle:
                await asyncio.sleep(self.window)
            self._drop_cancelled()
            if pack := choose(self._waiting, time.monotonic() - self.patience):
                self._take(pack)
                await self._compute(pack)

    def _drop_cancelled(self) -> None:
        for waiting in self._waiting:
            waiting.asks = [ask for ask in waiting.asks if not ask.answer.done()]
        self._take([waiting for waiting in self._waiting if not waiting.asks])

    def _take(self, pack: Iterable[_Waiting]) -> None:
        """Remove groups from those that wait: later asks of their prompts begin new ones."""
        taken = set(map(id, pack))
        self._waiting = [waiting for waiting in self._waiting if id(waiting) not in taken]
        self._open = {key: waiting for key, waiting in self._open.items() if id(waiting) not in taken}

    async def _compute(self, pack: list[_Waiting]) -> None:
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self._computing, _compute, pack)
        except Exception as error:
            if len(pack) > 1:
                for waiting in pack:
                    await self._compute([waiting])
            else:
                self._answer(pack[0], [error] * len(pack[0].asks))
            return
        for waiting, answers in zip(pack, results, strict=True):
            self._answer(waiting, answers)

    def _answer(self, waiting: _Waiting, answers: Sequence[list[float] | Exception]) -> None:
        for ask, answer in zip(waiting.asks, answers, strict=True):
            if ask.answer.done():
                continue
            if isinstance(answer, Exception):
                ask.answer.set_exception(answer)
            else:
                ask.answer.set_result(answer)


def choose(waiting: Sequence[_Waiting], overdue_before: float) -> list[_Waiting]:
    """Return the groups of the next pack, all of one model.

    Args:
        waiting: in the order of coming.
        overdue_before: groups that came before this time go first.
    """
    overdue = [one for one in waiting if one.came_at < overdue_before]
    others = sorted((one for one in waiting if one.came_at >= overdue_before), key=lambda one: one.num_tokens)
    pack: list[_Waiting] = []
    total = 0
    for one in [*overdue, *others]:
        if pack and one.scorer is not pack[0].scorer:
            continue
        fits = total + one.num_tokens <= one.scorer.tokens_per_pack
        if not pack or (fits and one.num_tokens <= max(total, _SMALL_PACK - total)):
            pack.append(one)
            total += one.num_tokens
    return pack


def _compute(pack: Sequence[_Waiting]) -> list[list[list[float] | RecordError]]:
    """Return for each group the answers to its asks."""
    joined = [join([ask.prepared for ask in waiting.asks]) for waiting in pack]
    results = pack[0].scorer.run([group for group, _ in joined])
    return [
        [result if isinstance(result, RecordError) else [result[place] for place in places] for places in parts]
        for result, (_, parts) in zip(results, joined, strict=True)
    ]
