"""The groups of each step, the plans of packs that they make, and those of one pass over all groups.

The groups of a step are a pure function of seed, epoch, position, batch_pairs and the groups' preferences. `position`
counts groups since the start of the run: epoch = position // G. Nothing else is needed to resume, and the number of
ranks does not matter.

A cluster is the groups of a step that begin with the same image or video: in one pack they share it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fastrm.data.balance import TOLERANCE, CostModel, divide
from fastrm.data.group import GroupSize

# Largest bundles that a division over ranks tries, as shares of a rank's mean cost; 0: groups one by one.
_BUNDLE_SHARES = (float("inf"), 1.0, 0.5, 0.25, 0.0)


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


@dataclass(frozen=True)
class PackPlan:
    """A plan of one pack of one step: its groups, and the position in the data after the step.

    `groups` is empty where a rank has nothing to do while the others run a pack.
    """

    groups: tuple[int, ...]
    position: int
    is_last: bool


class Bundle(NamedTuple):
    """Groups that go into one pack together; those that begin with one image share its cost."""

    groups: tuple[int, ...]
    num_tokens: int
    cost: float


@dataclass(frozen=True)
class StepDivision:
    """A step divided over ranks: the bundles of each rank, and the number of packs that each of them runs."""

    bundles: list[list[Bundle]]
    num_packs: int
    budget: int

    def packs(self, rank: int) -> list[tuple[int, ...]]:
        """Return the groups of each of a rank's `num_packs` packs, of even cost where they fit, costliest first.

        Where ranks wait for one another at every pack, as under ZeRO-3, packs of like cost then run together.
        """
        packs = self._even_packs(rank) or _first_fit(self.bundles[rank], self.budget)
        while len(packs) < self.num_packs:
            costliest = max(packs, key=lambda pack: (len(pack) > 1, _cost(pack)))
            packs.append(costliest[1::2])  # empty where there is nothing to divide
            del costliest[1::2]
        packs.sort(key=_cost, reverse=True)
        return [tuple(group for bundle in pack for group in bundle.groups) for pack in packs]

    def _even_packs(self, rank: int) -> list[list[Bundle]]:
        """Return packs of even cost: costliest bundle first, each to the cheapest pack; none if one has no room."""
        packs: list[list[Bundle]] = [[] for _ in range(self.num_packs)]
        costs, room = [0.0] * self.num_packs, [self.budget] * self.num_packs
        for bundle in sorted(self.bundles[rank], key=lambda bundle: -bundle.cost):
            places = [place for place, left in enumerate(room) if left >= bundle.num_tokens]
            if not places:
                return []
            place = min(places, key=costs.__getitem__)
            packs[place].append(bundle)
            costs[place] += bundle.cost
            room[place] -= bundle.num_tokens
        return packs


def plan_steps(
    groups: Sequence[GroupSize],
    order: StepOrder,
    position: int,
    budget: int,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    cost: CostModel | None = None,
) -> Iterator[PackPlan]:
    """Yield endless pack plans of one rank from a step's start on; the last pack of each step is marked.

    A step holds the same groups whatever the number of ranks, and every rank runs as many packs as the
    others. On one rank packs are as few as can be; on several they are of even cost.

    Args:
        budget: tokens of a pack.
        cost: what ranks are balanced by; None: tokens.

    Raises:
        ValueError: if `rank` is not one of `num_ranks`, or no step starts at `position`.
    """
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank {rank} of {num_ranks}: wanted 0 to {num_ranks - 1}")
    for after, members in order.steps_from(position):
        if num_ranks == 1:
            packs = plan_packs(members.tolist(), groups, budget)
        else:
            packs = divide_step(members.tolist(), groups, budget, num_ranks, cost).packs(rank)
        for number, pack in enumerate(packs):
            yield PackPlan(tuple(pack), after, number == len(packs) - 1)


def plan_once(groups: Sequence[GroupSize], budget: int) -> list[PackPlan]:
    """Plan packs that hold every group once, for evaluation and scoring.

    Groups are taken in runs of neighbours, so that results come back roughly in reading order.
    """
    plans, run, total = [], [], 0
    for number, group in enumerate(groups):
        run.append(number)
        total += group.num_tokens
        if total >= 8 * budget or number == len(groups) - 1:
            plans += [PackPlan(tuple(p), number + 1, False) for p in plan_packs(run, groups, budget)]
            run, total = [], 0
    return plans


def plan_packs(members: Sequence[int], groups: Sequence[GroupSize], budget: int) -> list[list[int]]:
    """Divide one step's groups into packs of at most `budget` tokens.

    First-fit decreasing, which uses at most 11/9 of the fewest packs; groups with the same first
    image stay together where they fit, so that the image is encoded once.

    Args:
        members: group numbers of the step.
        groups: all groups, each of at most `budget` tokens.
    """
    nothing = dict.fromkeys(members, 0.0)
    bundles = [
        bundle
        for cluster in _clusters(members, groups)
        for bundle in _join([Bundle((number,), groups[number].num_tokens, 0.0) for number in cluster], nothing, budget)
    ]
    return [[group for bundle in pack for group in bundle.groups] for pack in _first_fit(bundles, budget)]


def divide_step(
    members: Sequence[int],
    groups: Sequence[GroupSize],
    budget: int,
    num_ranks: int,
    cost: CostModel | None = None,
) -> StepDivision:
    """Divide a step's groups over ranks so that the costliest rank is as near the mean as can be.

    Groups that begin with the same image stay together, as long as the costliest rank is no worse for it.

    Args:
        members: group numbers of the step, at least one.
        groups: all groups, each of at most `budget` tokens.
        cost: what ranks are balanced by; None: tokens.
    """
    cost = cost or CostModel()
    numbers = _clusters(members, groups)
    clusters = [
        [Bundle((number,), groups[number].num_tokens, cost.of_group(groups[number])) for number in cluster]
        for cluster in numbers
    ]
    saved = {number: cost.saved(groups[number]) for cluster in numbers if len(cluster) > 1 for number in cluster}
    ranks = _divide_clusters(clusters, saved, budget, num_ranks)
    return StepDivision(ranks, max(_num_packs(bundles, budget) for bundles in ranks), budget)


def _divide_clusters(
    clusters: list[list[Bundle]], saved: Mapping[int, float], budget: int, num_ranks: int
) -> list[list[Bundle]]:
    """Return the bundles of each rank. Clusters are whole at first, and split while that helps the costliest rank."""
    best, least, tried = [], float("inf"), 0
    total = sum(bundle.cost for cluster in clusters for bundle in _join(cluster, saved, budget))
    for share in _BUNDLE_SHARES:
        limit = share * total / num_ranks
        bundles = [bundle for cluster in clusters for bundle in _join(cluster, saved, budget, limit)]
        if len(bundles) == tried:
            continue
        tried = len(bundles)
        costs = [bundle.cost for bundle in bundles]
        ranks = divide(costs, num_ranks)
        slowest = max(sum(costs[item] for item in rank) for rank in ranks)
        if slowest < least:
            best, least = [[bundles[item] for item in rank] for rank in ranks], slowest
        if least <= (1 + TOLERANCE) * total / num_ranks:
            break
    return best


def _clusters(members: Iterable[int], groups: Sequence[GroupSize]) -> list[list[int]]:
    """Return clusters: groups that begin with the same image, by first occurrence; those without one by themselves."""
    clusters: dict[object, list[int]] = {}
    for number in members:
        medium = groups[number].first_medium
        clusters.setdefault(("group", number) if medium is None else medium, []).append(number)
    return list(clusters.values())


def _join(cluster: list[Bundle], saved: Mapping[int, float], budget: int, limit: float = float("inf")) -> list[Bundle]:
    """Join a cluster's groups, one a bundle each, in order, as far as budget and limit allow.

    Args:
        saved: what a group costs less when it is not the first of its bundle, by group number.
        limit: of a bundle's cost, what its groups share left out.
    """
    if len(cluster) == 1:
        return cluster
    joined: list[Bundle] = []
    for single in cluster:
        if joined:
            groups, num_tokens, cost = joined[-1]
            num_tokens += single.num_tokens
            cost += single.cost - saved[single.groups[0]]
            if num_tokens <= budget and cost - saved[groups[0]] <= limit:
                joined[-1] = Bundle(groups + single.groups, num_tokens, cost)
                continue
        joined.append(single)
    return joined


def _first_fit(bundles: Iterable[Bundle], budget: int) -> list[list[Bundle]]:
    """Return packs of at most `budget` tokens: longest bundle first, each into the first pack with room."""
    packs: list[list[Bundle]] = []
    room: list[int] = []
    for bundle in sorted(bundles, key=lambda bundle: -bundle.num_tokens):
        place = next((number for number, left in enumerate(room) if left >= bundle.num_tokens), None)
        if place is None:
            packs.append([])
            room.append(budget)
            place = len(packs) - 1
        packs[place].append(bundle)
        room[place] -= bundle.num_tokens
    return packs


def _cost(bundles: list[Bundle]) -> float:
    return sum(bundle.cost for bundle in bundles)


def _num_packs(bundles: list[Bundle], budget: int) -> int:
    """Return the number of packs that a rank needs, at least one."""
    fits = sum(bundle.num_tokens for bundle in bundles) <= budget
    return 1 if fits else len(_first_fit(bundles, budget))
