"""The scheduler: rewards of `RewardModel.score`, whoever asks at the same time; the queue, its bound and its order."""

import asyncio

import numpy as np
import pytest

from fastrm.errors import ConfigError, GroupError
from fastrm.evaluate.ensemble import Ensemble
from fastrm.evaluate.reward_model import RewardModel
from fastrm.serve.problems import Unavailable, UnknownModel
from fastrm.serve.scheduler import Scheduler
from fastrm.serve.scorer import Scorer
from fastrm.serve.waiting import choose
from tests.helpers.scheduling import BAND, Company, make_groups, run, singles
from tests.helpers.support import make_model
from tests.helpers.waiting import PATIENCE


def test_a_call_gives_the_rewards_of_the_model_to_the_bit(model, scorer):
    groups = make_groups(6)

    async def ask():
        async with Scheduler([scorer]) as scheduler:
            return await scheduler.score(groups)

    assert run(ask()) == model.score(groups)


def test_singles_of_one_prompt_that_come_together_are_one_group(model, scorer, monkeypatch):
    groups = make_groups(4)
    company = Company(monkeypatch, scorer)

    async def ask():
        async with Scheduler([scorer]) as scheduler:
            return await company.gather(scheduler, [scheduler.score([single]) for single in singles(groups)])

    found = [reward for [[reward]] in run(ask())]
    assert company.packs == [4]
    wanted = [reward for rewards in model.score(groups) for reward in rewards]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=BAND)


def test_a_group_that_cannot_be_scored_has_its_reason_in_its_place(model, scorer):
    groups = make_groups(2)
    bad = [{"prompt": "a", "images": [b"no image"], "responses": ["b"]}, {"responses": ["b"]}]

    async def ask():
        async with Scheduler([scorer]) as scheduler:
            return await scheduler.score([groups[0], *bad, groups[1]])

    first, no_image, no_prompt, last = run(ask())
    assert [first, last] == model.score(groups)
    assert isinstance(no_image, GroupError) and (no_image.index, no_image.code) == (1, "IMAGE_FORMAT")
    assert isinstance(no_prompt, GroupError) and (no_prompt.index, no_prompt.code) == (2, "BAD_ROW")


def test_a_full_queue_refuses_and_accepts_again_when_there_is_room(model, scorer):
    groups = make_groups(3)

    async def ask():
        async with Scheduler([scorer], max_queue=2) as scheduler:
            first = asyncio.create_task(scheduler.score(groups[:2]))
            await asyncio.sleep(0)
            with pytest.raises(Unavailable, match="2 groups wait, 1 more"):
                await scheduler.score(groups[2:])
            return await first, await scheduler.score(groups[2:])

    first, second = run(ask())
    assert [*first, *second] == model.score(groups)


def test_what_is_cancelled_leaves_the_queue_and_is_not_computed(scorer, monkeypatch):
    company = Company(monkeypatch, scorer)

    async def ask():
        async with Scheduler([scorer]) as scheduler:
            await company.gather(scheduler, [scheduler.score([group]) for group in make_groups(2)], leaving=[1])
            return scheduler.queue_length

    assert run(ask()) == 0 and company.packs == [1]


def test_short_groups_are_answered_before_a_long_one(scorer, monkeypatch):
    long = {"prompt": "the cat " * 900, "responses": ["yes", "no"]}
    short = [{"prompt": f"Is this {number}?", "responses": ["yes", "no"]} for number in range(4)]
    company, done = Company(monkeypatch, scorer), []

    async def one(scheduler, name, group):
        await scheduler.score([group])
        done.append(name)

    async def ask():
        async with Scheduler([scorer], patience_ms=PATIENCE * 1000) as scheduler:
            shorts = [one(scheduler, "short", group) for group in short]
            await company.gather(scheduler, [one(scheduler, "long", long), *shorts])

    run(ask())
    assert done == ["short"] * 4 + ["long"]


class Waits:
    """A group that waits, as `choose` sees it."""

    def __init__(self, num_tokens, came_at, scorer):
        self.num_tokens, self.came_at, self.scorer = num_tokens, came_at, scorer


def test_a_pack_is_filled_from_short_groups_up_and_takes_none_that_would_more_than_double_it(scorer):
    waiting = [Waits(num_tokens, 1.0, scorer) for num_tokens in (5000, 700, 300, 1300, 2100, 6000)]
    assert [one.num_tokens for one in choose(waiting, 0.0)] == [300, 700]
    assert [one.num_tokens for one in choose([Waits(900, 1.0, scorer)] * 12, 0.0)] == [900] * 9  # 8,192 tokens a pack


def test_a_group_that_has_waited_for_long_goes_first_and_the_oldest_of_them_before_the_others(scorer):
    short = [Waits(10, 5.0, scorer) for _ in range(3)]
    old, older = Waits(6000, 2.0, scorer), Waits(5000, 1.0, scorer)
    assert choose([*short, older, old], 0.5)[0] is short[0]
    assert choose([*short, older, old], 3.0)[0] is older
    assert old not in choose([*short, older, old], 3.0)  # 11,000 tokens are over the budget
    assert choose([*short, old], 3.0)[0] is old


def test_models_are_known_by_name(model, scorer):
    other = Scorer("other", Ensemble([RewardModel(make_model("qwen2_5_vl", seed=1))]), 8192)
    groups = make_groups(2)

    async def ask():
        async with Scheduler([scorer, other]) as scheduler:
            with pytest.raises(UnknownModel, match="'third' is not served here; name one of tiny, other"):
                await scheduler.score(groups, "third")
            return await asyncio.gather(scheduler.score(groups, "other"), scheduler.score(groups))

    assert run(ask()) == [other.ensemble.score(groups), model.score(groups)]
    with pytest.raises(ConfigError, match="two models"):
        Scheduler([scorer, Scorer("tiny", other.ensemble, 8192)])
