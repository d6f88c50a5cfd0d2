"""A reward manager and a reward function for verl (contract: verl 0.10, `RewardManagerBase`, `compute_score`)."""

import asyncio
from collections.abc import Callable

from fastrm.errors import DataError
from fastrm.rl.rewards import Rewards
from fastrm.rl.samples import Sample


class ScoredRollouts:
    """A mix-in for verl's `RewardManagerBase` that scores a rollout with the images of its prompt.

    The class that takes it has the attribute `rewards`. verl gives `run_single` one rollout at a time and runs many at
    once; the server joins those of one prompt.
    """

    rewards: Rewards

    async def run_single(self, data) -> dict:
        """Return {"reward_score", "reward_extra_info"} of a rollout (a `DataProto` of one row).

        A rollout without a reward gets 0, and 1 under "unscored": verl has no way to leave it out.
        """
        item = data[-1:][0]
        sample = await asyncio.to_thread(self._read, item)
        return _answer((await self.rewards.compute_async([sample]))[0], "reward_score")

    def _read(self, item) -> Sample:
        columns, tokens = item.non_tensor_batch, item.batch["responses"]
        count = int(item.batch["attention_mask"][-tokens.shape[-1] :].sum())
        response = self.tokenizer.decode(tokens[:count], skip_special_tokens=True)
        truth = (columns.get("reward_model") or {}).get("ground_truth")
        return Sample(list(columns["raw_prompt"]), response, columns.get("images"), truth)


def score_function(rewards: Rewards) -> Callable:
    """Return an `async compute_score` for `reward.custom_reward_function`.

    verl gives it no prompt and no images: `extra_info` must hold them, ``{"prompt": text or messages, "images":
    [path]}``.
    """

    async def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_) -> dict:
        extra = extra_info or {}
        if rewards.scheme != "rule" and extra.get("prompt") is None:
            raise DataError('extra_info has no "prompt", which the reward model needs; verl passes no other')
        sample = Sample(extra.get("prompt") or "", solution_str, extra.get("images"), ground_truth)
        return _answer((await rewards.compute_async([sample]))[0], "score")

    return compute_score


def _answer(reward: float | None, key: str) -> dict:
    # The extra keys must be the same for all rollouts.
    value, extra = (0.0 if reward is None else reward), {"unscored": float(reward is None)}
    return {key: value, "reward_extra_info": extra} if key == "reward_score" else {key: value, **extra}
