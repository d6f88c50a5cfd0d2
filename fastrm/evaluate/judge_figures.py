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
        row: what tells the row from others; its preferences are not independent of each other.
        outcomes: by whether the winner was shown first; a pointwise judge has one, under None.
        as_released: the same by the released rule, for `accuracy_as_released`; None: it is no other.
    """

    source: str
    row: str
    outcomes: dict[bool | None, Outcome]
    as_released: dict[bool | None, Outcome] | None = None

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
    released = [one.outcomes if one.as_released is None else one.as_released for one in judged]
    shown_first = [outcomes[True] for outcomes in released if True in outcomes]
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
    shares = [one.share_right for one in judged]
    return {"accuracy": _mean(shares), "preferences": len(judged), "interval": _interval(judged)}


def _mean(values: Sequence) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _interval(judged: Sequence[Judged]) -> tuple[float, float] | None:
    """Return the 95 % bootstrap interval (percentile) of the accuracy of preferences.

    Whole rows are drawn, since the preferences of a row share its responses, as the two orders of a preference do. None
    for fewer than two rows.
    """
    from scipy.stats import bootstrap  # takes most of a second to import

    numbers: dict[str, int] = {}
    rows = np.array([numbers.setdefault(one.row, len(numbers)) for one in judged], np.int64)  # in the order of the data
    right, counts = np.bincount(rows, [one.share_right for one in judged]), np.bincount(rows)
    if len(counts) < 2:
        return None
    found = bootstrap(
        (right, counts), lambda right, counts, axis=-1: right.sum(axis) / counts.sum(axis), paired=True,
        method="percentile", n_resamples=2000, batch=100, rng=0,
    )  # fmt: skip
    return tuple(map(float, found.confidence_interval))
