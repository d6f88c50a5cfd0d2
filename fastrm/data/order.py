"""The groups of each step: a pure function of seed, epoch, position, batch_pairs and the groups' preferences.

`position` counts groups since the start of the run: epoch = position // G. Nothing else is needed to
resume, and the number of ranks does not matter.
"""

from collections.abc import Iterator, Sequence

import numpy as np


def epoch_order(seed: int, epoch: int, num_groups: int) -> np.ndarray:
    """Return the permutation (num_groups,) int64 of one epoch.

    Groups are sorted by a hash of (seed, epoch, group). A generator's shuffle would do as well, but
    NumPy does not promise the same stream in its next version.
    """
    with np.errstate(over="ignore"):  # words wrap, as in `mix`
        base = mix(np.uint64(seed) + mix(np.uint64(epoch) + np.uint64(1)))
    keys = mix(np.arange(num_groups, dtype=np.uint64) ^ base)
    return np.argsort(keys, kind="stable")


def mix(x):
    """Apply SplitMix64's output function (Steele, Lea and Flood 2014), a bijection of 64-bit words."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


class StepOrder:
    """A division of the order into steps: whole groups until `batch_pairs` preferences are reached.

    A step never crosses an epoch, so the last step of an epoch may be smaller.

    Args:
        num_preferences: of each group.
        batch_pairs: preferences that a step wants.
        seed: of the order.
    """

    def __init__(self, num_preferences: Sequence[int], batch_pairs: int, seed: int):
        self.num_preferences = np.asarray(num_preferences, dtype=np.int64)
        self.num_groups = len(self.num_preferences)
        self.batch_pairs = batch_pairs
        self.seed = seed
        self._epoch, self._order, self._bounds = -1, None, None

    def steps_in_epoch(self, epoch: int) -> int:
        self._load(epoch)
        return len(self._bounds) - 1

    def steps_from(self, position: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield endless (position after the step, group numbers of the step), from a step's start.

        Raises:
            ValueError: if no step starts at `position`.
        """
        while True:
            epoch, offset = divmod(position, self.num_groups)
            self._load(epoch)
            step = int(np.searchsorted(self._bounds, offset))
            if self._bounds[step] != offset:
                raise ValueError(f"no step starts at position {position}; was the data or batch_pairs changed?")
            stop = int(self._bounds[step + 1])
            groups = self._order[offset:stop]
            position = epoch * self.num_groups + stop
            yield position, groups

    def _load(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        self._order = epoch_order(self.seed, epoch, self.num_groups)
        totals = np.cumsum(self.num_preferences[self._order])
        bounds = [0]
        while bounds[-1] < self.num_groups:
            done = totals[bounds[-1] - 1] if bounds[-1] else 0
            bounds.append(min(int(np.searchsorted(totals, done + self.batch_pairs)) + 1, self.num_groups))
        self._epoch, self._bounds = epoch, np.asarray(bounds)
