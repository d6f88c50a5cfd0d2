"""What a group's company may change: order, packs, joined groups, kept rewards and routes."""

import asyncio
import threading

import numpy as np
import pytest

from fastrm.evaluate.ensemble import Ensemble
from fastrm.evaluate.reward_model import RewardModel
from fastrm.serve import scheduler as scheduling
from fastrm.serve.caches import BoundedCache
from fastrm.serve.scheduler import Scheduler
from fastrm.serve.scorer import Scorer
from tests.helpers.scheduling import BAND, ask_each, check_close, make_groups, run, singles
from tests.helpers.support import make_image, make_model


def shuffled(items, seed):
    order = np.random.default_rng(seed).permutation(len(items))
    return [items[place] for place in order], order


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
    found, _, _ = ask_each(Scorer("tiny", ensemble, 8192), [groups[place] for place in order])
    check_close(found, [ensemble.score([groups[place]])[0] for place in order])


def test_clients_that_ask_again_when_they_are_answered_are_computed_together(scorer, monkeypatch):
    """A pack that began with one of them would leave the others to the next one, and so on for ever."""
    monkeypatch.setattr(scheduling, "_GATHERING_SHARE", 100)  # the time of 100 packs, however slow this machine is
    packs, compute, began = [], scorer.run, threading.Event()

    def count(groups):
        packs.append(sum(len(group.ready[0].group.responses) for group in groups))
        began.set()
        return compute(groups)

    monkeypatch.setattr(scorer, "run", count)

    async def client(scheduler, number):
        while number and not began.is_set():  # the first one's pack is being computed when the others come
            await asyncio.sleep(0.001)
        for turn in range(6):
            await scheduler.score([{"prompt": f"turn {turn}", "responses": [f"answer {number}"]}])

    async def ask():
        async with Scheduler([scorer]) as scheduler:
            await asyncio.gather(*(client(scheduler, number) for number in range(8)))

    run(ask())
    assert sum(packs) == 48 and packs.count(8) >= 4, packs
