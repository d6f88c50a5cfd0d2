"""How often two ways to compute rewards disagree about which of two responses is better."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastrm.data.group import GroupSize
from fastrm.data.loader import PackBuilder
from fastrm.data.packing import Pack
from fastrm.evaluate.scoring import Forward, refuse_non_finite, run_packs
from fastrm.model.network import RewardNetwork
from fastrm.model.precision import fp8_disabled


@dataclass
class Flips:
    """Preferences judged twice, ties left out. A preference is right if its winner's reward is strictly larger.

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
        right_a, right_b = (rewards[winners] > rewards[losers] for rewards in (rewards_a, rewards_b))
        self.num_preferences += len(preferences)
        self.num_right += int(right_a.sum())
        self.lost += int((right_b & ~right_a).sum())
        self.gained += int((right_a & ~right_b).sum())

    @property
    def rate(self) -> float:
        """Share of the preferences that the two judge differently."""
        return (self.lost + self.gained) / max(1, self.num_preferences)

    @property
    def accuracies(self) -> tuple[float, float]:
        """Pair accuracy by the first and by the second rewards."""
        total = max(1, self.num_preferences)
        return self.num_right / total, (self.num_right + self.lost - self.gained) / total


def flip_rate(rewards_a: torch.Tensor, rewards_b: torch.Tensor, preferences: torch.Tensor) -> float:
    """Share of preferences (E, 2), winner and loser, that two sets of rewards (R,) judge differently."""
    flips = Flips()
    flips.add(rewards_a, rewards_b, preferences)
    return flips.rate


def compare_fp8(
    network: RewardNetwork,
    forward: Forward,
    builder: PackBuilder,
    groups: Sequence[GroupSize],
    budget: int,
    num_workers: int = 0,
    poll: Callable[[], None] = lambda: None,
) -> Flips:
    """FP8 (first) against the same weights without it (second), in one pass over the groups.

    Args:
        network: one that `convert_to_fp8` has converted.
        forward: its rewards (R,) of a pack, in the precision of training.
        budget: tokens of a pack.
        poll: called before each pack; may raise.
    """

    def both(pack: Pack) -> torch.Tensor:
        poll()
        rewards = forward(pack)
        with fp8_disabled(network):
            return torch.stack([rewards, forward(pack)])  # (2, R)

    flips, was_training = Flips(), network.training
    network.eval()
    try:
        for loaded, rewards in run_packs(both, builder, groups, budget, num_workers):
            for refusal in loaded.refused:
                refuse_non_finite(builder.records[refusal.group].origin, refusal)
            if loaded.pack is not None:
                flips.add(*rewards, loaded.pack.edges[~loaded.pack.is_tie])
    finally:
        network.train(was_training)
    return flips
