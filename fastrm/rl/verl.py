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

    Attributes:
        rewards: what scores.
        unscored: the reward of a rollout that cannot be scored; None: it raises, since verl cannot leave it out.
    """

    rewards: Rewards
    unscored: float | None = None

    def __init__(self, config, tokenizer, compute_score, reward_router_address=None, reward_model_tokenizer=None):
        # verl gives every manager the last two; its base class takes three, and its own managers drop them like this.
        super().__init__(config, tokenizer, compute_score)

    async def run_single(self, data) -> dict:
        """Return {"reward_score", "reward_extra_info"} of a rollout (a `DataProto` of one row).

        Raises:
            DataError: if the rollout has no reward and `unscored` is None.
        """
        item = data[-1:][0]
        sample = await asyncio.to_thread(self._read, item)
        score, is_unscored = await _score(self.rewards, sample, self.unscored)
        return {"reward_score": score, "reward_extra_info": {"unscored": is_unscored}}

    def _read(self, item) -> Sample:
        columns, tokens = item.non_tensor_batch, item.batch["responses"]
        count = int(item.batch["attention_mask"][-tokens.shape[-1] :].sum())
        response = self.tokenizer.decode(tokens[:count], skip_special_tokens=True)
        truth = (columns.get("reward_model") or {}).get("ground_truth")
        return Sample(list(columns["raw_prompt"]), response, columns.get("images"), truth)


def score_function(rewards: Rewards, *, unscored: float | None = None) -> Callable:
    """Return an `async compute_score` for `reward.custom_reward_function`.

    verl gives it no prompt and no images: `extra_info` must hold them, ``{"prompt": text or messages, "images":
    [path]}``.

    Args:
        unscored: as that of `ScoredRollouts`.
    """

    async def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_) -> dict:
        extra = extra_info or {}
        if rewards.scorer is not None and extra.get("prompt") is None:
            raise DataError('extra_info has no "prompt", which the reward model needs; verl passes no other')
        sample = Sample(extra.get("prompt") or "", solution_str, extra.get("images"), ground_truth)
        score, is_unscored = await _score(rewards, sample, unscored)
        return {"score": score, "unscored": is_unscored}

    return compute_score


async def _score(rewards: Rewards, sample: Sample, unscored: float | None) -> tuple[float, float]:
    """Return a rollout's reward and 0; of one that cannot be scored, `unscored` and 1.

    Raises:
        DataError: if it cannot be scored and `unscored` is None.
    """
    (reward,) = await rewards.compute_async([sample])
    if reward is not None:
        return reward, 0.0
    if unscored is None:
        # No number is neutral: where all rewards are negative, 0 would be the best of the group.
        raise DataError(
            f"a rollout has no reward: {dict(rewards.num_failed)}; verl cannot leave it out: mend the data, or set "
            "`unscored` to the reward that such rollouts are to get"
        )
    return unscored, 1.0
