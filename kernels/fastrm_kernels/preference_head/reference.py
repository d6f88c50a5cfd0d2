"""Eager specification of the preference head: hidden states -> rewards -> preference loss.

    h_i = hidden[anchor_i]                                   (R, D)
    n_i = norm_weight * h_i / sqrt(mean(h_i^2) + eps)        (R, D), when a norm weight is given
    r_i = W_L act(... act(W_1 n_i + b_1) ...) + b_L          (R,)
    d_e = r_w(e) - r_l(e) - margin_e                         (E,)
    loss = sum_e weight_e * [-(1 - s) log sigmoid(d_e) - s log sigmoid(-d_e)
                             + center * (r_w(e) + r_l(e))^2] / sum_e weight_e

with s the label smoothing and `center` the zero-coefficient of BaseReward (arXiv 2509.16127, sec. 3),
known elsewhere as center_rewards_coefficient. With `lengths`, every r_i is divided by
log(length_i + 1) first. A tie is written as two opposite edges of half the weight each.
"""

import torch
import torch.nn.functional as F

ACTIVATIONS = {"none": lambda x: x, "tanh": torch.tanh, "relu": F.relu, "silu": F.silu}


def reward_head(hidden, anchors, layers, *, activation="silu", norm_weight=None, norm_eps=1e-6):
    """Scalar rewards from the hidden states of the anchor tokens.

    Args:
        hidden: (T, D) floating point.
        anchors: (R,) int64 rows of `hidden`.
        layers: [(weight, bias or None), ...] shaped as nn.Linear's; the last weight is (1, F).
        activation: one of ACTIVATIONS, applied between the layers.
        norm_weight: (D,) weight of a final RMSNorm applied to the anchors first, or None.
        norm_eps: epsilon of that norm.

    Returns:
        rewards (R,) in float32, or float64 if `hidden` is.

    Raises:
        ValueError: for an unknown activation or a last layer that is not (1, F).
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, wanted one of {', '.join(ACTIVATIONS)}")
    if not layers or layers[-1][0].shape[0] != 1:
        raise ValueError("layers: wanted a last weight of shape (1, F), for one reward per anchor")
    states = hidden.index_select(0, anchors)  # (R, D)
    if norm_weight is not None:
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm_eps)
        states = norm_weight * wide.to(states.dtype)
    for number, (weight, bias) in enumerate(layers):
        if number > 0:
            states = ACTIVATIONS[activation](states)
        states = F.linear(states, weight, bias)
    rewards = states.squeeze(-1)
    return rewards.to(torch.promote_types(rewards.dtype, torch.float32))


def preference_loss(rewards, edges, *, margin=None, weight=None, label_smoothing=0.0, center=0.0, lengths=None):
    """Weighted mean preference loss over an edge list; the formula is in the module's docstring.

    Args:
        rewards: (R,) float32 or float64.
        edges: (E, 2) int64, winner then loser, indices into `rewards`.
        margin: (E,) subtracted from the reward difference, or None for 0.
        weight: (E,) >= 0, or None for 1.
        label_smoothing: probability in [0, 0.5) that a label is flipped.
        center: coefficient of (r_w + r_l)^2.
        lengths: (R,) response lengths in tokens (>= 1) for length normalisation, or None.

    Returns:
        scalar, divided by the sum of the weights (0 when there are no edges or all weights are 0).
    """
    if lengths is not None:
        rewards = rewards / torch.log(lengths.to(rewards.dtype) + 1.0)
    winners, losers = rewards[edges[:, 0]], rewards[edges[:, 1]]
    difference = winners - losers
    if margin is not None:
        difference = difference - margin
    # softplus(-d) = -log sigmoid(d), finite for every finite d in either direction.
    terms = (1.0 - label_smoothing) * F.softplus(-difference)
    if label_smoothing:
        terms = terms + label_smoothing * F.softplus(difference)
    if center:
        terms = terms + center * (winners + losers).square()
    if weight is None:
        weight = torch.ones_like(terms)
    total = weight.sum()
    return (terms * weight).sum() / torch.where(total > 0, total, torch.ones_like(total))
