"""Preferences with the rewards of one or two models: what reports and comparisons are computed from.

Numbers are kept of every preference, records only of the few that are shown.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fastrm.data.record import Preference, Record
from fastrm.evaluate.accuracy import Flips, is_right
from fastrm.tables import Table

MOST_SHOWN = 50  # mistakes, or preferences on which two models differ
_BINS = 10


@dataclass(frozen=True)
class Shown:
    """A preference that is shown: its record, and (winner's, loser's) reward of each model."""

    record: Record
    preference: Preference
    rewards: list[tuple[float, float]]


class Judged:
    """The preferences of an evaluation, ties left out.

    Args:
        num_models: 1, of which the most confident mistakes are kept, or 2, of which the preferences are kept that one
            model has right and the other wrong, those first on whose margins they differ most.
    """

    def __init__(self, num_models: int = 1):
        self.num_models = num_models
        self.sources: list[str] = []
        self.categories: list[str] = []
        self._numbers: list[tuple[float, ...]] = []
        self._responses: list[tuple[float, int]] = []
        self._kept: list[tuple[float, int, Shown]] = []

    def add(self, record: Record, rewards: Sequence[Sequence[float]], category: str = "") -> None:
        """Add a record's preferences, given each model's rewards of its responses."""
        lengths = [len(response.text) for response in record.responses]
        self._responses += zip(rewards[0], lengths, strict=True)
        for preference in record.preferences:
            if preference.tie:
                continue
            pairs = [(model[preference.winner], model[preference.loser]) for model in rewards]
            self.sources.append(record.source)
            self.categories.append(category)
            self._numbers.append((lengths[preference.winner] - lengths[preference.loser], *sum(pairs, ())))
            margins, right = [a - b for a, b in pairs], [is_right(a, b) for a, b in pairs]
            if (right[0] != right[1]) if self.num_models == 2 else not right[0]:
                confidence = abs(margins[0] - margins[-1]) if self.num_models == 2 else -margins[0]
                # The number keeps the order of equal ones, and records from being compared.
                heapq.heappush(self._kept, (confidence, -len(self._numbers), Shown(record, preference, pairs)))
                if len(self._kept) > MOST_SHOWN:
                    heapq.heappop(self._kept)

    @property
    def shown(self) -> list[Shown]:
        """The preferences that were kept, the most confident first."""
        return [shown for *_, shown in sorted(self._kept, key=lambda item: item[:2], reverse=True)]

    @property
    def rewards(self) -> np.ndarray:
        """The rewards (E, M, 2) of E preferences by M models, the winner's and the loser's."""
        numbers = np.array(self._numbers, float).reshape(-1, 1 + 2 * self.num_models)
        return numbers[:, 1:].reshape(-1, self.num_models, 2)

    @property
    def margins(self) -> np.ndarray:
        """The winner's reward less the loser's, (E, M)."""
        return self.rewards[..., 0] - self.rewards[..., 1]

    @property
    def right(self) -> np.ndarray:
        """True where a model has a preference right, (E, M) bool; equal rewards are wrong."""
        return is_right(self.rewards[..., 0], self.rewards[..., 1])

    @property
    def gaps(self) -> np.ndarray:
        """The winner's characters less the loser's, (E,) int64."""
        return np.array([row[0] for row in self._numbers], np.int64)

    @property
    def responses(self) -> np.ndarray:
        """The first model's reward and the characters of every response, (R, 2)."""
        return np.array(self._responses, float).reshape(-1, 2)

    def flips(self, chosen: np.ndarray | slice = slice(None)) -> Flips:
        """Return how the two models differ on some of the preferences."""
        first, second = self.right[chosen].T
        return Flips(len(first), int(first.sum()), int((second & ~first).sum()), int((first & ~second).sum()))

    def comparison(self) -> dict:
        """Return how the two models differ, for JSON."""
        flips = self.flips()
        both = flips.num_right - flips.gained
        return {
            "preferences": flips.num_preferences, "both_right": both, "only_first_right": flips.gained,
            "only_second_right": flips.lost, "mcnemar_p": flips.p_value,
        }  # fmt: skip


def calibration(margins: np.ndarray) -> tuple[list[tuple[float, float, int]], float]:
    """Compare Bradley-Terry probabilities with frequencies.

    The response with the larger reward is preferred with probability 1 / (1 + exp(-|margin|)), 0.5 to 1, and was in
    fact where the margin (E,) is positive. Preferences with equal rewards predict nothing and are left out.

    Returns:
        (mean probability, frequency, number) of each of ten bins of equal width that holds any; and the expected
        calibration error (Guo et al. 2017, arXiv 1706.04599), NaN without preferences.
    """
    margins = margins[margins != 0]
    predicted = 1 / (1 + np.exp(-np.abs(margins)))
    places = np.minimum(((predicted - 0.5) * 2 * _BINS).astype(int), _BINS - 1)
    bins = []
    for place in np.unique(places):
        inside = places == place
        bins.append((float(predicted[inside].mean()), float((margins[inside] > 0).mean()), int(inside.sum())))
    error = sum(count * abs(mean - share) for mean, share, count in bins) / len(margins) if bins else float("nan")
    return bins, error


def bradley_terry_loss(margins: np.ndarray) -> float:
    """Return the mean of -log sigmoid(margin)."""
    return float(np.logaddexp(0.0, -margins).mean())


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return Spearman's correlation; NaN where one of the two is constant."""
    from scipy.stats import spearmanr

    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(spearmanr(first, second).statistic)


def by_label(labels: Sequence[str], count: Callable[[np.ndarray], object]) -> dict[str, object]:
    """Return what `count` makes of the preferences of each label, given where they are (E,) bool."""
    array = np.array(labels)
    return {label: count(array == label) for label in dict.fromkeys(sorted(labels))}


def side_by_side(judged: Judged, names: Sequence[str]) -> Table:
    """Return the table of two models side by side, by source and in all."""
    caption = "\n".join(
        [*(f"{number} {name}" for number, name in enumerate(names, 1)), sentence_of_test(judged.flips())]
    )
    table = Table(
        "source", "preferences", "accuracy of 1", "accuracy of 2", "only 1 right", "only 2 right",
        title="Two models compared (equal rewards count as wrong)", caption=caption,
    )  # fmt: skip
    sources = by_label(judged.sources, judged.flips)
    for name, flips in [*(sources.items() if len(sources) > 1 else ()), ("all", judged.flips())]:
        accuracies = [f"{accuracy:.4f}" for accuracy in flips.accuracies]
        table.add_row(name, f"{flips.num_preferences:,}", *accuracies, f"{flips.gained:,}", f"{flips.lost:,}")
    return table


def sentence_of_test(flips: Flips) -> str:
    """Return the sentence about McNemar's test."""
    return f"McNemar's exact test of the {flips.gained + flips.lost:,} that only one has right: p = {flips.p_value:.2g}"
