"""The Triton kernels of the preference head: what memory they read and write, and that runs repeat bitwise."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastrm_kernels.preference_head import preference_head_loss, reward_head
from kernel_cases.far_memory import spread_out
from kernel_cases.heads import DEVICE, check, close, equal, make, same


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
    """The last of the rows lies beyond element 2^31."""
    for widths, anchors in itertools.product([(24, 20), (24,)], [True, False]):
        case = make(7, widths, torch.float16, anchors=anchors)
        expected = case.run("triton", torch.float16)
        with spread_out(case.tensors[0].half()) as spread:
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
    case = make(5, (24, 20))
    hidden, norm, weight, bias, last, last_bias = (x.half() for x in case.tensors)
    with spread_out(weight) as spread:
        for given in (hidden, hidden.repeat(20, 1)):
            found = []
            for first in (weight, spread):
                rows = given.clone().requires_grad_()
                rewards = reward_head(rows, None, [(first, bias), (last, last_bias)], norm_weight=norm, impl="triton")
                found.append((rewards, *torch.autograd.grad(rewards.square().sum(), rows)))
            assert same(*found)


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
    loss.append("sum")
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
