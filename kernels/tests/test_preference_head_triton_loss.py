"""The Triton kernels of the preference head: the loss with every option, and what has no say in it."""

import math

import pytest
import torch

from fastrm_kernels.preference_head import autograd, preference_head_gradients, preference_loss, reward_head
from kernel_cases.heads import DEVICE, check, equal, make, same
from kernel_cases.precision import assert_within_budget


def loss_and_gradient(rewards, edges, impl, dtype, **options):
    leaf = rewards.to(dtype).requires_grad_()
    loss = preference_loss(leaf, edges, impl=impl, **options)
    return loss, *torch.autograd.grad(loss, leaf, torch.full_like(loss, 1.7))


@pytest.mark.parametrize("num_edges", [0, 1, 65])
@pytest.mark.parametrize("num_rewards", [1, 2, 5, 64, 65, 130])
def test_loss_with_every_option(num_rewards, num_edges):
    """Several draws together: on two numbers alone eager code may be exact by luck."""
    torch.manual_seed(num_edges)
    names = ("margin", "weight", "label_smoothing", "center", "lengths", "reduction")
    for chosen in ((), names, *((name,) for name in names)):
        results = {"truth": [], "eager": [], "triton": []}
        for _ in range(4):
            rewards = torch.randn(num_rewards, device=DEVICE).double() * 3
            edges = torch.randint(0, num_rewards, (num_edges, 2), device=DEVICE)
            lengths = torch.randint(1, 900, (num_rewards,), device=DEVICE)
            margin, weight = torch.randn(num_edges, device=DEVICE), torch.rand(num_edges, device=DEVICE)
            every = dict(zip(names, (margin, weight, 0.2, 0.05, lengths, "sum"), strict=True))
            for key, found in results.items():
                dtype = torch.float64 if key == "truth" else torch.float32
                impl = "eager" if key == "truth" else key
                options = {name: every[name] for name in chosen}
                found.append(loss_and_gradient(rewards, edges, impl, dtype, **options))
        pooled = {
            key: [torch.cat([x.reshape(-1) for x in parts]) for parts in zip(*found, strict=True)]
            for key, found in results.items()
        }
        assert_within_budget(
            [f"loss {chosen}", f"gradient {chosen}"], pooled["triton"], pooled["eager"], pooled["truth"]
        )


@pytest.mark.parametrize("gap", [0.0, 1e-6, 1e-3, 0.5, 5.0, 15.0, 40.0, 90.0, 1e4, 2e4])
def test_loss_of_extreme_rewards_keeps_its_relative_accuracy(gap):
    """log(1 + e^-d) of well separated pairs is far below the rounding of 1.

    A GPU's exp(x) is a power of two of the rounded x log2(e), so its relative error grows like eps |x|.
    """
    eps, tiny = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny
    for sign in (1, -1):
        rewards = torch.tensor([gap / 2, -gap / 2], device=DEVICE).double() * sign
        edges = torch.tensor([[0, 1]], device=DEVICE)
        truth = loss_and_gradient(rewards, edges, "eager", torch.float64)
        ours = loss_and_gradient(rewards, edges, "triton", torch.float32)
        for a, exact in zip(ours, truth, strict=True):
            limit = eps * (8 * exact.abs() + 2 * gap * math.exp(-gap)) + tiny
            assert ((a.double() - exact).abs() <= limit).all(), (a, exact)


def test_zero_weights_and_no_edges_give_zero_not_nan():
    for edges, weight in ((torch.empty(0, 2, dtype=torch.int64), None), (torch.tensor([[0, 1]]), torch.zeros(1))):
        weight = None if weight is None else weight.to(DEVICE)
        rewards = torch.tensor([3.0, 1.0], dtype=torch.float64, device=DEVICE)
        loss, gradient = loss_and_gradient(rewards, edges.to(DEVICE), "triton", torch.float32, weight=weight)
        assert float(loss.detach()) == 0.0 and gradient.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64, torch.bool], ids=str)
def test_margins_and_weights_of_any_dtype(dtype):
    case = make(5, (24, 20), edges=4)
    case.options.update(
        margin=torch.tensor([1, 0, 1, 1], device=DEVICE), weight=torch.tensor([1, 1, 0, 1], device=DEVICE)
    )
    expected = case.run("triton", torch.float32)
    case.options.update({name: case.options[name].to(dtype) for name in ("margin", "weight")})
    assert equal(case.run("triton", torch.float32), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_in_its_own_launch_equals_the_fused_one(monkeypatch, reduction):
    lengths = torch.randint(1, 50, (40,), device=DEVICE)
    case = make(40, (24, 20), edges=150, lengths=lengths, reduction=reduction)
    fused = case.run("triton", torch.float32)
    monkeypatch.setattr(autograd, "FUSED_EDGES", 0)
    assert same(case.run("triton", torch.float32), fused)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_many_rewards_and_edges(reduction):
    check(make(300, (24, 20), edges=1500, reduction=reduction), torch.float32)


def test_a_sum_in_the_heads_launches_is_as_exact_as_a_mean():
    check(make(40, (24, 20), edges=150, reduction="sum"), torch.float32)


def test_a_reward_without_edges_has_no_say():
    rewards = torch.tensor([torch.nan, 1.0, 2.0], device=DEVICE, dtype=torch.float64)
    loss, gradient = loss_and_gradient(rewards, torch.tensor([[1, 2]], device=DEVICE), "triton", torch.float32)
    assert torch.isfinite(loss) and float(gradient[0]) == 0.0 and float(gradient[1]) == -float(gradient[2]) < 0.0


def test_an_index_out_of_range_gives_nan():
    rewards = torch.tensor([1.0, 2.0], device=DEVICE)
    for wrong in (-1, 2):
        edges = torch.tensor([[0, 1], [wrong, 0]], device=DEVICE)
        assert preference_loss(rewards, edges, impl="triton").isnan()
        for widths in ((24, 20), (24,)):
            case = make(3, widths)
            case.anchors = torch.tensor([0, wrong if wrong < 0 else 99, 1], device=DEVICE)
            layers = [x.float() for x in case.tensors[2:]]
            rewards_found = reward_head(
                case.tensors[0].float(), case.anchors, list(zip(layers[::2], layers[1::2], strict=True)), impl="triton"
            )
            assert rewards_found.isnan().tolist() == [False, True, False]


@pytest.mark.skipif(DEVICE == "cuda", reason="a device-side assert ends the process")
def test_where_torch_indexes_a_wrong_anchor_raises():
    """The places that README.md names."""
    case = make(3, (24, 20))
    case.anchors[1] = 99
    three = make(3, (24, 20, 12))
    three.anchors[1] = 99
    hidden, norm, *layers = (x.float() for x in case.tensors)
    for call in (
        lambda: case.run("eager", torch.float32),
        lambda: case.run("triton", torch.float32),
        lambda: three.run("triton", torch.float32),
        lambda: reward_head(hidden.T.contiguous().T, case.anchors, [layers[:2], layers[2:]], impl="triton"),
        lambda: preference_head_gradients(
            hidden, case.anchors, [layers[:2], layers[2:]], case.edges, norm_weight=norm, impl="triton"
        ),
    ):
        with pytest.raises(IndexError):
            call()
