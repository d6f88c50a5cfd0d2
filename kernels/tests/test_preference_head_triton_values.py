"""The Triton kernels of the preference head: values and every gradient against float64."""

import itertools

import pytest
import torch

from fastrm_kernels.preference_head import preference_head_gradients, preference_head_loss, reward_head, triton_backward
from kernel_cases.heads import DEVICE, check, close, make, same

# Triton's interpreter, used without a GPU, cannot multiply bfloat16: those cases are for the GPU marker.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


# Every size on both sides of the blocks, and one shape of whole blocks for each range of rows.
SHAPES = [
    (1, 64, 65), (2, 17, 1), (2, 1, 17), (7, 65, 127), (16, 200, 64), (16, 256, 128), (63, 1, 17), (63, 127, 63),
    (64, 64, 160), (64, 128, 128), (65, 127, 63), (65, 17, 200), (128, 128, 128), (130, 160, 65),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "R{}-D{}-F{}".format(*shape))
def test_two_layers_at_every_size(shape, dtype):
    number = SHAPES.index(shape)
    num_rows, *widths = shape
    # The norm of a single column is constant: its gradient is 0, and its error is that of cancelling.
    norm = number % 3 != 1 and widths[0] > 1
    check(
        make(num_rows, widths, dtype, activation=("silu", "tanh", "relu", "none")[number % 4], norm=norm,
             bias=number % 2 == 0, anchors=number % 5 != 3, seed=number),
        dtype,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "tanh", "relu", "silu"])
def test_two_layers_with_every_option(activation, dtype):
    for norm, bias, anchors in itertools.product([False, True], repeat=3):
        check(make(5, (33, 20), dtype, activation=activation, norm=norm, bias=bias, anchors=anchors), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 2, 7, 63, 65, 130, 520])
def test_one_layer(num_rows, dtype):
    options = {"bias": num_rows % 2 == 0, "anchors": num_rows % 3 > 0}
    for width, norm in [(127, True), (1, False), (64, True), (64, False)][: 4 if num_rows < 10 else 1]:
        check(make(num_rows, (width,), dtype, norm=norm, **options), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(40, 33, 17), (24, 24, 24, 24, 24)], ids=["three", "five"])
def test_deep_heads(widths, dtype):
    check(make(7, widths, dtype), dtype)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.float16, torch.float32)], ids=str)
@pytest.mark.parametrize("num_rows", [7, 70])
def test_weights_of_another_dtype(num_rows, dtypes):
    for widths in ((65, 33), (65,)):
        check(make(num_rows, widths, torch.float16), *dtypes)


def test_many_features_of_few_columns():
    """One program has all columns; it must not take all 17,000 features of the small vectors at once."""
    case = make(40, (16, 17_000))
    assert close(case.run("triton", torch.float32), case.run("eager", torch.float64), 1e-5)


def test_repeated_anchors_add_up():
    case = make(6, (24, 20))
    case.anchors = torch.tensor([2, 0, 2, 2, 5, 2], device=DEVICE)
    check(case, torch.float32)
    gradient = case.run("triton", torch.float32)[2]
    assert gradient.any(1).tolist() == [True, False, True, False, False, True]


@pytest.mark.parametrize("many", [False, True], ids=["one launch", "products"])
@pytest.mark.parametrize("widths", [(5, 4), (5,)], ids=["two layers", "one layer"])
def test_each_subset_of_gradients(widths, many, monkeypatch):
    if many:
        monkeypatch.setattr(triton_backward, "ONE_LAUNCH_ROWS", 1)
    case = make(3, widths)
    hidden, norm, *layers = (x.float() for x in case.tensors)
    everything = None
    count = len(layers) + 2
    for needed in itertools.product([True, False], repeat=count):
        leaves = [x.clone().requires_grad_(need) for x, need in zip((hidden, norm, *layers), needed, strict=True)]
        pairs = list(zip(leaves[2::2], leaves[3::2], strict=True))
        loss, rewards = preference_head_loss(
            leaves[0], case.anchors, pairs, case.edges, norm_weight=leaves[1], impl="triton"
        )
        assert rewards.requires_grad == loss.requires_grad == any(needed)
        if any(needed):
            (loss + rewards.square().sum()).backward()
        everything = everything or [x.grad for x in leaves]
        for leaf, need, expected in zip(leaves, needed, everything, strict=True):
            assert same([leaf.grad], [expected]) if need else leaf.grad is None


def test_either_output_alone_has_its_gradient():
    case = make(5, (24, 20))
    for part in (0, 1):
        upstream = [case.upstream_loss, case.upstream_rewards]
        kept = upstream[part]
        case.upstream_loss, case.upstream_rewards = (u * (n == part) for n, u in enumerate(upstream))
        expected = case.run("eager", torch.float64)
        leaves = [x.float().requires_grad_() for x in case.tensors]
        output = preference_head_loss(
            leaves[0], case.anchors, [leaves[2:4], leaves[4:6]], case.edges, norm_weight=leaves[1], impl="triton",
            **{n: v.float() if torch.is_tensor(v) else v for n, v in case.options.items()},
        )[part]  # fmt: skip
        found = torch.autograd.grad(output, leaves, kept.float())
        assert close(found, expected[2:], 1e-5)
        case.upstream_loss, case.upstream_rewards = upstream


@pytest.mark.parametrize("widths", [(24, 20), (24,)], ids=["two layers", "one layer"])
def test_no_rows(widths):
    """A pack whose records were all refused still takes part in the backward pass, with zeros."""
    for num_tokens in (0, 4):
        case = make(0, widths)
        case.tensors[0] = torch.randn(num_tokens, 24, device=DEVICE).double()
        loss, rewards, *gradients = case.run("triton", torch.float32)
        assert float(loss.detach()) == 0.0 and rewards.shape == (0,)
        assert gradients[0].shape == (num_tokens, 24)
        assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("impl", ["triton", "eager"])
@pytest.mark.parametrize("widths", [(24,), (24, 20), (24, 20, 12)], ids=["one", "two", "three"])
def test_gradients_without_autograd_are_those_of_autograd(widths, impl):
    case = make(6, widths)
    case.upstream_rewards *= 0
    case.upstream_loss = case.upstream_loss.float().double()
    expected = case.run(impl, torch.float32)
    hidden, norm, *layers = (x.float() for x in case.tensors)
    found = preference_head_gradients(
        hidden, case.anchors, list(zip(layers[::2], layers[1::2], strict=True)), case.edges, norm_weight=norm,
        grad_loss=float(case.upstream_loss), impl=impl, **case.options,
    )  # fmt: skip
    dense = torch.zeros_like(hidden).index_put_((found.anchors,), found.rows, accumulate=True)
    flat = [x for pair in found.layers for x in pair]
    ours = (found.loss, found.rewards, dense, found.norm_weight, *flat)
    assert found.rows.shape == (6, 24) and not found.loss.requires_grad
    assert close(ours, expected, 2e-6 if DEVICE == "cpu" else 1e-5)


# --- range, accuracy at the edges ---------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_tanh_is_accurate_near_zero_and_far_out():
    """One feature of weight 1: rewards are the activation, their gradient its slope.

    With a GPU's exp, off by eps (2 + |x|) of itself, and division, off by 2 eps, silu(x) = x / (1 + e^-x) is off
    by eps (5 + |x| sigmoid(-x)), and zero where sigmoid(x) is no normal number.
    """
    eps, tiny = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny
    x = torch.cat([torch.logspace(-20, 2, 300, base=10.0), torch.tensor([0.0, 0.624, 0.626, 9.0, 20.0, 1e4])])
    x = torch.cat([x, -x]).to(DEVICE)[:, None]
    one = torch.ones(1, 1, device=DEVICE)
    for activation, function in (("tanh", torch.tanh), ("silu", torch.nn.functional.silu)):
        leaf = x.clone().requires_grad_()
        rewards = reward_head(leaf, None, [(one, None), (one, None)], activation=activation, impl="triton")
        exact = x.double().requires_grad_()
        truth = function(exact).squeeze(1)
        error = (rewards.double() - truth).abs()
        wide = x.squeeze(1).double()
        grows = wide.abs() * torch.sigmoid(-wide) if activation == "silu" else 0.0
        limit = eps * (5 + grows) * truth.abs() + tiny * (1 + wide.abs())
        assert (error <= limit).all(), (activation, x[(error / limit).argmax()])
        slopes = [torch.autograd.grad(y.sum(), at)[0].double() for y, at in ((rewards, leaf), (truth, exact))]
        assert (slopes[0] - slopes[1]).abs().max() <= 1e-6, activation


def test_float16_states_times_norm_weight_may_pass_65504():
    case = make(5, (64, 33), torch.float16)
    case.tensors[0] *= 8000.0 / 3.0
    case.tensors[1] *= 20.0
    assert (case.tensors[0][:, None] * case.tensors[1]).abs().max() > 65504
    check(case, torch.float16)
