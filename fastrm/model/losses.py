"""The training objectives: from the rewards of a pack to the sum of its weighted loss terms.

With d_e = r_winner - r_loser - margin_e and the weight w_e of each preference e, a step's loss is, over all its packs,

    bradley_terry   sum_e w_e (-log sigmoid(d_e)) / sum_e w_e, and what kernels/fastrm_kernels/preference_head adds
    hinge           sum_e w_e max(0, 1 - d_e) / sum_e w_e
    plackett_luce   sum_i w_i log(1 + sum_e exp(-d_e)) / sum_i w_i, e the preferences that response i wins
    mse             sum_e w_e (r_e - rating_e)^2 / sum_e w_e, e the ratings of single responses
    cross_entropy   sum_e w_e (-r_e) / sum_e w_e, where r_e is the mean log probability of the tokens of a text
                    (turn_loss.py), and w_e has their number as a factor: the mean over all tokens

The hinge is that of ranking machines (Herbrich, Graepel and Obermayer 2000; Joachims 2002). Plackett-Luce is the
probability of a whole ranking (Plackett 1975; ListMLE, Xia et al. 2008): each response is chosen first among itself and
those ranked below it. Tied responses are no rivals of one another, and two responses give bradley_terry. A mean of
squared errors regresses to ratings, as in HelpSteer (Wang et al., arXiv 2311.09528).

Each returns a sum, because the packs of a step are added up before they are divided by its whole weight. Bradley-Terry
is one operation with the head (head.py); the others are a few of PyTorch's on the R rewards that its kernels have made.
"""

import torch
import torch.nn.functional as F

from fastrm.config import LossConfig
from fastrm.data.packing import Pack


def other_loss_sum(rewards: torch.Tensor, pack: Pack, settings: LossConfig) -> torch.Tensor:
    """Compute the sum of a pack's weighted loss terms, a float32 scalar, from rewards (R,); not for bradley_terry.

    Args:
        pack: on the device of the rewards.
    """
    if settings.length_normalization:
        rewards = rewards / torch.log(pack.response_lengths.to(rewards.dtype) + 1.0)
    winners, losers = rewards[pack.edges[:, 0]], rewards[pack.edges[:, 1]]
    if settings.kind == "cross_entropy":
        return -(pack.weight * winners).sum()
    if settings.kind == "mse":
        return (pack.weight * (winners - pack.margin).square()).sum()
    differences = winners - losers - pack.margin
    if settings.kind == "plackett_luce":
        return _ranking_sum(differences, pack, len(rewards))
    terms = torch.relu(1.0 - differences) + settings.center * (winners + losers).square()
    return (pack.weight * terms).sum()


def _ranking_sum(differences: torch.Tensor, pack: Pack, num_responses: int) -> torch.Tensor:
    """Sum log(1 + sum_e exp(-d_e)) = softplus(logsumexp_e(-d_e)) over the responses that win, finite for finite d."""
    winners = pack.edges[:, 0]
    zeros = differences.new_zeros(num_responses)
    largest = zeros.scatter_reduce(0, winners, -differences.detach(), "amax", include_self=False)
    sums = zeros.index_add(0, winners, torch.exp(-differences - largest[winners]))
    # A response that wins nothing has no term: a weight of 0, and a sum whose logarithm is finite.
    logarithms = largest + torch.log(torch.where(sums > 0, sums, torch.ones_like(sums)))
    return (choice_weights(pack, num_responses) * F.softplus(logarithms)).sum()


def choice_weights(pack: Pack, num_responses: int) -> torch.Tensor:
    """Return the mean weight (R,) of the preferences that each response wins; 0 for one that wins none."""
    winners, zeros = pack.edges[:, 0], pack.weight.new_zeros(num_responses)
    counts = zeros.index_add(0, winners, torch.ones_like(pack.weight))
    return zeros.index_add(0, winners, pack.weight) / counts.clamp(min=1.0)
