"""Reward functions for slime (contract: slime 0.3, `slime/rollout/rm_hub`, `Sample`)."""

from collections.abc import Callable, Sequence

from fastrm.errors import DataError
from fastrm.rl.chat_text import read_response
from fastrm.rl.rewards import Rewards
from fastrm.rl.samples import Sample


def custom_rm(rewards: Rewards) -> Callable:
    """Return `async custom_rm(args, sample)` for `--custom-rm-path`: one rollout a call."""

    async def compute(args, sample, **_) -> float:
        return _certain(await rewards.compute_async([_read(sample)]), rewards)[0]

    return compute


def batched_custom_rm(rewards: Rewards) -> Callable:
    """Return `async batched_custom_rm(args, samples)` for `--group-rm`: all rollouts of a prompt in one call."""

    async def compute(args, samples: Sequence, **_) -> list[float]:
        return _certain(await rewards.compute_async([_read(sample) for sample in samples]), rewards)

    return compute


def _read(sample) -> Sample:
    images = (sample.multimodal_inputs or {}).get("images")
    return Sample(sample.prompt, read_response(sample.response), images, sample.label)


def _certain(found: list[float | None], rewards: Rewards) -> list[float]:
    """Return the rewards; slime has no way to leave a rollout out, so that none may be missing."""
    if None in found:
        raise DataError(f"rollouts without a reward: {dict(rewards.num_failed)}")
    return found
