"""Labels and accuracy of pairwise benchmarks, in which one response of two is better."""

import numpy as np

from fastrm.evaluate.accuracy import is_right
from fastrm.evaluate.benchmarks.rows import Labels


def pair_labels(row_id: str, category: str = "", best: int = 0) -> Labels:
    """Return the labels of a pair; `best` is 0 where the file states the chosen response first."""
    return Labels(row_id, 2, category, best)


def right_pairs(rows: list[Labels], rewards: list[list[float]]) -> np.ndarray:
    """Return (N,) bool: True where the better response has the strictly larger reward."""
    right = [is_right(pair[row.best], pair[1 - row.best]) for row, pair in zip(rows, rewards, strict=True)]
    return np.array(right, dtype=bool)
