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
With reduction "sum" the loss is not divided by the weights: a training step that is cut into parts adds their sums.
"""

import torch
import torch.nn.functional as F

REDUCTIONS = ("mean", "sum")
ACTIVATIONS = {"none": lambda x: x, "tanh": torch.tanh, "relu": F.relu, "silu": F.silu}


def reward_head(hidden, anchors, layers, *, activation="silu", norm_weight=None, norm_eps=1e-6):
    """Compute scalar rewards (R,) from the hidden states of the anchor tokens; arguments as in api.py.

    Every step runs in hidden's dtype, whatever that of the parameters; the norm's mean in float32.
    """
    states = hidden if anchors is None else hidden.index_select(0, anchors)  # (R, D)
    if norm_weight is not None:
        states = rms_norm(states, norm_weight, norm_eps)
    rewards = mlp(states, layers, activation).squeeze(-1)
    return rewards.to(torch.promote_types(rewards.dtype, torch.float32))


def rms_norm(states, weight, eps):
    """Scale each row of (R, D) to a root mean square of one, times `weight`, as the norms of transformers do."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight.to(states.dtype) * wide.to(states.dtype)


def mlp(states, layers, activation):
    """Apply linear layers with the activation between them, operands in the dtype of `states`."""
    with torch.autocast(states.device.type, enabled=False):
        for number, (weight, bias) in enumerate(layers):
            if number > 0:
                states = ACTIVATIONS[activation](states)
            states = F.linear(states, weight.to(states.dtype), None if bias is None else bias.to(states.dtype))
    return states


def preference_loss(
    rewards, edges, *, margin=None, weight=None, label_smoothing=0.0, center=0.0, lengths=None, reduction="mean"
):
    """Compute the weighted mean or sum of the preference loss over an edge list, a scalar; arguments as in api.py."""
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
    loss = (terms * weight).sum()
    if reduction == "sum":
        return loss
    total = weight.sum()
    return loss / torch.where(total > 0, total, torch.ones_like(total))
