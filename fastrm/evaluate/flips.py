"""A comparison of two ways to compute rewards: how often they disagree about the better of two responses."""

from collections.abc import Callable, Sequence

import torch

from fastrm.data.group import GroupSize
from fastrm.data.loader import PackBuilder
from fastrm.data.packing import Pack
from fastrm.evaluate.accuracy import Flips
from fastrm.evaluate.scoring import Forward, refuse_non_finite, run_packs
from fastrm.model.network import RewardNetwork
from fastrm.model.precision import fp8_disabled


def compare_fp8(
    network: RewardNetwork,
    forward: Forward,
    builder: PackBuilder,
    groups: Sequence[GroupSize],
    budget: int,
    num_workers: int = 0,
    poll: Callable[[], None] = lambda: None,
) -> Flips:
    """Compare FP8 (first) with the same weights without it (second), in one pass over the groups.

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
