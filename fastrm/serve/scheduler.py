"""The scheduler: what is asked at about the same time is computed together, and answered as soon as it is known.

    score() --> prepare (threads) --> waiting groups --> packs, one after another (one thread) --> score() returns
                 parse, tokenise       equal prompts        Scorer.run
                                       are one group

- Requests with equal prompt and images join one group as long as it waits, so that its prompt is computed once.
- The first group that comes to an idle server waits `window_ms` for company; a busy server gathers while it computes,
  and for a moment after a pack, since those whom it answered ask again.
- A pack is filled with the shortest groups first, and takes no group that would more than double the pack
  (`SMALL_PACK` tokens are always allowed), so that a long group does not hold back short ones. A group that has
  waited for `patience_ms` is taken before all others, oldest first, so that it is not put off for ever.
- Each group is answered when its pack ends. If a pack fails as a whole, its groups are computed one by one, and if a
  group of several requests fails or is refused, each request by itself: what cannot be computed harms no other.
- A request that is cancelled leaves the queue, unless its pack is already computed.

A reward depends on the other groups of its pack, and on the responses that its group joins, by the last bits at most:
they are computed in other matrix products than alone (docs/serving.md says what was measured). With `deterministic`
nothing is joined, packed or remembered: every group is computed by itself, as it was sent.

All state belongs to the event loop's thread; other threads get what they need and return results.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

from fastrm.data.media.format import Patches
from fastrm.data.sources.media import Resolve, any_path
from fastrm.errors import ConfigError, ExactnessError, GroupError, RecordError
from fastrm.evaluate.scoring import group_error
from fastrm.serve.admission import Admission
from fastrm.serve.caches import BoundedCache
from fastrm.serve.media import SlowMedium
from fastrm.serve.reading import GroupReader, Read
from fastrm.serve.scorer import Scorer
from fastrm.serve.waiting import Ask, Waiting, choose, compute

_LOG = logging.getLogger(__name__)
_PREPARING_THREADS = 4
_FETCHING_THREADS = 16  # they wait most of the time
_GATHERING_SHARE = 0.05  # of the time of the last pack
_MAX_FAILURES = 8  # groups that fail one after another until the scheduler says that it is not ready


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


@dataclass
class Counts:
    """The sums of what a scheduler has done since its start.

    Attributes:
        groups, responses, tokens: that were computed, after merging and without what the cache knew.
        packs, pack_seconds: that were computed, and the time they took.
        merged_groups: that joined a group of another request.
        image_hits, image_misses, reward_hits, reward_misses: of the caches.
    """

    groups: int = 0
    responses: int = 0
    tokens: int = 0
    packs: int = 0
    pack_seconds: float = 0.0
    merged_groups: int = 0
    image_hits: int = 0
    image_misses: int = 0
    reward_hits: int = 0
    reward_misses: int = 0


class LastPack(NamedTuple):
    """The pack that was computed last: how many asks it answered, and how long it took."""

    num_asks: int = 0
    seconds: float = 0.0


class Scheduler(Admission[Scorer]):
    """A queue before one or more models, for any number of concurrent callers in one event loop.

        async with Scheduler([scorer]) as scheduler:
            await scheduler.score([{"prompt": "2 + 2?", "responses": ["4", "5"]}])

    Args:
        scorers: the models; the first one answers where none is named.
        max_queue: of `Admission`.
        window_ms: milliseconds that the first group waits for others, if nothing is being computed. Beyond that, and
            after a pack, those that it answered are waited for once more, for at most 5 % of the time that it took.
        patience_ms: milliseconds after which a group is taken before shorter ones.
        deterministic: compute every group by itself, as it was sent, one after another.
        rewards: keeps the rewards of responses; None, or with `deterministic`: each is computed again.
        images: that the scorers keep decoded images in, for the counts.
        max_responses: of a group; one with more is refused with TOO_MANY_RESPONSES.

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
        deterministic: bool = False,
        rewards: BoundedCache[float] | None = None,
        images: BoundedCache[Patches] | None = None,
        max_responses: int = 1024,
    ):
        super().__init__({scorer.name: scorer for scorer in scorers}, max_queue)
        for name in self.served:
            if sum(scorer.name == name for scorer in scorers) > 1:
                raise ConfigError(f"model {name}: stands for two models; name them, as a=runs/a/model b=runs/b/model")
        self.window, self.patience = window_ms / 1e3, patience_ms / 1e3
        self._is_deterministic = deterministic
        self._rewards: BoundedCache[float] = BoundedCache(0) if rewards is None or deterministic else rewards
        self._reader = GroupReader(self._rewards, max_responses)
        self._images: BoundedCache[Patches] = BoundedCache(0) if images is None else images
        self._counts = Counts()
        self._num_left = 0  # groups that a thread prepares although their request has left
        self._waiting: list[Waiting] = []
        self._open: dict[tuple, Waiting] = {}
        self._came = asyncio.Event()
        self._preparing = ThreadPoolExecutor(_PREPARING_THREADS, "fastrm-prepare")
        self._fetching = ThreadPoolExecutor(_FETCHING_THREADS, "fastrm-fetch")
        self._computing = ThreadPoolExecutor(1, "fastrm-compute")
        self._loop: asyncio.Task | None = None
        self._unanswered: set[asyncio.Future] = set()
        self._num_failures = 0  # since the last success
        self._last_pack = LastPack()

    async def __aenter__(self) -> "Scheduler":
        self._loop = asyncio.create_task(self._run())
        self._loop.add_done_callback(self._fail_all)
        return self

    async def __aexit__(self, *_) -> None:
        await self.close()

    @property
    def queue_length(self) -> int:
        """The number of groups that were accepted and have no answer yet, or are still prepared for nobody."""
        return self._num_accepted + self._num_left

    @property
    def counts(self) -> Counts:
        """The sums since the start."""
        return replace(
            self._counts,
            image_hits=self._images.hits,
            image_misses=self._images.misses,
            reward_hits=self._rewards.hits,
            reward_misses=self._rewards.misses,
        )

    @property
    def is_ready(self) -> bool:
        """True while requests are accepted and packs are computed, and not all of the latest groups have failed."""
        return self._accepts and self._num_failures < _MAX_FAILURES

    @property
    def _accepts(self) -> bool:
        return super()._accepts and self._loop is not None and not self._loop.done()

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

    async def submit(
        self,
        groups: Sequence[dict],
        model: str | None = None,
        resolver: Callable[[], Resolve] = lambda: any_path,
    ) -> Scored:
        """Return what `score` does, with the name of the model and counts.

        Args:
            resolver: makes for each group the function that opens its images and videos; default: every file that
                this process can read.

        Raises:
            UnknownModel, Unavailable: as `score`.
        """
        scorer = self.find(model)
        self._admit(len(groups))
        try:
            found = await asyncio.gather(
                *(self._score_group(scorer, index, one, resolver()) for index, one in enumerate(groups))
            )
        finally:
            self._num_accepted -= len(groups)
        return Scored([result for result, _ in found], scorer.name, sum(num_tokens for _, num_tokens in found))

    async def close(self) -> None:
        """Refuse what comes from now on, and return when all that was accepted has its answer."""
        await self.drain()
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
        for threads in (self._preparing, self._fetching, self._computing):
            threads.shutdown(wait=False)

    async def _score_group(
        self, scorer: Scorer, index: int, group: dict, resolve: Resolve
    ) -> tuple[list[float] | GroupError, int]:
        loop = asyncio.get_running_loop()
        try:
            try:
                read = await self._read(self._preparing, scorer, group, index, resolve)
            except SlowMedium as slow:
                read = await self._read(self._fetching, scorer, group, index, slow.resolve)
            if read.prepared is None:
                return [read.known[key] for key in read.keys], 0
            ask = Ask(read.prepared, loop.create_future(), time.monotonic())
            self._enqueue(scorer, ask)
            rewards = await ask.answer
            return self._reader.complete(read, rewards), read.prepared.num_tokens
        except RecordError as error:
            return group_error(index, group, error), 0
        except Exception as error:
            _LOG.exception("a group could not be computed")
            code = "INEXACT" if isinstance(error, ExactnessError) else "INTERNAL"
            problem = RecordError(code, f"the server failed at this group ({type(error).__name__}); its log says why")
            return group_error(index, group, problem), 0

    async def _read(self, threads: ThreadPoolExecutor, *arguments) -> Read:
        """Return what `GroupReader.read` does, in a thread; if that cannot be cancelled, its place stays taken."""
        reading = threads.submit(self._reader.read, *arguments)
        try:
            return await asyncio.wrap_future(reading)
        except asyncio.CancelledError:
            if not reading.cancel():
                self._num_left += 1
                loop = asyncio.get_running_loop()
                reading.add_done_callback(lambda _: _call(loop, self._forget_one))
            raise

    def _forget_one(self) -> None:
        self._num_left -= 1

    def _enqueue(self, scorer: Scorer, ask: Ask) -> None:
        if self._loop.done():
            raise RuntimeError("the scheduler has ended")
        self._unanswered.add(ask.answer)
        ask.answer.add_done_callback(self._unanswered.discard)
        key = (scorer.name, ask.prepared.key)
        waiting = self._open.get(key)
        if waiting is None or self._is_deterministic or not waiting.room_for(ask.prepared):
            waiting = self._open[key] = Waiting(scorer)
            self._waiting.append(waiting)
        else:
            self._counts.merged_groups += 1
        waiting.add(ask)
        self._came.set()

    def _fail_all(self, loop: asyncio.Task) -> None:
        """Leave nobody waiting when the loop has ended, which happens before `close` only by an error in it."""
        if not loop.cancelled():
            _LOG.error("the scheduler has failed, and the server must be started again", exc_info=loop.exception())
        for answer in list(self._unanswered):
            if not answer.done():
                answer.set_exception(RuntimeError("the scheduler has ended"))

    async def _run(self) -> None:
        while True:
            was_idle = not self._waiting
            while not self._waiting:
                self._came.clear()
                await self._came.wait()
            if not self._is_deterministic:
                await self._gather(was_idle)
            self._drop_cancelled()
            if pack := choose(self._waiting, time.monotonic() - self.patience):
                pack = pack[:1] if self._is_deterministic else pack
                self._take(pack)
                await self._compute(pack)

    async def _gather(self, was_idle: bool) -> None:
        """Wait a little for groups that are about to come.

        Whoever was answered by a pack asks again at once. A pack that began before they do would leave them to the
        next one, and the responses to a prompt would be computed in two halves, each with the whole prompt.
        """
        last, began = self._last_pack, time.monotonic()
        if was_idle:
            await asyncio.sleep(self.window)
        wanted = 0 if was_idle else last.num_asks + self._num_waiting
        while not any(waiting.num_tokens >= waiting.scorer.tokens_per_pack for waiting in self._waiting):
            left = began + _GATHERING_SHARE * last.seconds - time.monotonic()
            # What was accepted and does not wait is being read.
            if left <= 0 or self._num_waiting >= max(wanted, self._num_accepted):
                return
            self._came.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._came.wait(), left)

    @property
    def _num_waiting(self) -> int:
        return sum(len(waiting.asks) for waiting in self._waiting)

    def _drop_cancelled(self) -> None:
        for waiting in self._waiting:
            waiting.asks = [ask for ask in waiting.asks if not ask.answer.done()]
        self._take([waiting for waiting in self._waiting if not waiting.asks])

    def _take(self, pack: Iterable[Waiting]) -> None:
        """Remove groups from those that wait: later asks of their prompts begin new ones."""
        taken = set(map(id, pack))
        self._waiting = [waiting for waiting in self._waiting if id(waiting) not in taken]
        self._open = {key: waiting for key, waiting in self._open.items() if id(waiting) not in taken}

    async def _compute(self, pack: list[Waiting]) -> None:
        loop, started = asyncio.get_running_loop(), time.monotonic()
        try:
            results = await loop.run_in_executor(self._computing, compute, pack)
        except Exception as error:
            parts = pack if len(pack) > 1 else pack[0].apart()
            if len(parts) > 1:
                for waiting in parts:
                    await self._compute([waiting])
            else:
                self._num_failures += 1
                self._answer(pack[0], [error] * len(pack[0].asks))
            return
        self._num_failures = 0
        self._last_pack = LastPack(sum(len(waiting.asks) for waiting in pack), time.monotonic() - started)
        self._count(pack, time.monotonic() - started)
        for waiting, answers in zip(pack, results, strict=True):
            if len(waiting.asks) > 1 and isinstance(answers[0], RecordError):
                for alone in waiting.apart():
                    await self._compute([alone])
            else:
                self._answer(waiting, answers)

    def _count(self, pack: Sequence[Waiting], seconds: float) -> None:
        counts = self._counts
        counts.packs += 1
        counts.pack_seconds += seconds
        counts.groups += len(pack)
        counts.tokens += sum(waiting.num_tokens for waiting in pack)
        counts.responses += sum(len(ask.prepared.places) for waiting in pack for ask in waiting.asks)

    def _answer(self, waiting: Waiting, answers: Sequence[list[float] | Exception]) -> None:
        for ask, answer in zip(waiting.asks, answers, strict=True):
            if ask.answer.done():
                continue
            if isinstance(answer, Exception):
                ask.answer.set_exception(answer)
            else:
                ask.answer.set_result(answer)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    """Call a function in the loop's thread, unless the loop has ended."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function)
