"""Preference heads with random inputs, and how results are compared, for the tests of the head's Triton kernels."""

import itertools
from dataclasses import dataclass, field

import torch

from fastrm_kernels.preference_head import preference_head_loss, preference_loss
from kernel_cases.precision import assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
