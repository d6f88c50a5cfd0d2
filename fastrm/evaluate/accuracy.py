"""Pair accuracy: the share of preferences whose winner has the strictly larger reward.

Three counters share that rule: of packs (training and its evaluations), of records (`fastrm eval`), and of two sets
of rewards for the same preferences.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastrm.data.packing import Pack
from fastrm.data.record import Record


def is_right(winner, loser):
    """Return whether the winner's reward is strictly larger, so that equal rewards are wrong; for numbers or arrays."""
    return winner > loser


class _BySource:
    """Counts by source of right preferences, and of those that are no ties."""

    _right: dict[str, int]
    _scored: dict[str, int]

    @property
    def num_scored(self) -> int:
        """The number of preferences that are not ties."""
        return sum(self._scored.values())

    @property
    def accuracy(self) -> float:
        return sum(self._right.values()) / max(1, self.num_scored)

    def _count(self, source: str, right: int, scored: int) -> None:
        self._right[source] += right
        self._scored[source] += scored


class PreferenceMeter(_BySource):
    """A meter of sums over preferences, whose means have the field's usual names.

    A preference counts as right if the winner's reward is strictly larger: equal rewards are wrong.
    Ties count for nothing but the token totals.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self.num_preferences = 0
        self.num_tokens = 0
        self.num_unshared_tokens = 0
        self._right = defaultdict(int)  # by source
        self._scored = defaultdict(int)
        self._chosen = self._rejected = 0.0

    def state(self) -> dict:
        """Return the sums as JSON values, from which `restore` restores them exactly."""
        return {
            name.lstrip("_"): dict(value) if isinstance(value, dict) else value for name, value in vars(self).items()
        }

    def restore(self, state: dict) -> None:
        self.clear()
        for name in vars(self):
            self._add(name, state[name.lstrip("_")])

    def merge(self, other: "PreferenceMeter") -> None:
        """Add the counts of another meter."""
        for name, value in vars(other).items():
            self._add(name, value)

    def _add(self, name: str, value) -> None:
        if isinstance(value, dict):
            for source, count in value.items():
                getattr(self, name)[source] += count
        else:
            setattr(self, name, getattr(self, name) + value)

    def add(self, pack: Pack, rewards: torch.Tensor) -> None:
        """Count a pack with its rewards (R,) on the CPU."""
        self.num_preferences += pack.num_preferences
        self.num_tokens += pack.num_tokens
        self.num_unshared_tokens += pack.num_unshared_tokens
        winners, losers = rewards[pack.edges[:, 0]].double(), rewards[pack.edges[:, 1]].double()
        scored = ~pack.is_tie
        right = is_right(winners, losers) & scored
        for group in pack.groups:
            self._count(group.source, int(right[group.preferences].sum()), int(scored[group.preferences].sum()))
        self._chosen += float(winners[scored].sum())
        self._rejected += float(losers[scored].sum())

    def by_source(self) -> dict[str, dict]:
        """Return {source: {"accuracy", "preferences"}}, sorted by name."""
        return {
            source: {"accuracy": self._right[source] / count, "preferences": count}
            for source, count in sorted(self._scored.items())
            if count
        }

    def means(self) -> dict[str, float]:
        """Return the means: rewards/{chosen,rejected,margins,accuracies}, accuracies by source, sharing factor.

        Without a preference that counts, as in a run on ratings, there is the sharing factor alone.
        """
        sharing = {"sharing_factor": self.num_unshared_tokens / max(1, self.num_tokens)}
        if not (count := self.num_scored):
            return sharing
        row = {
            "rewards/chosen": self._chosen / count,
            "rewards/rejected": self._rejected / count,
            "rewards/margins": (self._chosen - self._rejected) / count,
            "rewards/accuracies": self.accuracy,
            **sharing,
        }
        sources = self.by_source()
        if len(sources) > 1:
            row |= {f"rewards/accuracies/{source}": values["accuracy"] for source, values in sources.items()}
        return row


class PairAccuracy(_BySource):
    """A counter of right preferences, overall and by source. Equal rewards are wrong; ties are counted apart."""

    def __init__(self):
        self._right: dict[str, int] = defaultdict(int)  # by source
        self._scored: dict[str, int] = defaultdict(int)
        self.num_ties = 0

    def add(self, record: Record, rewards: Sequence[float]) -> None:
        """Count one record's preferences given its responses' rewards."""
        for preference in record.preferences:
            if preference.tie:
                self.num_ties += 1
                continue
            self._count(record.source, is_right(rewards[preference.winner], rewards[preference.loser]), 1)

    def report(self) -> dict:
        """Return {"accuracy", "preferences", "interval", "ties", "sources": {name: the first three}}."""
        sources = {name: _figures(self._right[name], count) for name, count in sorted(self._scored.items())}
        total = _figures(sum(self._right.values()), self.num_scored)
        return {**total, "ties": self.num_ties, "sources": sources}


def _figures(right: int, count: int) -> dict:
    return {"accuracy": right / count, "preferences": count, "interval": wilson_interval(right, count)}


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % score interval of a proportion (Wilson 1927), which is valid near 0 and 1 too."""
    from scipy.stats import binomtest  # takes most of a second to import, which commands without accuracies need not

    interval = binomtest(right, count).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


@dataclass
class Flips:
    """Counts of preferences that two sets of rewards judge, without ties; equal rewards are wrong.

    Attributes:
        num_preferences: judged.
        num_right: right by the first rewards.
        lost: wrong by the first rewards, right by the second.
        gained: right by the first, wrong by the second.
    """

    num_preferences: int = 0
    num_right: int = 0
    lost: int = 0
    gained: int = 0

    def add(self, rewards_a: torch.Tensor, rewards_b: torch.Tensor, preferences: torch.Tensor) -> None:
        """Count preferences (E, 2) int64, winner and loser, by two sets of rewards (R,)."""
        winners, losers = preferences.unbind(1)
        right_a, right_b = (is_right(rewards[winners], rewards[losers]) for rewards in (rewards_a, rewards_b))
        self.num_preferences += len(preferences)
        self.num_right += int(right_a.sum())
        self.lost += int((right_b & ~right_a).sum())
        self.gained += int((right_a & ~right_b).sum())

    @property
    def rate(self) -> float:
        """The share of the preferences that the two judge differently."""
        return (self.lost + self.gained) / max(1, self.num_preferences)

    @property
    def p_value(self) -> float:
        """The two-sided p-value of McNemar's exact test (1947): the binomial test of lost against gained."""
        from scipy.stats import binomtest

        return float(binomtest(self.gained, self.gained + self.lost).pvalue) if self.gained + self.lost else 1.0

    @property
    def accuracies(self) -> tuple[float, float]:
        """The pair accuracies by the first and by the second rewards."""
        total = max(1, self.num_preferences)
        return self.num_right / total, (self.num_right + self.lost - self.gained) / total
