"""The reward function of a run: that of `fastrm.rl.trl`, measured."""

import time
from collections.abc import Sequence

from fastrm.grpo.config import JudgePartsSection, RewardSection
from fastrm.prompts.spec import JudgeSpec
from fastrm.prompts.verdicts import Verdict
from fastrm.rl.judging import JudgeReward
from fastrm.rl.rewards import Rewards
from fastrm.rl.samples import Sample
from fastrm.rl.trl import read_rollouts


class RewardFunction:
    """A reward function of TRL that logs what it saw beside its rewards.

    Logged of each batch of rollouts: `accuracy` (by the first reward of a run only), `reward_seconds`, the time that
    the trainer waited for this function, and `unscored`, the share of rollouts without a reward. Of the scheme judge
    further the share of texts in the SPEC's form (`format`) and without a verdict (`no_verdict`), the mean
    `consistency`, and the share of verdicts for the response that was shown first (`first_place_rate`).

    Attributes:
        num_failed: rollouts without a reward so far, by the reason's code.
    """

    def __init__(self, settings: RewardSection, number: int, scorer: object, spec: JudgeSpec | None = None):
        self.__name__ = f"{settings.scheme}_{number}"
        parts = (settings.parts or JudgePartsSection()).model_dump()
        self._judge = JudgeReward(spec, **parts) if settings.scheme == "judge" else None
        self._rewards = Rewards(scorer, scheme=settings.scheme, answers=settings.answers, judge=self._judge)
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
        if self._judge is not None:
            self._log_texts(samples, log_metric)
        log_metric(f"unscored/{self.__name__}", found.count(None) / len(found))
        log_metric(f"reward_seconds/{self.__name__}", time.perf_counter() - started)
        return found

    def _log_texts(self, samples: Sequence[Sample], log_metric) -> None:
        said = [self._judge.read(sample.response) for sample in samples]
        places = [one.verdict is Verdict.FIRST for one in said if one.verdict in (Verdict.FIRST, Verdict.SECOND)]
        log_metric("format", sum(one.is_formed for one in said) / len(said))
        log_metric("consistency", sum(one.consistency for one in said) / len(said))
        log_metric("no_verdict", sum(one.verdict is None for one in said) / len(said))
        if places:
            log_metric("first_place_rate", sum(places) / len(places))
