"""The Triton kernels of the preference head: as operators of torch, what they refuse, and what "auto" avoids."""

import subprocess
import sys

import pytest
import torch

from fastrm_kernels import dispatch
from fastrm_kernels.launch import record_launches
from fastrm_kernels.preference_head import autograd, preference_head_loss, preference_loss, reward_head
from kernel_cases.heads import DEVICE, close, equal, make

# --- torch --------------------------------------------------------------------------------------


def test_operators_pass_torchs_checks():
    case = make(5, (24, 20))
    hidden, norm, *layers = (x.float().requires_grad_() for x in case.tensors)
    loss = case.edges, case.options["margin"].float(), case.options["weight"].float(), None, 0.1, 0.01, "sum"
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
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


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


@pytest.mark.gpu
def test_auto_is_eager_for_edges_on_the_cpu(triton_is_faster):
    """Which eager code accepts."""
    rewards, edges = torch.randn(4, device=DEVICE), torch.tensor([[0, 1], [3, 2]])
    assert torch.equal(preference_loss(rewards, edges), preference_loss(rewards, edges, impl="eager"))
