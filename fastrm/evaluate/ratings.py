"""Figures in place of pair accuracy where there are no pairs: agreement with ratings, and losses of texts."""

from collections import defaultdict

import torch

from fastrm.data.packing import Pack

# The figures of one set of ratings, after eval/ in metrics.jsonl, and their names in words.
FIGURES = {"mse": "mean squared error", "pearson": "Pearson correlation", "spearman": "Spearman correlation"}


def shown(value: float | None) -> str:
    """Return a figure for people."""
    return "not defined" if value is None else f"{value:.4f}"


class RatingMeter:
    """Rewards beside the ratings of the same responses, by source."""

    def __init__(self):
        self._found: dict[str, list[tuple[float, float]]] = defaultdict(list)  # (reward, rating)

    def add(self, pack: Pack, rewards: torch.Tensor) -> None:
        """Add the ratings of a pack with its rewards (R,) on the CPU; preferences are left out."""
        for group in pack.groups:
            edges, ratings = pack.edges[group.preferences], pack.margin[group.preferences]
            rated = edges[:, 0] == edges[:, 1]
            pairs = zip(rewards[edges[rated, 0]].tolist(), ratings[rated].tolist(), strict=True)
            self._found[group.source] += pairs

    def merge(self, other: "RatingMeter") -> None:
        """Add the ratings of another meter."""
        for source, pairs in other._found.items():
            self._found[source] += pairs

    def figures(self) -> dict[str, float | None]:
        """Return `FIGURES` of all ratings."""
        return _figures([pair for _, pairs in sorted(self._found.items()) for pair in pairs])

    def by_source(self) -> dict[str, dict]:
        """Return {source: {"ratings": their number, and `FIGURES`}}, sorted by name."""
        return {source: {"ratings": len(pairs), **_figures(pairs)} for source, pairs in sorted(self._found.items())}


class TextMeter:
    """Sums of the log probabilities of a judge's texts, by source; a token weighs like any other."""

    def __init__(self):
        self._sums: dict[str, list[float]] = {}  # texts, weights, losses

    def add(self, pack: Pack, rewards: torch.Tensor) -> None:
        """Add a pack with the mean log probabilities (R,) of its texts on the CPU."""
        for group in pack.groups:
            weights = pack.weight[group.preferences].double()
            losses = -(weights * rewards[pack.edges[group.preferences, 0]].double())
            self._add(group.source, [float(len(weights)), float(weights.sum()), float(losses.sum())])

    def merge(self, other: "TextMeter") -> None:
        """Add the sums of another meter."""
        for source, sums in other._sums.items():
            self._add(source, sums)

    def _add(self, source: str, sums: list[float]) -> None:
        self._sums[source] = [a + b for a, b in zip(self._sums.get(source, [0.0, 0.0, 0.0]), sums, strict=True)]

    def figures(self) -> dict[str, float | None]:
        """Return nothing: the loss says all."""
        return {}

    def by_source(self) -> dict[str, dict]:
        """Return {source: {"texts": their number, "loss": mean over their tokens}}, sorted by name."""
        return {
            source: {"texts": int(texts), "loss": loss / weight if weight else None}
            for source, (texts, weight, loss) in sorted(self._sums.items())
        }


def _figures(pairs: list[tuple[float, float]]) -> dict[str, float | None]:
    """Return mean squared error and correlations, in float64; None for those that are not defined.

    A correlation needs two responses, and rewards and ratings that are not all the same.
    """
    from scipy.stats import pearsonr, spearmanr  # takes most of a second to import

    if not pairs:
        return dict.fromkeys(FIGURES)
    rewards, ratings = zip(*sorted(pairs), strict=True)  # in an order that no division over ranks changes
    error = sum((reward - rating) ** 2 for reward, rating in zip(rewards, ratings, strict=True)) / len(pairs)
    if len(set(rewards)) < 2 or len(set(ratings)) < 2:
        return {"mse": error, "pearson": None, "spearman": None}
    pearson, spearman = pearsonr(rewards, ratings), spearmanr(rewards, ratings)
    return {"mse": error, "pearson": float(pearson.statistic), "spearman": float(spearman.statistic)}
