"""The eager preference head against formulas written out by hand, in float64."""

import math

import pytest
import torch

from fastrm_kernels import preference_loss, reward_head


def _log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > -700 else x


def _by_hand(rewards, edges, margin, weight, smoothing, center, lengths):
    scaled = [r / math.log(n + 1.0) for r, n in zip(rewards, lengths, strict=True)] if lengths else rewards
    total = 0.0
    for (winner, loser), m, c in zip(edges, margin, weight, strict=True):
        d = scaled[winner] - scaled[loser] - m
        term = -(1 - smoothing) * _log_sigmoid(d) - smoothing * _log_sigmoid(-d)
        total += c * (term + center * (scaled[winner] + scaled[loser]) ** 2)
    return total / sum(weight)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("center", [0.0, 0.01])
@pytest.mark.parametrize("lengths", [None, [3, 1, 40, 7]], ids=["plain", "length-normalised"])
def test_loss_equals_the_formula(smoothing, center, lengths):
    rewards = [0.3, -1.2, 2.5, 0.0]
    edges, margin, weight = [(0, 1), (2, 3), (3, 1), (1, 2)], [0.0, 0.5, -0.25, 0.0], [1.0, 0.5, 2.0, 0.25]
    loss = preference_loss(
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(edges),
        margin=torch.tensor(margin, dtype=torch.float64),
        weight=torch.tensor(weight, dtype=torch.float64),
        label_smoothing=smoothing,
        center=center,
        lengths=None if lengths is None else torch.tensor(lengths),
    )
    assert abs(float(loss) - _by_hand(rewards, edges, margin, weight, smoothing, center, lengths)) <= 1e-12


@pytest.mark.parametrize("gap", [0.0, 1e-3, 30.0, 1e4, -1e4])
def test_loss_and_gradient_are_finite_and_right_for_extreme_rewards(gap):
    rewards = torch.tensor([gap / 2, -gap / 2], dtype=torch.float32, requires_grad=True)
    loss = preference_loss(rewards, torch.tensor([[0, 1]]))
    loss.backward()
    exact = -_log_sigmoid(gap)
    slope = -1.0 / (1.0 + math.exp(gap)) if gap < 700 else 0.0
    assert abs(float(loss) - exact) <= 1e-6 * max(1.0, abs(exact))
    assert abs(float(rewards.grad[0]) - slope) <= 1e-6
    assert float(rewards.grad[0]) == -float(rewards.grad[1])


def test_a_tie_as_two_half_edges_pulls_rewards_together():
    rewards = torch.tensor([2.0, -1.0], dtype=torch.float64, requires_grad=True)
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    loss = preference_loss(rewards, torch.tensor([[0, 1], [1, 0]]), weight=half)
    loss.backward()
    assert abs(float(loss) - 0.5 * (-_log_sigmoid(3.0) - _log_sigmoid(-3.0))) <= 1e-12
    assert rewards.grad[0] > 0 > rewards.grad[1]


def test_no_edges_and_zero_weights_give_zero_not_nan():
    rewards = torch.zeros(2, requires_grad=True)
    loss = preference_loss(rewards, torch.empty(0, 2, dtype=torch.int64))
    loss.backward()
    assert float(loss) == 0.0 and torch.equal(rewards.grad, torch.zeros(2))
    assert float(preference_loss(rewards, torch.tensor([[0, 1]]), weight=torch.zeros(1))) == 0.0


def test_all_pairs_loss_is_the_sum_over_its_edges():
    rewards = torch.randn(5, dtype=torch.float64)
    edges = torch.combinations(torch.arange(5))
    single = [preference_loss(rewards, edge[None]) for edge in edges]
    assert torch.allclose(preference_loss(rewards, edges), torch.stack(single).mean(), atol=1e-14, rtol=0)


@pytest.mark.parametrize("activation", ["none", "tanh", "relu", "silu"])
def test_head_equals_stock_modules(activation):
    torch.manual_seed(0)
    stock = {"none": torch.nn.Identity, "tanh": torch.nn.Tanh, "relu": torch.nn.ReLU, "silu": torch.nn.SiLU}
    first, last = torch.nn.Linear(8, 6).double(), torch.nn.Linear(6, 1).double()
    norm = torch.nn.RMSNorm(8, eps=1e-6).double()
    norm.weight.data.uniform_(0.5, 1.5)
    hidden, anchors = torch.randn(20, 8, dtype=torch.float64), torch.tensor([3, 19, 3, 0])
    rewards = reward_head(
        hidden, anchors, [(first.weight, first.bias), (last.weight, last.bias)],
        activation=activation, norm_weight=norm.weight,
    )  # fmt: skip
    expected = last(stock[activation]()(first(norm(hidden[anchors])))).squeeze(-1)
    assert rewards.shape == (4,) and (rewards - expected).abs().max() <= 1e-14


def test_rewards_of_half_precision_are_float32():
    hidden, weight = torch.randn(4, 8, dtype=torch.bfloat16), torch.randn(1, 8, dtype=torch.bfloat16)
    assert reward_head(hidden, torch.tensor([1]), [(weight, None)]).dtype == torch.float32


def test_wrong_head_is_refused():
    hidden = torch.randn(4, 8)
    with pytest.raises(ValueError, match="got 'gelu', wanted one of none, tanh, relu, silu"):
        reward_head(hidden, torch.tensor([0]), [(torch.randn(1, 8), None)], activation="gelu")
    with pytest.raises(ValueError, match="wanted a last weight of shape"):
        reward_head(hidden, torch.tensor([0]), [(torch.randn(2, 8), None)])
