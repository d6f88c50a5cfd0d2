"""Groups for a scheduler, and requests that certainly wait together."""

import asyncio
import threading

import numpy as np
import pytest

from fastrm.serve.scheduler import Scheduler
from tests.helpers.support import make_image, words
from tests.helpers.waiting import PATIENCE

BAND = 1e-6  # of rewards near 1 in float32: what another cut of the same work into matrix products may change


def make_groups(count, seed=0, num_responses=4):
    rng = np.random.default_rng(seed)
    groups = []
    for number in range(count):
        group = {
            "prompt": words(rng, int(rng.integers(2, 80))),
            "responses": [f"{words(rng, int(rng.integers(1, 40)))} {n}" for n in range(num_responses)],
        }
        if number % 2:
            group["images"] = [make_image(56 + 28 * (number % 3), 84, seed=number).data]
        groups.append(group)
    return groups


def singles(groups):
    return [{**group, "responses": [response]} for group in groups for response in group["responses"]]


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, PATIENCE))


class Company:
    """A scorer's packs, of which the first is held until a given number of others waits: then all have company.

    Attributes:
        packs: the number of groups of each pack after the first.
    """

    def __init__(self, monkeypatch, scorer):
        self.packs = []
        self._busy, self._free, compute = threading.Event(), threading.Event(), scorer.run

        def run(groups):
            if self._busy.is_set():
                self.packs.append(len(groups))
            self._busy.set()
            assert self._free.wait(PATIENCE)
            return compute(groups)

        monkeypatch.setattr(scorer, "run", run)

    async def gather(self, scheduler, calls, leaving=()):
        """Begin calls of `Scheduler.score` with one group each, in order; return what those give that do not leave."""
        try:
            first = asyncio.create_task(scheduler.score([{"prompt": "first", "responses": ["a"]}]))
            while not self._busy.is_set():
                await asyncio.sleep(0.001)
            tasks = [asyncio.create_task(call) for call in calls]
            while sum(len(waiting.asks) for waiting in scheduler._waiting) < len(tasks):
                await asyncio.sleep(0.001)
            for place in leaving:
                tasks[place].cancel()
        finally:
            self._free.set()
        await first
        return await asyncio.gather(*(task for place, task in enumerate(tasks) if place not in leaving))


def ask_each(scorer, groups, **settings):
    """The rewards of groups that wait together, each asked for by a request of its own; packs' sizes; joined groups."""

    async def ask():
        async with Scheduler([scorer], **settings) as scheduler:
            results = await company.gather(scheduler, [scheduler.score([group]) for group in groups])
            return [rewards for [rewards] in results], company.packs, scheduler.counts.merged_groups

    with pytest.MonkeyPatch.context() as monkeypatch:
        company = Company(monkeypatch, scorer)
        return run(ask())


def check_close(found, wanted):
    for rewards, others in zip(found, wanted, strict=True):
        np.testing.assert_allclose(rewards, others, rtol=0, atol=BAND)
