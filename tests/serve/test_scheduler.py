"""The scheduler: rewards of `RewardModel.score`, whoever asks at the same time; order, bounds, cancelling, failures."""

import asyncio
import threading

import numpy as np
import pytest
from starlette.requests import Request

from fastrm.errors import ConfigError, GroupError, RecordError
from fastrm.evaluate.ensemble import Ensemble
from fastrm.evaluate.reward_model import RewardModel
from fastrm.serve.app import Service
from fastrm.serve.caches import BoundedCache
from fastrm.serve.problems import RequestError, Unavailable, UnknownModel
from fastrm.serve.scheduler import Scheduler
from fastrm.serve.scorer import Scorer
from fastrm.serve.settings import ServeSettings
from fastrm.serve.waiting import choose
from tests.helpers.support import make_image, make_model, words
from tests.helpers.waiting import PATIENCE

BAND = 1e-6  # of rewards near 1 in float32: what another cut of the same work into matrix products may change


@pytest.fixture(scope="module")
def model():
    return RewardModel(make_model("qwen2_5_vl"))


@pytest.fixture(scope="module")
def scorer(model):
    return Scorer("tiny", Ensemble([model]), 8192)


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
    return asyncio.run(asyncio.wait_for(coroutine, 300))


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
        async with Scheduler([scorer], max_queue=2, window_ms=50) as scheduler:
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


def test_a_pack_that_fails_is_computed_group_by_group(model, scorer, monkeypatch):
    groups = make_groups(3)
    compute = scorer.run

    def fails(found):
        if any(len(group.record.responses) == 3 for group in found):
            raise RuntimeError("out of memory")
        return compute(found)

    monkeypatch.setattr(scorer, "run", fails)
    bad = {"prompt": "a", "responses": ["b", "c", "d"]}

    async def ask():
        async with Scheduler([scorer], window_ms=50) as scheduler:
            return await scheduler.score([*groups[:2], bad, groups[2]])

    *good, failed, last = run(ask())
    assert [*good, last] == model.score(groups)
    assert isinstance(failed, GroupError) and failed.code == "INTERNAL"


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


def shuffled(items, seed):
    order = np.random.default_rng(seed).permutation(len(items))
    return [items[place] for place in order], order


def ask_each(scorer, groups, **settings):
    """The rewards of groups that wait together, each asked for by a request of its own; packs' sizes; joined groups."""

    async def ask():
        async with Scheduler([scorer], **settings) as scheduler:
            results = await company.gather(scheduler, [scheduler.score([group]) for group in groups])
            return [rewards for [rewards] in results], company.packs, scheduler.counts.merged_groups

    with pytest.MonkeyPatch.context() as monkeypatch:
        company = Company(monkeypatch, scorer)
        return run(ask())


@pytest.mark.parametrize("seed", range(3))
def test_order_and_company_do_not_change_a_reward_to_the_bit_in_float32(model, scorer, seed):
    groups = make_groups(10, seed)
    sent, order = shuffled(groups, seed)
    wanted = [model.score([groups[place]])[0] for place in order]
    rewards = BoundedCache(1000)  # as `fastrm serve` has one

    async def again():
        async with Scheduler([scorer], rewards=rewards) as scheduler:
            return await scheduler.score(sent)

    found, packs, num_joined = ask_each(scorer, sent, rewards=rewards)
    assert found == wanted and run(again()) == wanted and rewards.hits == 40
    assert max(packs) > 1 and sum(packs) == 10 and num_joined == 0


@pytest.mark.parametrize("seed", range(3))
def test_responses_that_join_a_group_keep_their_rewards_within_the_band(model, scorer, seed):
    groups = make_groups(6, seed)
    sent, order = shuffled(singles(groups), seed)
    whole = [reward for group in groups for reward in model.score([group])[0]]
    found, packs, num_joined = ask_each(scorer, sent)
    assert num_joined == len(sent) - len(groups) and max(packs) > 1
    np.testing.assert_allclose([reward for [reward] in found], [whole[place] for place in order], rtol=0, atol=BAND)


def test_groups_of_any_number_of_responses_do_not_depend_on_the_company_of_their_pack(scorer):
    """A CPU's products compute rows in fours, and the rest by other code."""
    groups = [
        {**group, "responses": group["responses"][: 1 + number % 7]}
        for number, group in enumerate(make_groups(9, seed=3, num_responses=7))
    ]
    found, packs, _ = ask_each(scorer, groups)
    assert max(packs) > 1
    assert found == [ask_each(scorer, [group])[0][0] for group in groups]


def test_deterministic_gives_joined_responses_too_to_the_bit(scorer):
    alone = singles(make_groups(4, seed=4))
    sent, order = shuffled(alone, 4)
    found, packs, num_joined = ask_each(scorer, sent, deterministic=True)
    assert packs == [1] * len(sent) and num_joined == 0
    wanted = [ask_each(scorer, [single], deterministic=True)[0][0] for single in alone]
    assert found == [wanted[place] for place in order]


def test_equal_responses_of_one_group_and_of_several_get_equal_rewards(scorer):
    group = {"prompt": "the cat", "responses": ["yes", "no", "yes"]}
    (first, second), packs, num_joined = ask_each(scorer, [group, {"prompt": "the cat", "responses": ["no", "so"]}])
    assert packs == [1] and num_joined == 1
    assert first[0] == first[2] and first[1] == second[0]


def check_close(found, wanted):
    for rewards, others in zip(found, wanted, strict=True):
        np.testing.assert_allclose(rewards, others, rtol=0, atol=BAND)


def routed():
    """A model of images with a route for texts, and two groups of one prompt: the route takes the first alone."""
    ensemble = Ensemble([RewardModel(make_model("qwen2_5_vl"))], text=RewardModel(make_model("qwen2", seed=1)))
    seen = {"type": "image", "image": make_image(56, 56).data}
    turns = [
        {"role": "assistant", "content": "hm"},
        {"role": "user", "content": [seen, {"type": "text", "text": "and this"}]},
        {"role": "assistant", "content": "no"},
    ]
    groups = [{"prompt": "the cat", "responses": ["yes", "no"]}, {"prompt": "the cat", "responses": ["yes", turns]}]
    return ensemble, groups


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_kept_reward_is_of_the_model_that_the_route_chose_for_its_group(order):
    ensemble, groups = routed()

    async def ask():
        async with Scheduler([Scorer("tiny", ensemble, 8192)], rewards=BoundedCache(100)) as scheduler:
            return [await scheduler.score([groups[place]]) for place in order]

    check_close([rewards for [rewards] in run(ask())], [ensemble.score([groups[place]])[0] for place in order])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_groups_of_one_prompt_that_different_models_score_are_not_joined(order):
    ensemble, groups = routed()
    found, _ = ask_in_company(Scorer("tiny", ensemble, 8192), [groups[place] for place in order])
    check_close(found, [ensemble.score([groups[place]])[0] for place in order])


def ask_in_company(scorer, groups):
    """The rewards of groups that are asked for by requests of their own and certainly wait together, and the counts."""
    is_busy, may_go_on, compute = threading.Event(), threading.Event(), scorer.run

    def held(found):
        is_busy.set()
        assert may_go_on.wait(PATIENCE)
        return compute(found)

    async def ask():
        scorer.run = held
        async with Scheduler([scorer]) as scheduler:
            first = asyncio.create_task(scheduler.score([{"prompt": "first", "responses": ["a"]}]))
            await asyncio.to_thread(is_busy.wait, PATIENCE)
            scorer.run = compute
            asked = [asyncio.create_task(scheduler.score([group])) for group in groups]
            while sum(len(waiting.asks) for waiting in scheduler._waiting) < len(groups):
                await asyncio.sleep(0.001)
            may_go_on.set()
            await first
            return [rewards for [rewards] in await asyncio.gather(*asked)], scheduler.counts

    try:
        return run(ask())
    finally:
        may_go_on.set()
        scorer.run = compute


@pytest.mark.parametrize("is_refused", [True, False], ids=["refused", "failed"])
def test_what_cannot_be_computed_harms_no_request_that_it_was_joined_with(model, scorer, monkeypatch, is_refused):
    good = [{"prompt": "the cat", "responses": ["yes"]}, {"prompt": "the cat", "responses": ["no", "so"]}]
    compute = scorer.run

    def fails(found):
        is_bad = ["bad" in [response.text for response in group.record.responses] for group in found]
        if any(is_bad) and not is_refused:
            raise RuntimeError("out of memory")
        refused = RecordError("NON_FINITE_REWARD", "an infinity")
        return [refused if bad else result for bad, result in zip(is_bad, compute(found), strict=True)]

    monkeypatch.setattr(scorer, "run", fails)
    (first, bad, last), counts = ask_in_company(scorer, [good[0], {"prompt": "the cat", "responses": ["bad"]}, good[1]])
    assert counts.merged_groups == 2
    check_close([first, last], [model.score([group])[0] for group in good])
    assert isinstance(bad, GroupError) and bad.code == ("NON_FINITE_REWARD" if is_refused else "INTERNAL")


class Held:
    """A model whose groups are prepared when the gate is opened, and then refused."""

    name, tokens_per_pack = "held", 100

    def __init__(self):
        self.gate = threading.Event()

    def is_routed(self, record):
        return False

    def prepare(self, *_):
        assert self.gate.wait(PATIENCE)
        raise RecordError("BAD_ROW", "refused")


def test_a_loop_that_fails_leaves_nobody_waiting(scorer, monkeypatch):
    def fails(*_):
        raise RuntimeError("a fault in the loop")

    monkeypatch.setattr("fastrm.serve.scheduler.choose", fails)

    async def ask():
        async with Scheduler([scorer]) as scheduler:
            asked = scheduler.score([{"prompt": "the cat", "responses": ["yes"]}] * 2)
            return await asyncio.wait_for(asked, 100), scheduler.is_ready

    results, is_ready = run(ask())
    assert [result.code for result in results] == ["INTERNAL"] * 2 and not is_ready


def test_a_scheduler_whose_groups_all_fail_is_not_ready_until_one_is_computed(model, scorer, monkeypatch):
    compute, groups = scorer.run, [{"prompt": f"the {n}", "responses": ["yes", "no", "so", "a"]} for n in range(8)]

    def fails(found):
        raise RuntimeError("the device is lost")

    async def ask():
        async with Scheduler([scorer]) as scheduler:
            monkeypatch.setattr(scorer, "run", fails)
            assert all(isinstance(result, GroupError) for result in await scheduler.score(groups[:7]))
            ready = [scheduler.is_ready]
            await scheduler.score(groups[7:])
            ready.append(scheduler.is_ready)
            monkeypatch.setattr(scorer, "run", compute)
            assert await scheduler.score(groups[:1]) == model.score(groups[:1])
            return [*ready, scheduler.is_ready]

    assert run(ask()) == [True, False, True]


@pytest.mark.parametrize("leaves", [True, False], ids=["client left", "server ended"])
def test_a_client_that_leaves_an_ending_server_is_not_a_lost_answer(leaves):
    held = Held()

    async def ask():
        left = asyncio.Event()

        async def receive():
            await left.wait()
            return {"type": "http.disconnect"}

        async with Scheduler([held]) as scheduler:
            request = Request({"type": "http"}, receive)
            service, group = Service(scheduler, ServeSettings()), {"prompt": "a", "responses": ["b"]}
            asked = asyncio.create_task(service.score(request, [group]))
            while not scheduler.queue_length:
                await asyncio.sleep(0.001)
            scheduler.stop_accepting()
            left.set() if leaves else asked.cancel()
            with pytest.raises(RequestError if leaves else asyncio.CancelledError):
                await asked
            held.gate.set()
            return scheduler.num_lost

    assert run(ask()) == (0 if leaves else 1)
