"""The reward functions inside TRL's own GRPOTrainer, with images, on a CPU."""

import math

import pytest
import torch
from PIL import Image

from fastrm.errors import DataError
from fastrm.evaluate.reward_model import RewardModel
from fastrm.rl import Client, Rewards
from fastrm.rl.client import ServerError
from fastrm.rl.trl import async_reward_function, read_rollouts, reward_function
from tests.helpers.reward_server import CountingScorer, Reply, reward_server
from tests.helpers.smollm2 import needs_smollm2
from tests.helpers.support import make_model

pytest.importorskip("trl")
SAME = "Which colour is it?"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr("fastrm.rl.client.random.uniform", lambda low, high: 0.01)


def rows(prompt_of, count=4):
    from datasets import Dataset

    pictures = [Image.new("RGB", (56, 56), colour) for colour in ("red", "green", "blue", "white")]
    return Dataset.from_list(
        [{"prompt": prompt_of(n), "images": [pictures[n % 4]], "solution": "red"} for n in range(count)]
    )


def text_prompt(number):
    return [{"role": "user", "content": f"{SAME} <image> {number}"}]


def part_prompt(number):
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"{SAME} {number}"}]}]


def make_trainer(folder, functions, dataset, steps=2, **settings):
    from trl import GRPOConfig, GRPOTrainer

    from tests.helpers.policies import vision_policy

    policy, processor = vision_policy()
    arguments = GRPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False, per_device_train_batch_size=4,
        num_generations=2, max_completion_length=6, max_steps=steps, report_to="none", save_strategy="no",
        logging_steps=1, disable_tqdm=True, **settings,
    )  # fmt: skip
    return GRPOTrainer(
        model=policy, args=arguments, train_dataset=dataset, processing_class=processor, reward_funcs=functions
    )


@pytest.mark.parametrize("prompt_of", [text_prompt, part_prompt], ids=["texts", "parts"])
def test_trl_trains_with_images_by_url_and_in_process(prompt_of, tmp_path):
    """Both ways give the same metric in the same steps, and each group of rollouts is one question with one image."""
    model = RewardModel(make_model("qwen2_5_vl"))
    with reward_server(model) as (url, bodies):
        functions = [
            reward_function(Rewards(model), name="here"),
            async_reward_function(Rewards(url), name="by_url"),
            reward_function(Rewards(url, scheme="hybrid"), name="hybrid"),
        ]
        trainer = make_trainer(tmp_path, functions, rows(prompt_of))
        before = [parameter.clone() for parameter in trainer.model.parameters()]
        trainer.train()
    logs = [log for log in trainer.state.log_history if "rewards/here/mean" in log]
    assert len(logs) == 2
    for log in logs:
        assert log["rewards/here/mean"] == log["rewards/by_url/mean"] and math.isfinite(log["rewards/here/mean"])
        assert 0 <= log["rewards/hybrid/mean"] <= 1 and log["rewards/here/std"] > 0
    assert [len(body["groups"]) for body in bodies] == [2] * 4
    for group in [group for body in bodies for group in body["groups"]]:
        assert len(group["images"]) == 1 and len(group["responses"]) == 2
        assert group["messages"][0]["content"][0] == {"type": "image"}
    after = trainer.model.parameters()
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_rollouts_without_a_reward_are_left_out(tmp_path):
    class Refusing(CountingScorer):
        def _score(self, number, group):
            failing = "0" in str(group["messages"])
            return super()._score(number, group | ({"responses": ["unscorable"]} if failing else {}))

    trainer = make_trainer(tmp_path, [reward_function(Rewards(Refusing()))], rows(part_prompt, 2))
    trainer.train()
    logs = [log for log in trainer.state.log_history if "rewards/fastrm/mean" in log]
    assert len(logs) == 2 and all(math.isfinite(log["rewards/fastrm/mean"]) for log in logs)


@pytest.mark.parametrize("make", [reward_function, async_reward_function])
def test_a_server_that_goes_away_ends_the_training_by_name(make, tmp_path):
    with reward_server(CountingScorer()) as (url, _):
        Client(url).score([{"prompt": "here", "responses": ["yes"]}])
    trainer = make_trainer(tmp_path, [make(Rewards(url, tries=2))], rows(text_prompt))
    with pytest.raises(ServerError, match=rf"{url}/v1/rewards: no rewards in 2 tries"):
        trainer.train()


@pytest.mark.parametrize("make", [reward_function, async_reward_function])
def test_a_request_that_the_server_refuses_ends_the_training_at_once(make, tmp_path):
    with reward_server(CountingScorer(), [Reply(413, b"too large")] * 9) as (url, bodies):
        trainer = make_trainer(tmp_path, [make(Rewards(url))], rows(text_prompt))
        with pytest.raises(ServerError, match="HTTP 413: too large"):
            trainer.train()
        assert len(bodies) == 1


def test_rollouts_are_read_in_every_form_of_trl():
    picture, other = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    answer = [{"role": "assistant", "content": "red"}]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "r"}, {"type": "text", "text": "ed"}]}]
    tools = [{"role": "assistant", "content": "let me see"}, {"role": "tool", "content": "{}"}, *answer]
    found = read_rollouts(["a"] * 4, ["red", answer, parts, tools], [[picture], None, [], [other]], ["x"] * 4)
    assert [one.response for one in found] == ["red"] * 4 and [one.truth for one in found] == ["x"] * 4
    assert [one.images for one in found] == [[picture], None, [], [other]]
    assert [one.images for one in read_rollouts(["a"] * 2, ["b"] * 2, image=[picture, None])] == [[picture], None]
    with pytest.raises(DataError, match="truths: got 1, wanted 2, one for each prompt"):
        read_rollouts(["a", "b"], ["c", "d"], truths=["e"])


@needs_smollm2
def test_a_pretrained_policy_is_rewarded(smollm2_folder, tmp_path):
    """SmolLM2-135M-Instruct says readable text, which goes to the reward model as one group for each prompt."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    policy = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    asked = [{"role": "user", "content": "What is the capital of France? One word."}]
    arguments = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, num_generations=2,
        per_device_train_batch_size=2, max_completion_length=8, max_steps=1, report_to="none", save_strategy="no",
        learning_rate=1e-5,
    )  # fmt: skip
    scorer = CountingScorer()
    trainer = GRPOTrainer(
        model=policy, args=arguments, train_dataset=Dataset.from_list([{"prompt": asked}] * 2),
        processing_class=AutoTokenizer.from_pretrained(smollm2_folder), reward_funcs=reward_function(Rewards(scorer)),
    )  # fmt: skip
    trainer.train()
    (group,) = scorer.groups
    assert group["messages"] == asked and len(group["responses"]) == 2
    assert any("Paris" in response for response in group["responses"])
    assert math.isfinite(trainer.state.log_history[0]["rewards/fastrm/mean"])
