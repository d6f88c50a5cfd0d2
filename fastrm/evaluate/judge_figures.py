"""Figures of verdicts on preferences that a judge saw in one order or in both; docs/judges.md defines each."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastrm.prompts.verdicts import Verdict

# What a judge said of a preference: the winner is better, the loser is, or neither; None: nothing that can be read.
RIGHT, WRONG, TIE = 1, -1, 0
Outcome = int | None


@dataclass(frozen=True)
class Judged:
    """The outcomes of one preference.

    Attributes:
        source: of the row.
        outcomes: by whether the winner was shown first; a pointwise judge has one, under None.
    """

    source: str
    outcomes: dict[bool | None, Outcome]

    @property
    def share_right(self) -> float:
        """The share of the orders in which the winner was called better."""
        return sum(found == RIGHT for found in self.outcomes.values()) / len(self.outcomes)

    @property
    def in_both_orders(self) -> bool:
        return {True, False} <= self.outcomes.keys()


def outcome(verdict: Verdict | None, winner_first: bool) -> Outcome:
    """Return what a verdict says of a preference."""
    if verdict is None or verdict is Verdict.TIE:
        return None if verdict is None else TIE
    return RIGHT if (verdict is Verdict.FIRST) == winner_first else WRONG


def figures(judged: Sequence[Judged]) -> dict:
    """Return accuracy and the figures of position under the names that `--json` has."""
    shown_first = [one.outcomes[True] for one in judged if True in one.outcomes]
    pairs = [(one.outcomes[True], one.outcomes[False]) for one in judged if one.in_both_orders]
    read = [pair for pair in pairs if None not in pair]
    decided = [
        (found == RIGHT) == winner_first
        for one in judged
        for winner_first, found in one.outcomes.items()
        if winner_first is not None and found in (RIGHT, WRONG)
    ]
    return {
        **accuracy(judged),
        "accuracy_as_released": _mean([found == RIGHT for found in shown_first]),
        "position_flip_rate": _mean([first != second for first, second in read]),
        "first_place_rate": _mean(decided),
        "ties": sum(found == TIE for one in judged for found in one.outcomes.values()),
        "preferences_in_one_order": sum(not (one.in_both_orders or None in one.outcomes) for one in judged),
    }


def accuracy(judged: Sequence[Judged]) -> dict:
    """Return the accuracy of preferences with its interval, and their number."""
    shares = np.array([one.share_right for one in judged])
    return {"accuracy": _mean(shares), "preferences": len(judged), "interval": _interval(shares)}


def _mean(values: Sequence) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _interval(shares: np.ndarray) -> tuple[float, float] | None:
    """Return the 95 % bootstrap interval (percentile) of a mean of preferences, whose two orders are not independent.

    None for fewer than two preferences.
    """
    from scipy.stats import bootstrap  # takes most of a second to import

    if len(shares) < 2:
        return None
    found = bootstrap((shares,), np.mean, method="percentile", n_resamples=2000, batch=100, rng=0)
    return tuple(map(float, found.confidence_interval))
