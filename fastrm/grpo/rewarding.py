"""The reward function of a run: that of `fastrm.rl.trl`, measured."""

import time
from collections.abc import Sequence

from fastrm.grpo.config import RewardSection
from fastrm.rl.rewards import Rewards
from fastrm.rl.trl import read_rollouts


class RewardFunction:
    """A reward function of TRL that logs what it saw beside its rewards.

    Logged of each batch of rollouts: `accuracy` (by the first reward of a run only), `reward_seconds`, the time that
    the trainer waited for this function, and `unscored`, the share of rollouts without a reward.

    Attributes:
        num_failed: rollouts without a reward so far, by the reason's code.
    """

    def __init__(self, settings: RewardSection, number: int, scorer: object):
        self.__name__ = f"{settings.scheme}_{number}"
        self._rewards = Rewards(scorer, scheme=settings.scheme, answers=settings.answers)
        self._is_first = number == 0
        self.num_failed = self._rewards.num_failed

    def __call__(
        self, prompts: Sequence, completions: Sequence, solution: Sequence[str], log_metric, images=None, **_
    ) -> list[float | None]:
        """Compute the rewards of a batch of rollouts."""
        started = time.perf_counter()
        samples = read_rollouts(prompts, completions, images, solution)
        matched = self._rewards.match(samples) if self._is_first else None
        found = self._rewards(samples, matched)
        if matched is not None:
            log_metric("accuracy", matched.count(True) / len(matched))
        log_metric(f"unscored/{self.__name__}", found.count(None) / len(found))
        log_metric(f"reward_seconds/{self.__name__}", time.perf_counter() - started)
        return found
