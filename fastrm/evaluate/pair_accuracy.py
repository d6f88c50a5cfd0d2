"""Share of preferences whose winner has the strictly larger reward."""

import math
from collections import defaultdict
from collections.abc import Sequence

from fastrm.data.record import Record


class PairAccuracy:
    """Counts preferences, overall and by source. Equal rewards are wrong; ties are counted apart."""

    def __init__(self):
        self._right: dict[str, int] = defaultdict(int)  # by source
        self._scored: dict[str, int] = defaultdict(int)
        self.num_ties = 0

    @property
    def num_scored(self) -> int:
        """Preferences that are not ties."""
        return sum(self._scored.values())

    def add(self, record: Record, rewards: Sequence[float]) -> None:
        """Count one record's preferences given its responses' rewards."""
        for preference in record.preferences:
            if preference.tie:
                self.num_ties += 1
                continue
            self._scored[record.source] += 1
            self._right[record.source] += rewards[preference.winner] > rewards[preference.loser]

    def report(self) -> dict:
        """{"accuracy", "preferences", "interval", "ties", "sources": {name: the first three}}."""
        sources = {name: _figures(self._right[name], count) for name, count in sorted(self._scored.items())}
        total = _figures(sum(self._right.values()), self.num_scored)
        return {**total, "ties": self.num_ties, "sources": sources}


def _figures(right: int, count: int) -> dict:
    return {"accuracy": right / count, "preferences": count, "interval": wilson_interval(right, count)}


def wilson_interval(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927), which holds near 0 and 1 too."""
    share = right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, middle - half), min(1.0, middle + half)
