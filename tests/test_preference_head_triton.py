"""The Triton kernels of the preference head: values and every gradient against float64.

Without a GPU they run in Triton's interpreter, which cannot multiply bfloat16: those cases are for the
GPU marker.
"""

import itertools
import math
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastrm_kernels import dispatch
from fastrm_kernels.launch import record_launches
from fastrm_kernels.preference_head import (
    autograd,
    preference_head_gradients,
    preference_head_loss,
    preference_loss,
    reward_head,
    triton_backward,
)
from precision import assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@dataclass
class Case:
    """A head and its inputs in float64, all values such that `dtype` holds them exactly.

    Attributes:
        tensors: hidden, norm weight or None, then weight and bias or None of each layer.
        options: of `preference_loss`.
    """

    tensors: list
    anchors: torch.Tensor | None
    edges: torch.Tensor
    activation: str
    upstream_loss: torch.Tensor
    upstream_rewards: torch.Tensor
    options: dict = field(default_factory=dict)

    def run(self, impl, dtype, param_dtype=None, layout=lambda hidden: hidden):
        """(loss, rewards, gradients...) with random upstream gradients for both outputs."""
        param_dtype = param_dtype or dtype
        hidden, *rest = self.tensors
        leaf = hidden.to(dtype).requires_grad_()
        rest = [None if x is None else x.to(param_dtype).requires_grad_() for x in rest]
        norm, *layers = rest
        exact = dtype == torch.float64
        options = {
            name: value.float() if torch.is_tensor(value) and value.is_floating_point() and not exact else value
            for name, value in self.options.items()
        }
        loss, rewards = preference_head_loss(
            layout(leaf), self.anchors, list(zip(layers[::2], layers[1::2], strict=True)), self.edges,
            activation=self.activation, norm_weight=norm, impl=impl, **options,
        )  # fmt: skip
        wanted = [x for x in (leaf, *rest) if x is not None]
        # A scalar upstream gradient becomes one of stride 0, as that of a sum is.
        upstream = [self.upstream_loss.to(loss.dtype), self.upstream_rewards.to(loss.dtype).expand(rewards.shape)]
        gradients = torch.autograd.grad([loss, rewards], wanted, upstream)
        assert [g.dtype for g in gradients] == [x.dtype for x in wanted]
        return loss, rewards, *gradients

    def gradient_of_rewards(self, rewards):
        leaf = rewards.detach().requires_grad_()
        outputs = [preference_loss(leaf, self.edges, **self.options), leaf]
        upstream = [self.upstream_loss, self.upstream_rewards.expand(leaf.shape)]
        return torch.autograd.grad(outputs, leaf, upstream)[0]

    @property
    def names(self):
        names = [f"gradient {number} ({name})" for number, name in enumerate(self._places())]
        return ["loss", "rewards", *names]

    def _places(self):
        kinds = ["hidden", "norm", *itertools.chain(*([f"weight {n}", f"bias {n}"] for n in range(9)))]
        return [kind for kind, x in zip(kinds, self.tensors, strict=False) if x is not None]


def make(num_rows, widths, dtype=torch.float32, *, activation="silu", norm=True, bias=True, anchors=True, edges=6,
         seed=0, **options):  # fmt: skip
    """A case with `widths` = D, F, ... and one output; anchors repeat."""
    torch.manual_seed(seed)

    def random(*shape, scale=1.0):
        return (torch.randn(shape, device=DEVICE) * scale).to(dtype).double()

    num_tokens = max(1, num_rows // 2 + 3) if anchors else num_rows
    tensors = [random(num_tokens, widths[0], scale=3.0), random(widths[0]) if norm else None]
    for inputs, outputs in itertools.pairwise([*widths, 1]):
        tensors += [random(outputs, inputs, scale=inputs**-0.5), random(outputs) if bias else None]
    count = edges if num_rows else 0
    pairs = torch.randint(0, max(1, num_rows), (count, 2), device=DEVICE)
    options = {
        "margin": torch.randn(count, device=DEVICE).double() * 0.1,
        "weight": torch.rand(count, device=DEVICE).double(),
        "label_smoothing": 0.1,
        "center": 0.01,
        **options,
    }
    picked = torch.randint(0, num_tokens, (num_rows,), device=DEVICE) if anchors else None
    upstream = torch.randn((), device=DEVICE).double(), torch.randn(num_rows, device=DEVICE).double()
    return Case(tensors, picked, pairs, activation, *upstream, options)


def check(case, dtype, param_dtype=None, **kwargs):
    truth = case.run("eager", torch.float64)
    ours = case.run("triton", dtype, param_dtype, **kwargs)
    eager = case.run("eager", dtype, param_dtype)
    if case.tensors[-1] is None:
        return assert_within_budget(case.names, ours, eager, truth)
    assert_within_budget(case.names[:-1], ours[:-1], eager[:-1], truth[:-1])
    # The gradient of the last bias is one sum, in which eager code may be exact by luck.
    error, eager_error = (abs(x[-1].double() - truth[-1]) for x in (ours, eager))
    band = torch.finfo(ours[-1].dtype).eps * abs(truth[-1])
    rounding = torch.finfo(torch.float32).eps * case.gradient_of_rewards(truth[1]).abs().sum()
    assert error <= 2 * (eager_error + band + rounding), f"last bias: {ours[-1].item()}, truth {truth[-1].item()}"


def equal(ours, others):
    return all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


def same(ours, others):
    """As from one kernel: bitwise in the interpreter. Strides, alignment and absent arguments are compiled in,
    and another compilation may add up in another order: on a GPU to the rounding of the dtype.
    """
    if DEVICE == "cpu":
        return equal(ours, others)
    pairs = zip(ours, others, strict=True)
    return all(close([a], [b], 32 * torch.finfo(b.dtype).eps) for a, b in pairs)


def close(ours, others, tolerance):
    """To `tolerance` of the largest element of each tensor."""
    return all((a - b).abs().max() <= tolerance * b.abs().max() for a, b in zip(ours, others, strict=True))


def need_memory(gib):
    """Memory that nobody touches is never allocated on a CPU; on a GPU it is."""
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < gib << 30:
        pytest.skip(f"needs {gib} GiB of free GPU memory")


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


def test_hidden_in_any_memory_layout():
    """Rows of a wider buffer are read in place, columns apart are gathered first; both as if contiguous."""
    wider = {
        "rows apart": lambda hidden: torch.nn.functional.pad(hidden, (3, 5))[:, 3:-5],
        "columns apart": lambda hidden: hidden.T.contiguous().T,
        "one row expanded": lambda hidden: hidden[:1].expand(hidden.shape),
    }
    for widths, anchors in itertools.product([(33, 20), (33,)], [True, False]):
        case = make(7, widths, anchors=anchors)
        expected = case.run("triton", torch.float32)
        for layout in ("rows apart", "columns apart"):
            ours = case.run("triton", torch.float32, layout=wider[layout])
            assert close(ours, expected, 1e-6 if DEVICE == "cpu" else 1e-5), layout
        one = wider["one row expanded"]
        ours, eager = (case.run(impl, torch.float32, layout=one) for impl in ("triton", "eager"))
        assert close(ours, eager, 1e-5)


@pytest.mark.parametrize("widths", [(33, 20), (33,)], ids=["two layers", "one layer"])
@pytest.mark.parametrize("num_rows", [7, 70])
def test_nothing_beyond_the_inputs_is_read(widths, num_rows):
    """Every input lies in a buffer full of NaN, also between its rows."""

    def buried(x):
        if x is None:
            return None
        shape = [n + 3 for n in x.shape]
        inner = torch.full(shape, torch.nan, device=DEVICE)[tuple(slice(1, n + 1) for n in x.shape)]
        return inner.copy_(x)

    case = make(num_rows, widths)
    options = {name: v.float() if torch.is_tensor(v) else v for name, v in case.options.items()}
    results = []
    for place in (torch.clone, buried):
        leaves = [place(x.float()).requires_grad_() for x in case.tensors]
        pairs = list(zip(leaves[2::2], leaves[3::2], strict=True))
        given = {name: place(v) if torch.is_tensor(v) else v for name, v in options.items()}
        outputs = preference_head_loss(
            leaves[0], case.anchors, pairs, case.edges, norm_weight=leaves[1], impl="triton", **given
        )
        upstream = [place(u.float()) for u in (case.upstream_loss, case.upstream_rewards)]
        results.append((*outputs, *torch.autograd.grad(outputs, leaves, upstream)))
    assert same(*results)


@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("widths", [(24, 20), (24,)], ids=["two layers", "one layer"])
@pytest.mark.parametrize("num_rows", [2, 5, 70])
def test_a_row_that_no_anchor_names_has_no_say(widths, num_rows, value):
    """Blocks of rows reach past the last one; what they read there, if only to multiply it by 0, must be live."""
    case = make(num_rows, widths)
    case.anchors = 1 + case.anchors % (case.tensors[0].shape[0] - 1)
    case.tensors[0][0] = value
    check(case, torch.float32)


def test_expanded_upstream_gradients():
    """The gradient of a sum has stride 0: its one element must not be read as a whole row."""
    for num_rows, widths in ((7, (33, 20)), (70, (33, 20)), (7, (33,))):
        case = make(num_rows, widths)
        case.upstream_rewards = torch.tensor(0.7, device=DEVICE)
        check(case, torch.float32)
        gradients = []
        for upstream in (torch.ones(num_rows, device=DEVICE), torch.ones((), device=DEVICE).expand(num_rows)):
            leaves = [x.float().requires_grad_() for x in case.tensors]
            pairs = list(zip(leaves[2::2], leaves[3::2], strict=True))
            rewards = reward_head(leaves[0], case.anchors, pairs, norm_weight=leaves[1], impl="triton")
            gradients.append(torch.autograd.grad(rewards, leaves, upstream))
        assert same(*gradients)


def test_offsets_beyond_32_bits():
    """Rows 2^29 elements apart."""
    need_memory(16)
    for widths, anchors in itertools.product([(24, 20), (24,)], [True, False]):
        case = make(7, widths, torch.float16, anchors=anchors)
        expected = case.run("triton", torch.float16)
        far = torch.empty(case.tensors[0].shape[0] << 29, dtype=torch.float16, device=DEVICE)
        spread = far.as_strided(case.tensors[0].shape, (1 << 29, 1)).copy_(case.tensors[0])
        ours = case.run("triton", torch.float16, layout=lambda hidden, spread=spread: _Follow.apply(hidden, spread))
        assert same(ours, expected)


class _Follow(torch.autograd.Function):
    """`spread`, with its gradient going to `hidden`."""

    @staticmethod
    def forward(ctx, hidden, spread):
        return spread.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def test_large_offsets_into_the_weight():
    need_memory(12)
    case = make(5, (24, 20))
    far = torch.empty(20 << 27, device=DEVICE)
    weight = case.tensors[2].float()
    spread = far.as_strided(weight.shape, (1 << 27, 1)).copy_(weight)
    hidden, norm, _, bias, last, last_bias = (x.float() for x in case.tensors)
    for given in (hidden, hidden.repeat(20, 1)):
        found = []
        for first in (weight, spread):
            rows = given.clone().requires_grad_()
            rewards = reward_head(rows, None, [(first, bias), (last, last_bias)], norm_weight=norm, impl="triton")
            found.append((rewards, *torch.autograd.grad(rewards.square().sum(), rows)))
        assert same(*found)


def test_many_features_of_few_columns():
    """One program has all columns; it must not take all 17,000 features of the small vectors at once."""
    case = make(40, (16, 17_000))
    assert close(case.run("triton", torch.float32), case.run("eager", torch.float64), 1e-5)


# --- the loss -----------------------------------------------------------------------------------


def loss_and_gradient(rewards, edges, impl, dtype, **options):
    leaf = rewards.to(dtype).requires_grad_()
    loss = preference_loss(leaf, edges, impl=impl, **options)
    return loss, *torch.autograd.grad(loss, leaf, torch.full_like(loss, 1.7))


@pytest.mark.parametrize("num_edges", [0, 1, 65])
@pytest.mark.parametrize("num_rewards", [1, 2, 5, 64, 65, 130])
def test_loss_with_every_option(num_rewards, num_edges):
    """Several draws together: on two numbers alone eager code may be exact by luck."""
    torch.manual_seed(num_edges)
    names = ("margin", "weight", "label_smoothing", "center", "lengths")
    for chosen in ((), names, *((name,) for name in names)):
        results = {"truth": [], "eager": [], "triton": []}
        for _ in range(4):
            rewards = torch.randn(num_rewards, device=DEVICE).double() * 3
            edges = torch.randint(0, num_rewards, (num_edges, 2), device=DEVICE)
            lengths = torch.randint(1, 900, (num_rewards,), device=DEVICE)
            margin, weight = torch.randn(num_edges, device=DEVICE), torch.rand(num_edges, device=DEVICE)
            every = dict(zip(names, (margin, weight, 0.2, 0.05, lengths), strict=True))
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


def test_loss_in_its_own_launch_equals_the_fused_one(monkeypatch):
    case = make(40, (24, 20), edges=150, lengths=torch.randint(1, 50, (40,), device=DEVICE))
    fused = case.run("triton", torch.float32)
    monkeypatch.setattr(autograd, "FUSED_EDGES", 0)
    assert same(case.run("triton", torch.float32), fused)


def test_many_rewards_and_edges():
    check(make(300, (24, 20), edges=1500), torch.float32)


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


# --- what is written ----------------------------------------------------------------------------


class Guarded(TorchDispatchMode):
    """Fresh memory is full of NaN and lies between canaries."""

    NEW = (torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default)
    CANARY = 123.0

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in self.NEW and out.is_floating_point():
            flat = torch.full((out.numel() + 32,), self.CANARY, dtype=out.dtype, device=out.device)
            out = flat[16:-16].fill_(torch.nan).view(out.shape)
            self.made.append((flat, out))
        return out

    def check(self):
        for flat, inner in self.made:
            assert torch.isfinite(inner).all(), f"not written: {int(inner.isnan().sum())} of {tuple(inner.shape)}"
            inner.fill_(self.CANARY)
            assert (flat == self.CANARY).all(), f"written outside of {tuple(inner.shape)}"


@pytest.mark.parametrize("num_rows", [1, 7, 16, 63, 65, 130])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_everything_is_written_and_nothing_else(num_rows, norm):
    from fastrm_kernels.preference_head.triton_backward import launch_reward_head_bwd
    from fastrm_kernels.preference_head.triton_forward import launch_reward_head_fwd
    from fastrm_kernels.preference_head.triton_linear import launch_linear_head_bwd, launch_linear_head_fwd

    case = make(num_rows, (67, 45), norm=norm, lengths=torch.ones(num_rows, device=DEVICE))
    hidden, norm_weight, *layers = (None if x is None else x.float() for x in case.tensors)
    loss = [case.edges, *(case.options[name] for name in ("margin", "weight", "lengths", "label_smoothing", "center"))]
    loss[1:4] = [x.float() for x in loss[1:4]]
    with Guarded() as memory:
        rewards, *saved, _, slopes = launch_reward_head_fwd(
            hidden, case.anchors, norm_weight, 1e-6, *layers, "silu", True, loss if num_rows <= 128 else None
        )
        upstream = (torch.ones((), device=DEVICE), slopes) if num_rows <= 128 else (None, None)
        launch_reward_head_bwd(*upstream, rewards, hidden, case.anchors, norm_weight, *layers, *saved, [True] * 6)
        linear = layers[0][:1], layers[1][:1]
        rewards, *saved = launch_linear_head_fwd(hidden, case.anchors, norm_weight, 1e-6, *linear, True)
        launch_linear_head_bwd(rewards, hidden, case.anchors, norm_weight, *linear, *saved, [True] * 4)
    assert len(memory.made) > 15
    memory.check()


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


# --- order and isolation ------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [7, 70])
@pytest.mark.parametrize("widths", [(40, 33), (40,)], ids=["two layers", "one layer"])
def test_runs_repeat_bitwise_and_rows_are_isolated(widths, num_rows):
    case = make(num_rows, widths, anchors=False)
    first = case.run("triton", torch.float32)
    for _ in range(2):
        assert equal(case.run("triton", torch.float32), first)
    case.tensors[0][3] = 17.0
    changed = case.run("triton", torch.float32)[1]
    same = changed == first[1]
    assert not same[3] and same.sum() == num_rows - 1


def test_repeated_anchors_add_up():
    case = make(6, (24, 20))
    case.anchors = torch.tensor([2, 0, 2, 2, 5, 2], device=DEVICE)
    check(case, torch.float32)
    gradient = case.run("triton", torch.float32)[2]
    assert gradient.any(1).tolist() == [True, False, True, False, False, True]


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


# --- torch --------------------------------------------------------------------------------------


def test_operators_pass_torchs_checks():
    case = make(5, (24, 20))
    hidden, norm, *layers = (x.float().requires_grad_() for x in case.tensors)
    loss = case.edges, case.options["margin"].float(), case.options["weight"].float(), None, 0.1, 0.01
    ops, anchors = torch.ops.fastrm, case.anchors
    head = hidden, anchors, norm, 1e-6, *layers, "silu", True
    linear = hidden, anchors, norm, 1e-6, layers[0][:1].detach().requires_grad_(), None, True
    with torch.no_grad():
        plain = [x.detach() for x in layers]
        _, *saved = ops.reward_head(hidden, anchors, norm, 1e-6, *plain, "silu", True)
        _, *linear_saved = ops.linear_head(*linear)
    rewards = torch.randn(5, device=DEVICE, requires_grad=True)
    backward = hidden.detach(), anchors, norm.detach()
    calls = {
        ops.reward_head: head,
        ops.reward_head_loss: (*head, *loss),
        ops.reward_head_backward: (None, None, rewards.detach(), *backward, *plain, *saved, [True, False] * 3),
        ops.linear_head: linear,
        ops.linear_head_backward: (
            rewards.detach(), *backward, linear[4].detach(), None, *linear_saved, [True, True, True, False],
        ),
        ops.preference_loss: (rewards, *loss),
        ops.preference_loss_backward: (torch.ones((), device=DEVICE), rewards.detach(), rewards.detach()),
        ops.take_rows: (hidden, anchors),
        ops.dense_rows: (torch.randn(5, 24, device=DEVICE), anchors, 9),
    }  # fmt: skip
    for operator, arguments in calls.items():
        torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize("widths", [(24, 20), (24,), (24, 20, 12)], ids=["two", "one", "three"])
def test_compiles_as_one_graph(widths):
    torch._dynamo.reset()
    case = make(5, widths)
    hidden, norm, *layers = (x.float() for x in case.tensors)
    options = {n: v.float() if torch.is_tensor(v) else v for n, v in case.options.items()}

    def function(hidden, norm, *layers):
        pairs = list(zip(layers[::2], layers[1::2], strict=True))
        loss, rewards = preference_head_loss(
            hidden, case.anchors, pairs, case.edges, norm_weight=norm, impl="triton", **options
        )
        more = reward_head(hidden, case.anchors, pairs, impl="triton")
        return loss + preference_loss(more, case.edges, impl="triton"), rewards

    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (hidden, norm, *layers)]
        loss, rewards = run(*leaves)
        results.append((loss, rewards, *torch.autograd.grad(loss + rewards.sum(), leaves)))
    assert equal(*results)


def test_launches_can_be_recorded_without_data():
    from fastrm_kernels.preference_head.triton_forward import launch_reward_head_fwd

    def meta(*shape):
        return torch.empty(shape, device="meta", dtype=torch.bfloat16)

    with record_launches() as launches:
        launch_reward_head_fwd(
            meta(9, 64), torch.empty(3, dtype=torch.int64, device="meta"), meta(64), 1e-6, meta(32, 64), None,
            meta(1, 32), None, "silu", True, None,
        )  # fmt: skip
    assert [launch.kernel.__name__ for launch in launches] == ["head_fwd_kernel", "head_finish_kernel"]


def test_importing_the_package_imports_no_triton():
    code = "import sys, fastrm_kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# --- errors -------------------------------------------------------------------------------------


def test_what_triton_cannot_do_is_said():
    case = make(3, (8, 4), edges=2)
    hidden, _, *layers = case.tensors
    pairs = [(layers[0], layers[1]), (layers[2], layers[3])]
    wanted = "preference_head with impl='triton': got torch.float64, wanted float16, bfloat16 or float32; pass impl='e"
    with pytest.raises(ValueError, match=wanted):
        reward_head(hidden, case.anchors, pairs, impl="triton")
    with pytest.raises(ValueError, match=r"preference_loss with impl='triton': got torch\.float64"):
        preference_loss(torch.zeros(2, dtype=torch.float64, device=DEVICE), case.edges, impl="triton")
    margin = torch.zeros(1, device=DEVICE, requires_grad=True)
    edges = torch.tensor([[0, 1]], device=DEVICE)
    with pytest.raises(ValueError, match=r"triton': margin: got a tensor that requires grad, .* pass margin.detach\("):
        preference_loss(torch.zeros(2, device=DEVICE), edges, margin=margin, impl="triton")
    with torch.no_grad():
        preference_loss(torch.zeros(2, device=DEVICE), edges, margin=margin, impl="triton")


@pytest.mark.parametrize("widths", [(24, 20), (24,), (24, 20, 12)], ids=["two", "one", "three"])
def test_second_derivatives_raise(widths):
    """With create_graph, rather than that they are silently zero."""
    case = make(5, widths)
    hidden, norm, *layers = (x.float().requires_grad_() for x in case.tensors)
    pairs = list(zip(layers[::2], layers[1::2], strict=True))
    rewards = torch.randn(5, device=DEVICE, requires_grad=True)
    head = hidden, case.anchors, pairs
    cases = {
        "head": (reward_head(*head, norm_weight=norm, impl="triton").square().sum(), layers[-2]),
        "both": (preference_head_loss(*head, case.edges, impl="triton")[0], hidden),
        "loss": (preference_loss(rewards, case.edges, impl="triton"), rewards),
    }
    for name, (output, leaf) in cases.items():
        gradient = torch.autograd.grad(output, leaf, create_graph=True)[0]
        assert gradient.requires_grad, name
        with pytest.raises(RuntimeError, match=r"backward through fastrm\.\w+\.default but no autograd formula"):
            torch.autograd.grad(gradient.square().sum(), leaf)


@pytest.fixture
def triton_is_faster(monkeypatch):
    """As if both operations had been measured here, in Triton's favour."""
    name = dispatch._device_name(torch.zeros((), device=DEVICE).device)
    for op in ("preference_head", "preference_loss"):
        monkeypatch.setitem(dispatch.MEASURED, (op, name, torch.float32), "triton")


@pytest.mark.parametrize("name", ["margin", "weight", "lengths"])
def test_auto_is_eager_for_what_triton_has_no_gradient_of(name, triton_is_faster):
    case = make(4, (24, 20), edges=4)
    rewards = torch.randn(4, device=DEVICE, requires_grad=True)
    option = (1.0 + torch.rand(4, device=DEVICE)).requires_grad_()
    hidden, norm, *layers = (x.float() for x in case.tensors)
    head = hidden, case.anchors, [layers[:2], layers[2:]], case.edges
    gradients = []
    for impl in ("eager", "auto"):
        alone = preference_loss(rewards, case.edges, **{name: option}, impl=impl)
        both = preference_head_loss(*head, norm_weight=norm, **{name: option}, impl=impl)[0]
        gradients.append(torch.autograd.grad(alone + both, [rewards, option]))
    assert gradients[0][1].any() and close(*gradients, 1e-5)
    for call in (
        lambda: preference_loss(rewards, case.edges, **{name: option}, impl="triton"),
        lambda: preference_head_loss(*head, **{name: option}, impl="triton"),
    ):
        with pytest.raises(ValueError, match=f"{name}: got a tensor that requires grad, .* pass {name}.detach"):
            call()
    assert "fastrm" in preference_loss(rewards, case.edges, impl="auto").grad_fn.name()


@pytest.mark.parametrize("widths", [(24, 20), (24, 20, 12)], ids=["two", "three"])
def test_auto_is_eager_for_more_rows_than_a_grid_holds(widths, triton_is_faster, monkeypatch):
    monkeypatch.setattr(autograd, "MAX_ROWS", 6)
    case = make(7, widths)
    assert equal(case.run("auto", torch.float32), case.run("eager", torch.float32))
    with pytest.raises(ValueError, match="got 7 rows, wanted at most 6; pass them in parts, or impl='eager'"):
        case.run("triton", torch.float32)


def test_edges_on_another_device_are_refused():
    edges = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=f"edges: got a tensor on meta, wanted {DEVICE}.*; pass edges.to"):
        preference_loss(torch.zeros(2, device=DEVICE), edges, impl="triton")


# --- a GPU alone --------------------------------------------------------------------------------


@pytest.mark.gpu
def test_auto_is_eager_for_edges_on_the_cpu(triton_is_faster):
    """Which eager code accepts."""
    rewards, edges = torch.randn(4, device=DEVICE), torch.tensor([[0, 1], [3, 2]])
    assert torch.equal(preference_loss(rewards, edges), preference_loss(rewards, edges, impl="eager"))


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [7, 70, 300])
@pytest.mark.parametrize("widths", [(200, 96), (200,)], ids=["two layers", "one layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_hundred_runs_are_bitwise_equal(widths, num_rows, dtype):
    """Programs run in any order, and anchors repeat."""
    case = make(num_rows, widths, dtype, edges=2000)
    first = case.run("triton", dtype)
    for _ in range(100):
        assert equal(case.run("triton", dtype), first)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [7, 70, 300])
@pytest.mark.parametrize("widths", [(40, 33), (40,), (40, 33, 24)], ids=["two", "one", "three"])
def test_a_cuda_graph_replays_forward_and_backward_bitwise(widths, num_rows):
    cases = [make(num_rows, widths, seed=seed) for seed in (0, 1)]
    inputs = [[x.float() for x in case.tensors] for case in cases]
    leaves = [x.clone().requires_grad_() for x in inputs[0]]
    anchors, edges = cases[0].anchors.clone(), cases[0].edges.clone()
    upstream = [cases[0].upstream_loss.float(), cases[0].upstream_rewards.float()]

    def step():
        pairs = list(zip(leaves[2::2], leaves[3::2], strict=True))
        outputs = preference_head_loss(
            leaves[0], anchors, pairs, edges, norm_weight=leaves[1], center=0.01, impl="triton"
        )
        return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, upstream)]

    def fill(case, values):
        with torch.no_grad():
            for leaf, value in zip(leaves, values, strict=True):
                leaf.copy_(value)
        anchors.copy_(case.anchors)
        edges.copy_(case.edges)

    # Captured after a run on another stream, which compiles the kernels.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for case, values in zip(cases, inputs, strict=True):
        fill(case, values)
        expected = step()
        for x in captured:
            x.fill_(torch.nan)
        graph.replay()
        assert equal(captured, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("widths", [(40, 33), (40,), (40, 33, 24)], ids=["two", "one", "three"])
def test_tensors_need_not_be_on_the_current_device(widths, monkeypatch):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    monkeypatch.setitem(globals(), "DEVICE", "cuda:1")
    with torch.cuda.device(0):
        for num_rows in (7, 70):
            check(make(num_rows, widths), torch.float32)
        assert torch.cuda.current_device() == 0
