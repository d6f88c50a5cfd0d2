"""The preference loss and its gradient for the rewards, in Triton; formulas in reference.py.

Gradients are gathered, not scattered: every reward compares itself with both ends of every edge. That
is R * E comparisons, nothing next to the head's weights, and needs no atomics.
"""

import torch
import triton
import triton.language as tl

from fastrm_kernels.launch import launch
from fastrm_kernels.preference_head.triton_primitives import round_up

BLOCK_E = 64


@triton.jit
def log1p_below_one(x):
    """Compute log(1 + x) for 0 <= x <= 1 to float32 accuracy: 2 artanh(s) with s = x / (2 + x) <= 1/3.

    log(1 + x) itself would lose the small terms of well separated pairs. The series' remainder is
    below 2e-8 of the value.
    """
    s = x / (2.0 + x)
    square = s * s
    p = 1.0 / 13.0
    p = p * square + 1.0 / 11.0
    p = p * square + 1.0 / 9.0
    p = p * square + 1.0 / 7.0
    p = p * square + 1.0 / 5.0
    p = p * square + 1.0 / 3.0
    return 2.0 * s + 2.0 * s * square * p


@triton.jit
def edge_end(rewards_ptr, lengths_ptr, index, num_rewards):
    """Return the reward of one end of each edge, divided by log(length + 1) if there are lengths, and that divisor.

    An index out of range is not read and gives NaN: nothing can raise here, and NaN stops any trainer.
    """
    valid = (index >= 0) & (index < num_rewards)
    safe = tl.where(valid, index, 0)
    reward = tl.where(valid, tl.load(rewards_ptr + safe, mask=valid, other=0.0), float("nan"))
    divisor = tl.full(reward.shape, 1.0, tl.float32)
    if lengths_ptr is not None:
        divisor = tl.log(tl.load(lengths_ptr + safe, mask=valid, other=1).to(tl.float32) + 1.0)
        reward /= divisor
    return reward, divisor


@triton.jit
def edge_terms(
    rewards_ptr, edges_ptr, margin_ptr, weight_ptr, lengths_ptr, offs_e, num_rewards, num_edges, smoothing, center
):
    """Return winner, loser, weight, weighted term and its slopes in both rewards for a block of edges."""
    live = offs_e < num_edges
    # The ends of edges beyond the list are in range, so that their terms are finite; their weight is 0.
    winner = tl.load(edges_ptr + 2 * offs_e, mask=live, other=0)
    loser = tl.load(edges_ptr + 2 * offs_e + 1, mask=live, other=0)
    high, high_divisor = edge_end(rewards_ptr, lengths_ptr, winner, num_rewards)
    low, low_divisor = edge_end(rewards_ptr, lengths_ptr, loser, num_rewards)
    gap = high - low
    if margin_ptr is not None:
        gap -= tl.load(margin_ptr + offs_e, mask=live, other=0.0)
    weight = tl.where(live, 1.0, 0.0)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + offs_e, mask=live, other=0.0)
    tail = tl.exp(-tl.abs(gap))
    rest = log1p_below_one(tail)
    # -log sigmoid(d) = max(-d, 0) + log(1 + e^-|d|); sigmoid(-|d|) = tail / (1 + tail).
    term = (1.0 - smoothing) * (tl.maximum(-gap, 0.0) + rest) + smoothing * (tl.maximum(gap, 0.0) + rest)
    minor = tail / (1.0 + tail)
    right = tl.where(gap > 0, 1.0 - minor, minor)  # sigmoid(gap)
    wrong = tl.where(gap > 0, minor, 1.0 - minor)  # sigmoid(-gap)
    slope = smoothing * right - (1.0 - smoothing) * wrong
    both = high + low
    term += center * both * both
    pull = 2.0 * center * both
    return (
        tl.where(live, winner, -1), tl.where(live, loser, -1), weight, tl.where(live, term * weight, 0.0),
        weight * (slope + pull) / high_divisor, weight * (pull - slope) / low_divisor,
    )  # fmt: skip


@triton.jit
def loss_and_slopes(
    rewards_ptr, edges_ptr, margin_ptr, weight_ptr, lengths_ptr, offs_r, num_rewards, num_edges, smoothing, center,
    REDUCTION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Return the loss, and its gradient (BLOCK_R,) for a block of rewards; edges are summed in their order."""
    terms = tl.zeros((BLOCK_E,), tl.float32)
    weights = tl.zeros((BLOCK_E,), tl.float32)
    slopes = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, num_edges, BLOCK_E):
        offs_e = start + tl.arange(0, BLOCK_E)
        winner, loser, weight, term, up, down = edge_terms(
            rewards_ptr, edges_ptr, margin_ptr, weight_ptr, lengths_ptr, offs_e, num_rewards, num_edges,
            smoothing, center,
        )  # fmt: skip
        terms += term
        weights += weight
        mine = tl.where(winner[None, :] == offs_r[:, None], up[None, :], 0.0)
        mine += tl.where(loser[None, :] == offs_r[:, None], down[None, :], 0.0)
        slopes += tl.sum(mine, 1)
    loss = tl.sum(terms, 0)
    if REDUCTION == "mean":
        total = tl.sum(weights, 0)
        total = tl.where(total > 0, total, 1.0)
        loss /= total
        slopes /= total
    return loss, slopes


@triton.jit(do_not_specialize=["num_edges", "num_rewards"])
def preference_loss_kernel(
    rewards_ptr, edges_ptr, margin_ptr, weight_ptr, lengths_ptr, loss_ptr, slopes_ptr,
    num_rewards, num_edges, smoothing, center,
    REDUCTION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Store the gradient of rewards [i BLOCK_R, (i + 1) BLOCK_R) in program i; program 0 also the loss."""
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    loss, slopes = loss_and_slopes(
        rewards_ptr, edges_ptr, margin_ptr, weight_ptr, lengths_ptr, offs_r, num_rewards, num_edges,
        smoothing, center, REDUCTION, BLOCK_R, BLOCK_E,
    )  # fmt: skip
    tl.store(slopes_ptr + offs_r, slopes, mask=offs_r < num_rewards)
    if tl.program_id(0) == 0:
        tl.store(loss_ptr, loss)


def launch_preference_loss(rewards, edges, margin, weight, lengths, label_smoothing, center, reduction):
    """Return the loss () and its slopes d loss / d rewards (R,), both float32."""
    num_rewards, num_edges = rewards.shape[0], edges.shape[0]
    loss = torch.empty((), dtype=torch.float32, device=rewards.device)
    slopes = torch.empty(num_rewards, dtype=torch.float32, device=rewards.device)
    block = round_up(num_rewards, 16, 64)
    launch(
        preference_loss_kernel, (max(1, triton.cdiv(num_rewards, block)),), num_warps=4, num_stages=2,
        rewards_ptr=rewards.contiguous(),
        **loss_arguments(edges, margin, weight, lengths, label_smoothing, center, reduction),
        loss_ptr=loss, slopes_ptr=slopes, num_rewards=num_rewards, num_edges=num_edges,
        BLOCK_R=block, BLOCK_E=BLOCK_E,
    )  # fmt: skip
    return loss, slopes


def loss_arguments(edges, margin, weight, lengths, label_smoothing, center, reduction) -> dict:
    """Return the kernel arguments of the loss, all tensors contiguous."""
    optional = {"margin_ptr": margin, "weight_ptr": weight, "lengths_ptr": lengths}
    return {
        "edges_ptr": edges.contiguous(),
        **{name: None if value is None else value.contiguous() for name, value in optional.items()},
        "smoothing": label_smoothing,
        "center": center,
        "REDUCTION": reduction,
    }
