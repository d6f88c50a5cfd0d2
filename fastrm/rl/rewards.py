"""The reward of rollouts: by a rule, by a reward model, or by both, with equal prompts asked about once.

The schemes are those of BaseReward's experiment (Zhang et al., arXiv 2509.16127, section 5.4): ``rule`` is 1 if the
answer is right, else 0; ``model`` is the model's reward r; ``hybrid`` is 1 if the answer is right, else sigmoid(r).
``judge`` is for a policy that is a judge itself (`judging.py`).
"""

import asyncio
import logging
import math
import re
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

from fastrm.errors import ConfigError, DataError, GroupError
from fastrm.rl.answers import check_kind, is_match, read_truth
from fastrm.rl.judging import JudgeReward
from fastrm.rl.samples import Sample, check_samples, group_samples

SCHEMES = ("rule", "model", "hybrid", "judge")
# Reasons that one response of a group may have alone: the others get their rewards.
_ONE_RESPONSE = ("TOO_LONG", "BAD_TEXT", "NON_FINITE_REWARD")
_HOST_AND_PORT = re.compile(r"[\w.-]+:\d+(/|$)")
_log = logging.getLogger(__name__)


class Rewards:
    """A reward function on `Sample`s, which the adapters of all trainers call.

        rewards = Rewards("http://127.0.0.1:8000", scheme="hybrid")
        rewards([Sample("2 + 2?", "It is 4.", truth="4"), Sample("2 + 2?", "It is 5.", truth="4")])

    A rollout that cannot be scored has the reward None, which trainers leave out. A server that is away raises.

    Attributes:
        num_failed: rollouts without a reward so far, by the reason's code.
    """

    def __init__(
        self,
        model: object = None,
        *,
        scheme: str = "model",
        answers: str = "auto",
        token: str | None = None,
        judge: JudgeReward | None = None,
        **options,
    ):
        """Choose a reward model and a scheme.

        Args:
            model: the URL of a fastrm server; a folder, which is loaded into this process; a `fastrm.RewardModel`,
                `fastrm.Ensemble` or `Client`. The schemes ``rule`` and ``judge`` need none.
            scheme: one of `SCHEMES`.
            answers: how answers are compared (`answers.KINDS`).
            token: of the server.
            judge: how the texts of the scheme ``judge`` are rewarded.
            options: further arguments of `Client`, or of `RewardModel.from_pretrained` for a folder.

        Raises:
            ConfigError: for a scheme or kind that is none, or a scheme that needs a model without one.
        """
        if scheme not in SCHEMES:
            raise ConfigError(f"scheme: got {scheme!r}, wanted one of {', '.join(SCHEMES)}")
        if (scheme == "judge") != (judge is not None):
            raise ConfigError('judge: belongs to the scheme "judge", which needs it: judge=JudgeReward("r1_reward")')
        has_model = scheme in ("model", "hybrid")
        if model is None and has_model:
            raise ConfigError(f"scheme {scheme!r} needs a reward model: name a URL or a folder")
        self.scheme, self.answers, self.judge, self.num_failed = scheme, check_kind(answers), judge, Counter()
        self.scorer = open_scorer(model, token=token, **options) if has_model else None

    def __call__(self, samples: Sequence[Sample], matched: list[bool | None] | None = None) -> list[float | None]:
        """Compute a reward for each rollout, in order; None where it has none.

        Args:
            matched: what `match` returned for these samples, if it was asked before.

        Raises:
            DataError: as `check_samples`, and for a true answer that is no text, number, or list of them, if the scheme
                asks for it.
            ServerError: as `Client.score`.
        """
        samples = check_samples(samples)
        steps = self._steps(samples, self._match(samples) if matched is None else matched)
        groups = next(steps)
        while True:
            try:
                groups = steps.send(self.scorer.score(groups, on_error="return") if groups else [])
            except StopIteration as done:
                return done.value

    async def compute_async(self, samples: Sequence[Sample]) -> list[float | None]:
        """Compute the rewards as a call does, without blocking the event loop."""
        samples = check_samples(samples)
        steps = self._steps(samples, await asyncio.to_thread(self._match, samples))
        groups = await asyncio.to_thread(next, steps)
        while True:
            results = await self._score_async(groups) if groups else []
            try:
                groups = steps.send(results)
            except StopIteration as done:
                return done.value

    def _match(self, samples: Sequence[Sample]) -> list[bool | None]:
        return [None] * len(samples) if self.scheme == "model" else self.match(samples)

    async def _score_async(self, groups: list[dict]) -> list:
        if hasattr(self.scorer, "score_async"):
            return await self.scorer.score_async(groups, on_error="return")
        return await asyncio.to_thread(self.scorer.score, groups, on_error="return")

    def find_truths(self, columns: Mapping[str, object], name: str) -> object:
        """Return the column of the true answers, or None without one.

        Raises:
            DataError: if the scheme needs the column and it is missing. No rollout of the whole training would have a
                true answer: ``rule`` would give none a reward, and ``hybrid`` all of them that of the model alone.
        """
        if self.scheme != "model" and name not in columns:
            raise DataError(
                f"scheme {self.scheme!r} needs a column of true answers: got no {name!r} among "
                f"{', '.join(map(repr, sorted(columns))) or 'no columns'}; name it by `truth`, or take scheme 'model'"
            )
        return columns.get(name)

    def match(self, samples: Sequence[Sample]) -> list[bool | None]:
        """Return whether each answer is right, whatever the scheme; None without a true answer.

        Raises:
            DataError: for a true answer of the scheme ``judge`` that is no place.
        """
        return [self._is_right(s.response, s.truth) if read_truth(s.truth) else None for s in samples]

    def _is_right(self, text: str, truth: object) -> bool:
        if self.judge is None:
            return is_match(text, truth, self.answers)
        return any(self.judge.is_right(text, one) for one in read_truth(truth))

    def _steps(
        self, samples: Sequence[Sample], matched: list[bool | None]
    ) -> Generator[list[dict], list, list[float | None]]:
        """Yield groups to score, whose results are sent back; return the rewards.

        Of the scheme hybrid, rollouts with the right answer are not asked about. Responses that may have cost their
        group its rewards are asked about once more, each alone.
        """
        if self.scorer is None:
            yield []
            for number, right in enumerate(matched):
                if right is None:
                    self._fail("NO_TRUTH", "it has no true answer", number)
            pairs = zip(samples, matched, strict=True)
            return [None if right is None else self._by_rule(sample.response, right) for sample, right in pairs]
        is_known = [right is True and self.scheme == "hybrid" for right in matched]
        rewards: list[float | None] = [1.0 if known else None for known in is_known]
        asked = [number for number, known in enumerate(is_known) if not known]
        grouped = group_samples(samples[number] for number in asked)
        for place, error in grouped.errors.items():
            self._fail(error.code, error.message, asked[place])
        results = yield grouped.groups
        alone = []
        for number, place in zip(asked, grouped.places, strict=True):
            if place is None:
                continue
            group, response = place
            if not isinstance(results[group], GroupError):
                rewards[number] = self._value(results[group][response])
            elif results[group].code in _ONE_RESPONSE and len(grouped.groups[group]["responses"]) > 1:
                one = grouped.groups[group]
                alone.append((number, {**one, "responses": [one["responses"][response]]}))
            else:
                self._fail(results[group].code, results[group].message, number)
        results = yield [group for _, group in alone]
        for (number, _), result in zip(alone, results, strict=True):
            if isinstance(result, GroupError):
                self._fail(result.code, result.message, number)
            else:
                rewards[number] = self._value(result[0])
        return rewards

    def _by_rule(self, text: str, right: bool) -> float:
        return float(right) if self.judge is None else self.judge.value(text, right)

    def _value(self, reward: float) -> float:
        return sigmoid(reward) if self.scheme == "hybrid" else reward

    def _fail(self, code: str, message: str, number: int) -> None:
        self.num_failed[code] += 1
        if self.num_failed[code] == 1:
            _log.warning("rollout %d of a batch has no reward: %s (%s); more are counted", number, message, code)


def open_scorer(model: object, *, token: str | None = None, **options) -> object:
    """Return what scores groups: a `Client` for a URL, a `RewardModel` for a folder, anything else itself."""
    if not isinstance(model, (str, Path)):
        if not hasattr(model, "score"):
            raise ConfigError(f"model: got {type(model).__name__}, wanted a URL, a folder, or what has a method score")
        return model
    if is_url(model):
        from fastrm.rl.client import Client

        return Client(str(model), token=token, **options)
    if _HOST_AND_PORT.match(str(model)) and not Path(model).exists():
        raise ConfigError(f"model: got {str(model)!r}, no folder here; a server's URL begins with http:// or https://")
    from fastrm.evaluate.reward_model import RewardModel

    return RewardModel.from_pretrained(model, **options)


def is_url(model: str | Path) -> bool:
    """Return whether a model is named by the URL of its server."""
    return str(model).lower().startswith(("http://", "https://"))


def sigmoid(value: float) -> float:
    """Return 1 / (1 + exp(-value)), without overflow."""
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))
