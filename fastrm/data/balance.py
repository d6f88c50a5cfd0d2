"""The cost of a group, and the division of costs over ranks so that the slowest is near the mean.

All ranks wait for the slowest one at every step. Each rank computes the whole division itself, so
that none has to be sent: everything here is a pure function with the same result on every machine.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastrm.data.group import GroupSize
from fastrm.data.tree import causal_pairs

# A division is good enough when the slowest rank is this close to a bound that none can beat.
TOLERANCE = 0.005
# The most exchanges of a division. Few are needed: the longest-first rule begins close to the best.
MAX_EXCHANGES = 100
# Whole numbers have one sum; a sum of floats depends on the order of adding, which differs between CPUs.
_LARGEST_COST = 2**32


@dataclass(frozen=True)
class CostModel:
    """FLOPs of a training step by what is in it, over all layers. Only their ratios count here.

    The defaults count tokens alone.

    Attributes:
        per_token: of a token in the language model, attention left out.
        per_attention_pair: of a query-key pair of a causal layer, as in `GroupSize`.
        per_media_token: of a merged patch in vision tower and projector, attention left out.
        per_media_pair: of two merged patches of one image in the blocks with full attention.
        per_window_pair: of two merged patches of one window in the others.
        window: side of a window in merged patches; 0 if no block has windows.
    """

    per_token: float = 1.0
    per_attention_pair: float = 0.0
    per_media_token: float = 0.0
    per_media_pair: float = 0.0
    per_window_pair: float = 0.0
    window: int = 0

    def of_medium(self, height: int, width: int, frames: int = 1) -> float:
        """Return the cost of an image of `height` x `width` merged patches, or of a video's frames, each by itself."""
        num_tokens = height * width
        cost = self.per_media_token * num_tokens + self.per_media_pair * num_tokens**2
        if self.window:
            cost += self.per_window_pair * _sum_of_squares(height, self.window) * _sum_of_squares(width, self.window)
        return frames * cost

    def of_group(self, group: GroupSize) -> float:
        """Return the cost of a group by itself."""
        cost = self.per_token * group.num_tokens + self.per_attention_pair * group.num_attention_pairs
        return cost + sum(self.of_medium(*size) for _, *size in group.media)

    def saved(self, group: GroupSize) -> float:
        """Return how much less a group costs in a pack with another that begins with the same image.

        It is an estimate: text before the image is assumed to be the same too.
        """
        if not group.media:
            return 0.0
        lead = group.num_lead_tokens
        text = self.per_token * lead + self.per_attention_pair * causal_pairs(lead)
        _, *size = group.media[0]
        return self.of_medium(*size) + text


def _sum_of_squares(length: int, window: int) -> int:
    """Return the sum of squared lengths of the parts of `length` cut every `window`."""
    return length // window * window**2 + (length % window) ** 2


def divide(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Divide items over ranks so that the largest sum of a rank is small; return the item numbers of each rank.

    Longest first, each to the rank with the least (Graham 1969: at most 4/3 of the best), then the
    rank with the most exchanges an item with another rank, or gives one away, while that helps.

    Args:
        costs: of the items, at least one, each at least 0.
    """
    integers = _as_integers(costs)
    owner = _longest_first(integers, num_ranks)
    _exchange(integers, owner, num_ranks)
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    for item, rank in enumerate(owner.tolist()):
        ranks[rank].append(item)
    return ranks


def slowest_bound(costs: Sequence[float], num_ranks: int) -> float:
    """Return a bound that no division over ranks can beat.

    It is the mean, the largest item, or two items that must share a rank: of the num_ranks + 1 largest items two must
    be together, so at least the two least of them.
    """
    ordered = np.sort(np.asarray(costs, dtype=np.float64))[::-1]
    together = ordered[num_ranks - 1 : num_ranks + 1].sum() if len(ordered) > num_ranks else 0.0
    return max(ordered.sum() / num_ranks, ordered[0], together)


def _as_integers(costs: Sequence[float]) -> np.ndarray:
    """Return costs (n,) int64 in units that make the largest 2^32: two million are summed without rounding."""
    costs = np.asarray(costs, dtype=np.float64)
    largest = costs.max(initial=0.0)
    return np.rint(costs * (_LARGEST_COST / largest) if largest > 0 else costs).astype(np.int64)


def _longest_first(costs: np.ndarray, num_ranks: int) -> np.ndarray:
    """Return the rank (n,) int64 of each item by the longest-first rule."""
    owner = np.empty(len(costs), dtype=np.int64)
    ranks = [(0, rank) for rank in range(num_ranks)]
    order = np.argsort(-costs, kind="stable")
    for item, cost in zip(order.tolist(), costs[order].tolist(), strict=True):
        load, rank = ranks[0]
        owner[item] = rank
        heapq.heapreplace(ranks, (load + cost, rank))
    return owner


def _exchange(costs: np.ndarray, owner: np.ndarray, num_ranks: int) -> None:
    """Improve `owner` in place until the slowest rank is near the bound, or no exchange helps it."""
    loads = np.zeros(num_ranks, dtype=np.int64)
    np.add.at(loads, owner, costs)
    # Sums are exact: whole numbers far below 2^53, as floats.
    enough = (1 + TOLERANCE) * slowest_bound(costs, num_ranks)
    # With an item of cost 0 on every rank, giving an item away is an exchange like any other.
    all_costs = np.concatenate([costs, np.zeros(num_ranks, dtype=np.int64)])
    all_owner = np.concatenate([owner, np.arange(num_ranks)])
    for _ in range(MAX_EXCHANGES):
        slowest = int(loads.argmax())
        if loads[slowest] <= enough:
            break
        mine = np.flatnonzero(owner == slowest)
        gain = costs[mine][:, None] - all_costs  # (mine, items): the cost that leaves the slowest rank
        after = np.maximum(loads[slowest] - gain, loads[all_owner] + gain)
        after[:, all_owner == slowest] = loads[slowest]
        give, take = np.unravel_index(int(after.argmin()), after.shape)
        if after[give, take] >= loads[slowest]:
            break
        item, rank = mine[give], all_owner[take]
        loads[[slowest, rank]] += np.array([-1, 1]) * gain[give, take]
        owner[item] = all_owner[item] = rank
        if take < len(costs):
            owner[take] = all_owner[take] = slowest
