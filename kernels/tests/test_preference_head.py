"""The eager preference head against formulas written out by hand, in float64."""

import math

import pytest
import torch

from fastrm_kernels import dispatch, preference_loss, reward_head
from fastrm_kernels.preference_head import preference_head_gradients, preference_head_loss


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


def test_a_sum_is_the_mean_times_the_weights_and_nothing_without_preferences():
    rewards, edges = torch.randn(5, dtype=torch.float64), torch.tensor([[0, 1], [2, 3], [4, 0]])
    options = {"weight": torch.tensor([1.0, 0.5, 0.25]), "margin": torch.rand(3), "center": 0.1, "label_smoothing": 0.2}
    mean, total = (preference_loss(rewards, edges, reduction=name, **options) for name in ("mean", "sum"))
    assert abs(float(total - 1.75 * mean)) <= 1e-14 and float(mean) > 0.1
    leaf = rewards.clone().requires_grad_()
    nothing = preference_loss(leaf, edges[:0], reduction="sum")
    nothing.backward()
    assert float(nothing) == 0.0 and torch.equal(leaf.grad, torch.zeros(5))
    with pytest.raises(ValueError, match="reduction: got 'none', wanted one of mean, sum"):
        preference_loss(rewards, edges, reduction="none")


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


@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.bfloat16], ids=str)
def test_operands_are_taken_in_the_dtype_of_hidden(weight_dtype):
    """Also under autocast, which would take them in its own."""
    torch.manual_seed(0)
    hidden, anchors = torch.randn(4, 8), torch.tensor([2, 0])
    layers = [(torch.randn(6, 8, dtype=weight_dtype), None), (torch.randn(1, 6, dtype=weight_dtype), None)]
    norm_weight = torch.rand(8, dtype=weight_dtype)
    expected = reward_head(hidden, anchors, [(w.float(), None) for w, _ in layers], norm_weight=norm_weight.float())
    assert torch.equal(reward_head(hidden, anchors, layers, norm_weight=norm_weight), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reward_head(hidden, anchors, layers, norm_weight=norm_weight), expected)


def test_no_anchors_means_all_rows():
    hidden, layers = torch.randn(5, 8), [(torch.randn(1, 8), torch.randn(1))]
    assert torch.equal(reward_head(hidden, None, layers), reward_head(hidden, torch.arange(5), layers))


def test_head_and_loss_in_one_are_the_two():
    torch.manual_seed(0)
    hidden, anchors, edges = torch.randn(9, 8), torch.tensor([8, 1, 1]), torch.tensor([[0, 1], [2, 0]])
    layers = [(torch.randn(6, 8), torch.randn(6)), (torch.randn(1, 6), torch.randn(1))]
    options = {"weight": torch.tensor([0.5, 2.0]), "margin": torch.tensor([0.1, 0.0]), "label_smoothing": 0.1}
    leaf = hidden.clone().requires_grad_()
    rewards = reward_head(leaf, anchors, layers, activation="tanh", norm_weight=torch.ones(8))
    loss = preference_loss(rewards, edges, center=0.01, **options)
    gradient = torch.autograd.grad(loss, leaf)[0]
    one = leaf.detach().requires_grad_()
    found = preference_head_loss(
        one, anchors, layers, edges, activation="tanh", norm_weight=torch.ones(8), center=0.01, **options
    )
    assert torch.equal(found[0], loss) and torch.equal(found[1], rewards)
    assert torch.equal(torch.autograd.grad(found[0], one)[0], gradient)
    parts = preference_head_gradients(
        hidden, anchors, layers, edges, activation="tanh", norm_weight=torch.ones(8), center=0.01, grad_loss=4.0,
        **options,
    )  # fmt: skip
    dense = torch.zeros(9, 8).index_add_(0, parts.anchors, parts.rows)
    assert parts.rows.shape == (3, 8) and (dense - 4.0 * gradient).abs().max() <= 1e-5


def test_auto_is_what_was_measured_on_the_device(monkeypatch):
    rewards = torch.zeros(2)
    assert dispatch.pick_auto("preference_head", rewards).name == "eager"
    assert dispatch.pick_auto("preference_head", rewards.double()) == ("eager", "Triton needs CUDA")
    monkeypatch.setattr(dispatch, "obstacle_to_triton", lambda tensor: None)
    assert dispatch.pick_auto("preference_head", rewards) == (
        "eager", "preference_head was not measured for float32 on cpu; ask for triton by name to use it",
    )  # fmt: skip
    monkeypatch.setitem(dispatch.MEASURED, ("preference_head", "cpu", torch.float32), "triton")
    assert dispatch.pick_auto("preference_head", rewards.half()).name == "eager"
    assert dispatch.pick_auto("preference_head", rewards).name == "triton"
    assert dispatch.pick_auto("preference_loss", rewards).name == "eager"
    assert dispatch.pick("preference_head", "eager", rewards) == "eager"


def test_wrong_head_is_refused():
    hidden = torch.randn(4, 8)
    with pytest.raises(ValueError, match="got 'gelu', wanted one of none, tanh, relu, silu"):
        reward_head(hidden, torch.tensor([0]), [(torch.randn(1, 8), None)], activation="gelu")
    with pytest.raises(ValueError, match="wanted a last weight of shape"):
        reward_head(hidden, torch.tensor([0]), [(torch.randn(2, 8), None)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4, 8, dtype=torch.int64)}, r"hidden: got \(4, 8\) torch.int64, wanted \(T, D\) f"),
        ({"hidden": torch.zeros(2, 4, 8)}, r"hidden: got \(2, 4, 8\) torch.float32, wanted \(T, D\)"),
        ({"hidden": torch.zeros(0, 8)}, "anchors: got 2 rows of a hidden that has none"),
        ({"anchors": torch.tensor([0, 1], dtype=torch.int32)}, r"anchors: got \(2,\) torch.int32, .* call .long\(\)"),
        ({"layers": []}, "layers: wanted a last weight"),
        ({"layers": [(torch.zeros(3, 8), None), (torch.zeros(1, 4), None)]},
         r"layers\[1\]: got a weight \(1, 4\), wanted 3 input columns"),
        ({"hidden": torch.zeros(4, 0), "layers": [(torch.zeros(1, 0), None)]},
         r"layers\[0\]: got a weight \(1, 0\), wanted at least one input column"),
        ({"layers": [(torch.zeros(0, 8), None), (torch.zeros(1, 0), None)]},
         r"layers\[1\]: got a weight \(1, 0\), wanted at least one input column"),
        ({"layers": [(torch.zeros(1, 8), torch.zeros(2))]}, r"layers\[0\]: got a bias \(2,\), wanted \(1,\)"),
        ({"norm_weight": torch.ones(7)}, r"norm_weight: got \(7,\), wanted \(8,\)"),
        ({"activation": "gelu"}, "activation: got 'gelu', wanted one of none, tanh, relu, silu"),
        ({"edges": torch.tensor([0, 1])}, r"edges: got \(2,\) torch.int64, wanted \(E, 2\) int64, winner then loser"),
        ({"edges": torch.tensor([[0, 1]]).int()}, r"edges: got \(1, 2\) torch.int32, wanted \(E, 2\) int64"),
        ({"label_smoothing": 0.5}, "label_smoothing: got 0.5, wanted 0 <= value < 0.5"),
        ({"center": -0.1}, "center: got -0.1, wanted a coefficient >= 0"),
        ({"margin": torch.zeros(2)}, r"margin: got \(2,\), wanted \(1,\)"),
        ({"weight": torch.zeros(1, 1)}, r"weight: got \(1, 1\), wanted \(1,\)"),
        ({"lengths": torch.ones(3)}, r"lengths: got \(3,\), wanted \(2,\)"),
        ({"impl": "cuda"}, "impl: got 'cuda', wanted one of auto, triton, eager"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_does_not_fit_is_refused(change, message):
    arguments = {
        "hidden": torch.zeros(4, 8), "anchors": torch.tensor([0, 1]), "layers": [(torch.zeros(1, 8), None)],
        "edges": torch.tensor([[0, 1]]), **change,
    }  # fmt: skip
    for function in (preference_head_loss, preference_head_gradients):
        with pytest.raises(ValueError, match=message):
            function(**arguments)


def test_rewards_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"rewards: got \(2,\) torch.bfloat16, wanted \(R,\) float32; call .float"):
        preference_loss(torch.zeros(2, dtype=torch.bfloat16), torch.tensor([[0, 1]]))
