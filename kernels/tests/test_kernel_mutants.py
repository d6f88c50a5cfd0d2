"""Would the checks see a wrong kernel? Every mutant is one line changed; every one must turn a check red.

A mutant is loaded from a changed copy of its file, in the place of the real module, together with the
modules that build on it. The unchanged copy must be green: otherwise red would prove nothing.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import fastrm_kernels
from fastrm_kernels import TreeLayout, preference_head_loss, tree_attention
from fastrm_kernels.tree_attention import tiles
from fastrm_kernels.tree_attention.reference import tree_attention_reference
from fastrm_kernels.tree_attention.tiles import Blocks

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="runs in Triton's interpreter: hide the GPU with CUDA_VISIBLE_DEVICES="
)
ROOT = Path(fastrm_kernels.__file__).parent
# What must be loaded anew when a file changes: modules that import from it by name.
DEPENDENTS = {
    "tree_attention/triton_forward": ["tree_attention/triton_backward"],
    "preference_head/triton_primitives": [
        f"preference_head/triton_{name}" for name in ("loss", "forward", "backward", "linear")
    ],
    "preference_head/triton_loss": ["preference_head/triton_forward"],
}
FORWARD, BACKWARD = "tree_attention/triton_forward", "tree_attention/triton_backward"
HEAD, HEAD_BACKWARD = "preference_head/triton_forward", "preference_head/triton_backward"
LOSS, PRIMITIVES, LINEAR = (
    "preference_head/triton_loss",
    "preference_head/triton_primitives",
    "preference_head/triton_linear",
)
MUTANTS = {
    # tree attention
    "mask dropped": (FORWARD, "return (low <= rank) & (rank < high)", "return (low <= rank) & (rank < high + 1000)"),
    "mask off by one": (FORWARD, "return (low <= rank)", "return (low < rank + 2)"),
    "keys past a step's end visible": (
        FORWARD,
        "bounds = tl.load(key_bounds_ptr + rows, mask=inside, other=0)",
        "bounds = tl.load(key_bounds_ptr + rows, mask=inside, other=1000 << 32)",
    ),
    "no rescaling": (FORWARD, "acc=acc_a * decay[:, None]", "acc=acc_a"),
    "sum not rescaled": (FORWARD, "row_sum = row_sum * decay +", "row_sum = row_sum +"),
    "maximum of one step only": (
        FORWARD,
        "tl.maximum(row_max, tl.max(scores, 1) * scale_log2)",
        "tl.max(scores, 1) * scale_log2",
    ),
    "scores scaled by half": (FORWARD, "tl.exp2(scores * scale_log2 - ", "tl.exp2(scores * scale_log2 * 0.5 - "),
    "delta of the key gradient negated": (BACKWARD, "tl.store(pair_ptr + 1, delta", "tl.store(pair_ptr + 1, -delta"),
    "wrong key head": (
        FORWARD,
        "key_ptr += head // group * key_head_stride",
        "key_ptr += head % group * key_head_stride",
    ),
    "second part of the head dimension left out": (
        FORWARD,
        "scores = tl.dot(query_b, tl.trans(key_b), acc=scores",
        "tl.dot(query_b, tl.trans(key_b), acc=scores",
    ),
    "log-sum-exp without the maximum": (FORWARD, "row_max + tl.log2(total)", "tl.log2(total)"),
    "steps without mask skipped": (
        FORWARD,
        "steps_ptr, step_begin, step_masked, scale_log2",
        "steps_ptr, step_masked, step_masked, scale_log2",
    ),
    "delta dropped": (BACKWARD, "slopes = (weights * (slopes - delta[:, None]))", "slopes = (weights * slopes)"),
    "query gradient not scaled": (BACKWARD, "query_grad_stride, acc_a * scale,", "query_grad_stride, acc_a,"),
    "key gradient not scaled": (BACKWARD, "key_grad_stride, key_acc_a * scale,", "key_grad_stride, key_acc_a,"),
    "mask of the key gradient swapped": (
        BACKWARD,
        "visible(rank[None, :], low[:, None], high[:, None])",
        "visible(rank[None, :], 0 * low[:, None], high[:, None])",
    ),
    "first query heads of a group only": (
        BACKWARD,
        "head = (key_head * num_parts + part) * MEMBERS + member",
        "head = key_head * num_parts * MEMBERS + member",
    ),
    "key and value gradients swapped": (
        BACKWARD,
        "value_acc_a = tl.dot(weights, upstream_a,",
        "value_acc_a = tl.dot(slopes, upstream_a,",
    ),
    # preference head
    "anchors ignored": (
        PRIMITIVES,
        "row = tl.where((row >= 0) & (row < num_tokens), row, 0)",
        "row = offs_r.to(tl.int64)",
    ),
    "silu slope without its second term": (PRIMITIVES, "slope = s * (1.0 + z * (1.0 - s))", "slope = s"),
    "norm without epsilon": (HEAD, "tl.rsqrt(squares / width + eps)", "tl.rsqrt(squares / width)"),
    "norm's mean over one too many": (HEAD, "tl.rsqrt(squares / width + eps)", "tl.rsqrt(squares / (width + 1) + eps)"),
    "bias dropped": (HEAD, "z += load_vector(bias_ptr, offs_f, features)[:, None]", "z += 0.0"),
    "last part of the rewards left out": (HEAD, "(offs_p[:, None] < num_parts)", "(offs_p[:, None] < num_parts - 1)"),
    "slope part with the bias": (HEAD, "tl.sum(gains * pre, 0)", "tl.sum(gains * active, 0)"),
    "wrong sign of the loss": (LOSS, "gap = high - low", "gap = low - high"),
    "margin added": (LOSS, "gap -= tl.load(margin_ptr", "gap += tl.load(margin_ptr"),
    "smoothing on the wrong side": (
        LOSS,
        "slope = smoothing * right - (1.0 - smoothing) * wrong",
        "slope = -(1.0 - smoothing) * wrong",
    ),
    "centering pull on the winner only": (
        LOSS,
        "weight * (pull - slope) / low_divisor",
        "weight * (-slope) / low_divisor",
    ),
    "length factor dropped from the gradient": (
        LOSS,
        "weight * (slope + pull) / high_divisor",
        "weight * (slope + pull)",
    ),
    "not divided by the weights": (
        LOSS,
        "slopes /= total",
        "slopes /= 1.0",
    ),
    "a sum divided by the weights as well": (LOSS, 'if REDUCTION == "mean":', 'if REDUCTION != "none":'),
    "losers forgotten": (LOSS, "mine += tl.where(loser[None, :]", "mine -= tl.where(loser[None, :]"),
    "gradient through the loss only": (
        HEAD_BACKWARD,
        "total += tl.load(grad_rewards_ptr",
        "total += 0.0 * tl.load(grad_rewards_ptr",
    ),
    "norm's projection dropped": (HEAD_BACKWARD, "- n * mean[None, :])", ")"),
    "linear head: norm's projection dropped": (LINEAR, "- n * mean)", ")"),
}


def check_attention():
    """Forward and gradients of shared prefixes, grouped heads, a split head dimension."""
    torch.manual_seed(0)
    for lengths, parents, width in (([37, 20, 9, 3], [-1, 0, 0, -1], 80), ([20, 0, 30], [-1, 0, 1], 16)):
        layout = TreeLayout.build(lengths, parents)
        shapes = [(layout.num_queries, 4, width)] + 2 * [(layout.num_keys, 2, width)]
        exact = [3 * torch.randn(shape).double() for shape in shapes]
        upstream = torch.randn(shapes[0]).double()
        results = []
        for function, dtype in ((tree_attention_reference, torch.float64), (run_triton, torch.float32)):
            leaves = [x.to(dtype).requires_grad_() for x in exact]
            output = function(*leaves, layout)
            results.append((output, *torch.autograd.grad(output, leaves, upstream.to(dtype))))
        assert_close(("output", "query", "key", "value"), *results)


def run_triton(*arguments):
    return tree_attention(*arguments, impl="triton")


def assert_close(names, truth, ours):
    """To float32 rounding, generously: how small the kernels' errors are is for other tests."""
    for name, a, b in zip(names, truth, ours, strict=True):
        assert torch.isfinite(b).all(), name
        assert (a - b).abs().max() <= 1e-4 * a.abs().max(), name


def check_head():
    """Loss, rewards and gradients with every term, of a two-layer and of a linear head."""
    edges = torch.tensor([[0, 1], [2, 1], [3, 4], [0, 4], [4, 2]])
    options = {
        "activation": "silu", "norm_eps": 0.3, "label_smoothing": 0.1, "center": 0.2,
        "lengths": torch.tensor([3, 1, 40, 7, 9]),
    }  # fmt: skip
    for features in (600, None):
        torch.manual_seed(0)
        # Wide: the rewards come from more than one part, and more than one group of parts.
        layers = [(torch.randn(1, 24), torch.randn(1))]
        if features:
            layers = [
                (torch.randn(features, 24), torch.randn(features)),
                (torch.randn(1, features) / 9, torch.randn(1)),
            ]
        exact = [torch.randn(12, 24), 1 + 0.2 * torch.randn(24), *(x for layer in layers for x in layer)]
        margin, weight, reach = torch.randn(5), torch.rand(5), torch.randn(5)
        results = []
        options["reduction"] = "mean" if features else "sum"
        for impl, dtype in (("eager", torch.float64), ("triton", torch.float32)):
            leaves = [x.to(dtype).requires_grad_() for x in exact]
            hidden, norm, *flat = leaves
            loss, rewards = preference_head_loss(
                hidden, torch.tensor([3, 11, 0, 5, 3]), list(zip(flat[::2], flat[1::2], strict=True)), edges,
                norm_weight=norm, margin=margin.to(dtype), weight=weight.to(dtype), impl=impl, **options,
            )  # fmt: skip
            total = loss + (rewards * reach.to(dtype)).sum()
            results.append((loss[None], rewards, *torch.autograd.grad(total, leaves)))
        names = ("loss", "rewards", "hidden", "norm weight", *(f"parameter {n}" for n in range(len(flat))))
        assert_close(names, *results)


def load_in_place(monkeypatch, tmp_path, file, text):
    """Put `text` in the place of a module of fastrm_kernels, for this test."""
    name = "fastrm_kernels." + file.replace("/", ".")
    path = tmp_path / (Path(file).name + ".py")
    path.write_text(text)
    for dependent in DEPENDENTS.get(file, ()):
        monkeypatch.delitem(sys.modules, "fastrm_kernels." + dependent.replace("/", "."), raising=False)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory holds NaN, so that a mutant is not saved by what an earlier run left there."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(tiles, "pick_blocks", lambda *_: Blocks(16, 16, 16, 16, 4, 4, 1, 1, 1))


@pytest.fixture
def restore_modules():
    """Dependents that were loaded on top of a mutant must not outlive it."""
    before = dict(sys.modules)
    yield
    for name in [name for name in sys.modules if name.startswith("fastrm_kernels.") and name not in before]:
        del sys.modules[name]
    sys.modules.update({name: module for name, module in before.items() if name.startswith("fastrm_kernels.")})


def check_of(file):
    return check_attention if file.startswith("tree_attention") else check_head


@pytest.mark.parametrize("file", sorted({file for file, _, _ in MUTANTS.values()}))
def test_the_unchanged_copy_is_green(file, monkeypatch, tmp_path, restore_modules):
    load_in_place(monkeypatch, tmp_path, file, (ROOT / f"{file}.py").read_text())
    check_of(file)()


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_caught(mutant, monkeypatch, tmp_path, restore_modules):
    file, old, new = MUTANTS[mutant]
    text = (ROOT / f"{file}.py").read_text()
    assert text.count(old) >= 1, f"{file}.py has no such line any more: {old}"
    load_in_place(monkeypatch, tmp_path, file, text.replace(old, new, 1))
    with pytest.raises(AssertionError):
        check_of(file)()
