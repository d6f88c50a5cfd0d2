"""tree_attention against its dense specification, and the layout against a definition of its own."""

import inspect
import random

import pytest
import torch

from fastrm_kernels import TreeLayout, tree_attention
from fastrm_kernels.tree_attention.reference import tree_attention_reference, visible
from fastrm_kernels.tree_attention.tiles import _tile_list
from fastrm_kernels.tree_attention.varlen import varlen_arguments, varlen_options

CASES = 40


def random_tree(rng, max_segments=40, max_depth=4):
    """Lengths and parents of segments in depth-first order."""
    lengths, parents, path = [], [], []
    for segment in range(rng.randint(1, max_segments)):
        while path and (len(path) >= max_depth or rng.random() < 0.45):
            path.pop()
        parents.append(path[-1] if path else -1)
        lengths.append(rng.choice([0, 1, 2, 3, 17, 40, rng.randint(1, 80)]))
        path.append(segment)
    return lengths, parents


def visible_by_definition(lengths, parents):
    owner = [s for s, length in enumerate(lengths) for _ in range(length)]

    def ancestors(segment):
        return {segment} | (ancestors(parents[segment]) if parents[segment] >= 0 else set())

    above = [ancestors(segment) for segment in range(len(lengths))]
    rows = [[owner[j] in above[owner[i]] and j <= i for j in range(len(owner))] for i in range(len(owner))]
    return torch.tensor(rows, dtype=torch.bool).view(len(owner), len(owner))


def random_qkv(total, queries=None, heads=4, kv_heads=2, width=16, dtype=torch.float64):
    shapes = [(queries or total, heads, width), (total, kv_heads, width), (total, kv_heads, width)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def test_layout_equals_the_definition_on_random_trees():
    rng = random.Random(0)
    for _ in range(CASES):
        lengths, parents = random_tree(rng)
        layout = TreeLayout.build(lengths, parents)
        assert torch.equal(visible(layout), visible_by_definition(lengths, parents)), (lengths, parents)


def test_a_pair_needs_one_copy_of_the_prefix_only():
    layout = TreeLayout.build([10, 4, 3], [-1, 0, 0])
    assert layout.query_lengths == (14, 3)
    assert layout.key_lengths == (14, 13)
    assert layout.key_index.tolist() == [*range(14), *range(10), 14, 15, 16]
    assert TreeLayout.build([10, 4], [-1, 0]).key_index is None


def test_a_layout_beyond_32_bits_is_refused_before_anything_is_allocated():
    most = 2**31 - 1
    assert TreeLayout.build([most], [-1]).cu_seqlens_k.tolist() == [0, most]
    # Keys that all runs read together: a prefix of 2^20 tokens counts for each of its responses.
    for lengths, parents in [([2**30, 2**30], [-1, -1]), ([2**20, *[1] * 2048], [-1, *[0] * 2048])]:
        with pytest.raises(ValueError, match=r"wanted at most 2,147,483,647 of each: use smaller packs"):
            TreeLayout.build(lengths, parents)
    with pytest.raises(ValueError, match=r"keys of 2,048 runs"):
        TreeLayout.build([2**20], [-1]).at_rows([2**20 - 1] * 2048)


def test_more_steps_of_tiles_than_32_bits_reach_are_refused_before_they_are_made():
    seen = [(((0, 2**25),), ())] * 1024
    with pytest.raises(ValueError, match=r"take 1,073,741,824 steps, wanted at most 1,073,741,823"):
        _tile_list([(row, row + 1) for row in range(1024)], seen, 32)


def test_eager_equals_the_reference_forward_and_backward():
    torch.manual_seed(0)
    rng = random.Random(1)
    for case in range(CASES):
        lengths, parents = random_tree(rng, max_segments=20)
        layout = TreeLayout.build(lengths, parents)
        if layout.num_keys == 0:
            continue
        inputs = random_qkv(layout.num_keys, heads=rng.choice([2, 4]))
        causal = case % 4 > 0
        if not causal:
            layout = TreeLayout.from_lengths(lengths)
        ours = tree_attention(*inputs, layout, causal=causal, impl="eager")
        truth = tree_attention_reference(*inputs, layout, causal=causal)
        upstream = torch.randn(1, *ours.shape[1:], dtype=ours.dtype).expand_as(ours)  # zero stride
        got = torch.autograd.grad(ours, inputs, upstream)
        want = torch.autograd.grad(truth, inputs, upstream)
        for a, b in zip((ours, *got), (truth, *want), strict=True):
            assert torch.isfinite(a).all()
            assert (a - b).abs().max() <= 1e-12, (lengths, parents)


def test_at_rows_equals_the_rows_of_the_full_layout():
    torch.manual_seed(0)
    rng = random.Random(2)
    for _ in range(CASES):
        layout = TreeLayout.build(*random_tree(rng, max_segments=12))
        if layout.num_keys == 0:
            continue
        query, key, value = random_qkv(layout.num_keys)
        rows = torch.randint(0, layout.num_keys, (6,))
        full = tree_attention(query, key, value, layout)
        pruned = tree_attention(query[rows], key, value, layout.at_rows(rows))
        assert (pruned - full[rows]).abs().max() <= 1e-12


def test_many_windows_cost_few_calls(monkeypatch):
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs),
    )
    layout = TreeLayout.from_lengths([64] * 50 + [16] * 30 + [32] * 20)
    tree_attention(*random_qkv(layout.num_keys), layout, causal=False)
    assert len(calls) <= 3


def test_eager_is_deterministic():
    torch.manual_seed(0)
    layout = TreeLayout.build([200, 30, 40, 50], [-1, 0, 0, 0])
    inputs = random_qkv(layout.num_keys, dtype=torch.float32)
    runs = []
    for _ in range(5):
        output = tree_attention(*inputs, layout)
        runs.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v: (q[:-1], k, v), "got 9 query and 10 key rows, the layout has 10 and 10"),
        (lambda q, k, v: (q, k, v[:, :1]), "H a multiple of Hkv"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    inputs = change(*random_qkv(10))
    with pytest.raises(ValueError, match=message):
        tree_attention(*inputs, TreeLayout.from_lengths([10]))


def test_an_explicit_implementation_never_falls_back():
    layout = TreeLayout.from_lengths([10])
    with pytest.raises(ValueError, match="wanted float16 or bfloat16 on cuda"):
        tree_attention(*random_qkv(10), layout, impl="varlen")
    with pytest.raises(ValueError, match="got 'flash', wanted auto or one of triton, eager, varlen"):
        tree_attention(*random_qkv(10), layout, impl="flash")


def test_a_parent_after_its_child_is_refused():
    with pytest.raises(ValueError, match="segment 0: got length 3 and parent 1"):
        TreeLayout.build([3, 2], [1, -1])


def test_the_call_of_varlen_fits_the_torch_that_is_installed():
    from torch.nn.attention.varlen import varlen_attn

    layout = TreeLayout.build([10, 4, 3], [-1, 0, 0])
    arguments = varlen_arguments(*random_qkv(17), layout)
    bound = inspect.signature(varlen_attn).bind(*arguments, **varlen_options(4, 2, 0.5, True))
    assert bound.arguments["window_size"] == (-1, 0) and bound.arguments["scale"] == 0.5


@pytest.mark.gpu
def test_varlen_stays_within_twice_the_eager_error_on_cuda():
    torch.manual_seed(0)
    rng = random.Random(3)
    for _ in range(10):
        layout = TreeLayout.build(*random_tree(rng, max_segments=12), device="cuda")
        truth_inputs = [x.detach().cuda().requires_grad_() for x in random_qkv(layout.num_keys, width=64)]
        inputs = [x.detach().bfloat16().requires_grad_() for x in truth_inputs]
        truth = tree_attention_reference(*truth_inputs, layout)
        upstream = torch.randn_like(truth)
        want = (truth, *torch.autograd.grad(truth, truth_inputs, upstream))
        errors = {}
        for impl in ("eager", "varlen"):
            output = tree_attention(*inputs, layout, impl=impl)
            got = (output, *torch.autograd.grad(output, inputs, upstream.bfloat16()))
            errors[impl] = [(a.double() - b).abs().max().item() for a, b in zip(got, want, strict=True)]
        for ours, theirs in zip(errors["varlen"], errors["eager"], strict=True):
            assert ours <= 2 * theirs + 2**-7
