"""The reward of a judge that learns, against R1-Reward's formula by hand, and through the adapters of trainers."""

import asyncio
import pickle

import pytest

from fastrm.errors import ConfigError, DataError
from fastrm.rl import JudgeReward, Rewards, Sample
from fastrm.rl.openrlhf import reward_function as openrlhf_function
from fastrm.rl.trl import reward_function
from fastrm.rl.verl import score_function

RIGHT = "<think>Response 1 is better.</think><answer>1</answer>"


@pytest.mark.parametrize(
    "text, reward",
    [
        (RIGHT, 2.0),  # 0.5 + 1 (1 + 0.5)
        ("<think>It is true.</think><answer>1</answer>", 1.5),  # 0.5 + 1 (1 + 0)
        ("<think>Response 2 is better.</think><answer>1</answer>", 1.0),  # 0.5 + 1 (1 - 0.5)
        ("<think>Response 2 is better.</think><answer>2</answer>", 0.5),  # 0.5 + 0
        ("<think>Response 1 is better.</think><answer>2</answer>", 0.5),
        ("Response 1 is better: <answer>1</answer>", 1.5),  # 0 + 1 (1 + 0.5)
        ("Response 2 is better: <answer>1</answer>", 0.5),  # 0 + 1 (1 - 0.5)
        ("<answer>1</answer>", 1.0),
        ("<answer>2</answer>", 0.0),
        ("<think>Both are bad.</think><answer>tie</answer>", 0.0),
        ("I cannot say.", 0.0),
        ("", 0.0),
    ],
)
def test_the_reward_is_that_of_r1_reward(text, reward):
    rewards = Rewards(scheme="judge", judge=JudgeReward("r1_reward"))
    assert rewards([Sample("Which?", text, truth="1")]) == [reward]


def test_the_weights_of_llava_critic_r1():
    judge = JudgeReward("r1_reward", format=0.1, accuracy=0.9, consistency=0.0)
    assert [judge.value(RIGHT, True), judge.value(RIGHT, False), judge.value("1", True)] == [1.0, 0.1, 0.9]
    assert judge.best == 1.0


@pytest.mark.parametrize("truth", ["1", 1, "<answer>1</answer>", ["<answer>1</answer>"], r"\boxed{1}"])
def test_a_place_is_read_in_the_forms_of_published_rows(truth):
    rewards = Rewards(scheme="judge", judge=JudgeReward("r1_reward"))
    assert rewards.match([Sample("Which?", text, truth=truth) for text in (RIGHT, "2", "")]) == [True, False, False]


def test_a_truth_that_is_no_place_is_named():
    rewards = Rewards(scheme="judge", judge=JudgeReward("r1_reward"))
    with pytest.raises(DataError, match="true answer: got 'Response 1', wanted the place of the better response"):
        rewards([Sample("Which?", RIGHT, truth="Response 1")])
    assert rewards([Sample("Which?", RIGHT)]) == [None] and rewards.num_failed == {"NO_TRUTH": 1}


def test_a_judge_that_scores_one_response_is_refused():
    with pytest.raises(ConfigError, match="'llava_critic_pointwise', whose kind is pointwise; wanted a judge of kind"):
        JudgeReward("llava_critic_pointwise")


def test_trainers_get_the_reward_of_a_judge():
    """Through TRL's, verl's and OpenRLHF's adapters; OpenRLHF's score is the share of the best reward."""
    rewards = Rewards(scheme="judge", judge=JudgeReward("r1_reward"))
    wrong = RIGHT.replace("<answer>1", "<answer>2")
    called = reward_function(rewards, truth="answer")(["?", "?"], [RIGHT, wrong], answer=["1", "1"])
    assert called == [2.0, 0.5]
    assert asyncio.run(score_function(rewards)("rows", RIGHT, "1")) == {"score": 2.0, "unscored": 0.0}
    found = openrlhf_function(rewards)(["?" + RIGHT, "?" + wrong], ["?", "?"], ["1", "1"])
    assert found["rewards"].tolist() == [2.0, 0.5] and found["scores"].tolist() == [1.0, 0.25]
    assert pickle.loads(pickle.dumps(rewards)).match([Sample("?", RIGHT, truth="1")]) == [True]
