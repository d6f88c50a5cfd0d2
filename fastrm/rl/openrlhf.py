"""A reward function and an agent for OpenRLHF (contract: OpenRLHF 0.11, `openrlhf/utils/agent.py`).

A label may be the true answer, or ``{"answer": ..., "images": [...], "messages": [...]}``: all but `answer` go to the
reward model. Without messages they are read from the rendered prompt.
"""

import asyncio
from collections.abc import Callable, Sequence

from fastrm.errors import DataError
from fastrm.rl.chat_text import read_response, split_response
from fastrm.rl.rewards import Rewards, sigmoid
from fastrm.rl.samples import Sample


def reward_function(rewards: Rewards) -> Callable[..., dict]:
    """Return `reward_func(queries, prompts, labels)` for the file that `--reward.remote_url` names."""

    def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence, **_) -> dict:
        import torch

        if not len(queries) == len(prompts) == len(labels):
            raise DataError(f"got {len(queries)} queries, {len(prompts)} prompts, {len(labels)} labels; wanted equal")
        texts = [split_response(*one, f"query {n}") for n, one in enumerate(zip(queries, prompts, strict=True))]
        found = rewards([_sample(*one) for one in zip(prompts, texts, labels, strict=True)])
        if None in found:  # it would stop the step; raised, OpenRLHF logs it and leaves the rollout without a reward
            raise DataError(f"rollouts without a reward: {dict(rewards.num_failed)}")
        values, scores = torch.tensor(found), torch.tensor([_score(reward, rewards) for reward in found])
        return {"rewards": values, "scores": scores, "extra_logs": {"reward": values}}

    return reward_func


class RewardedAgent:
    """A mix-in for OpenRLHF's `SingleTurnAgentExecutor` that scores a rollout with the images of its prompt.

    The class that takes it has the attribute `rewards`.
    """

    rewards: Rewards

    async def execute(self, prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images=None):
        """Generate as the class beside it; add `reward`, `scores` and `extra_logs`, None where there is no reward."""
        output = await super().execute(
            prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images=images
        )
        first, last = output["action_ranges"][-1]
        tokenizer = getattr(hf_tokenizer, "tokenizer", hf_tokenizer)
        text = tokenizer.decode(output["observation_tokens"][first:last], skip_special_tokens=True)
        sample = await asyncio.to_thread(_sample, prompt, text, label, images)
        (reward,) = await self.rewards.compute_async([sample])
        if reward is not None:
            output.update(reward=reward, scores=_score(reward, self.rewards), extra_logs={"reward": reward})
        return output


def _sample(prompt: str, text: str, label: object, images: Sequence | None = None) -> Sample:
    known = label if isinstance(label, dict) else {"answer": label}
    return Sample(
        known.get("messages") or prompt, read_response(text), images or known.get("images"), known.get("answer")
    )


def _score(reward: float, rewards: Rewards) -> float:
    """Return a reward as a score from 0 to 1, by which OpenRLHF filters prompts."""
    if rewards.judge is not None:
        return min(max(reward / rewards.judge.best, 0.0), 1.0)
    return sigmoid(reward) if rewards.scheme == "model" else reward
