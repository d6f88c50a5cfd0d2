"""The Triton kernels of tree attention: values and every gradient against float64.

Without a GPU they run in Triton's interpreter, which cannot multiply bfloat16: those cases are for the
GPU marker.
"""

import itertools
import random
from functools import partial

import pytest
import torch

from fastrm_kernels import tree_attention
from fastrm_kernels.tree_attention import tiles
from fastrm_kernels.tree_attention.reference import tree_attention_reference
from fastrm_kernels.tree_attention.tiles import build_work_lists, work_lists
from kernel_cases.far_memory import spread_out
from kernel_cases.precision import assert_within_budget
from kernel_cases.trees import DEVICE, SMALL, flat, random_tree, shuffled_tree, tree

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
NAMES = ("output", "query gradient", "key gradient", "value gradient")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def small_blocks(monkeypatch):
    """Many tiles and steps from few tokens."""
    monkeypatch.setattr(tiles, "pick_blocks", lambda *_: SMALL)


def inputs(layout, heads=2, kv_heads=1, width=16, dtype=torch.float32):
    """Values that `dtype` holds exactly, in float64."""
    shapes = [
        (layout.num_queries, heads, width),
        (layout.num_keys, kv_heads, width),
        (layout.num_keys, kv_heads, width),
    ]
    return [torch.randn(shape, device=DEVICE).to(dtype).double().requires_grad_() for shape in shapes]


def forward_and_gradients(function, arguments, upstream):
    output = function(*arguments)
    return (output, *torch.autograd.grad(output, arguments, upstream))


def check(layout, dtype, *, causal=True, heads=2, kv_heads=1, width=16, scale=None):
    """Kernel against eager of the same dtype, and both against the reference in float64."""
    exact = inputs(layout, heads, kv_heads, width, dtype)
    upstream = torch.randn(layout.num_queries, heads, width, device=DEVICE).to(dtype)
    truth = forward_and_gradients(
        lambda *x: tree_attention_reference(*x, layout, causal=causal, scale=scale), exact, upstream.double()
    )
    results = {}
    for impl in ("eager", "triton"):
        rounded = [x.detach().to(dtype).requires_grad_() for x in exact]
        results[impl] = forward_and_gradients(
            lambda *x, impl=impl: tree_attention(*x, layout, causal=causal, scale=scale, impl=impl), rounded, upstream
        )
        assert all(x.dtype == dtype for x in results[impl])
    assert_within_budget(NAMES, results["triton"], results["eager"], truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 80, 96, 128])
def test_head_dimensions(width, dtype):
    torch.manual_seed(width)
    check(tree([65, 20, 9, 1], [-1, 0, 0, 2]), dtype, width=width)
    check(flat([30, 64, 7]), dtype, width=width, causal=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 1), (6, 2), (3, 3)])
def test_grouped_queries(heads, kv_heads, dtype):
    torch.manual_seed(heads)
    check(tree([40, 20, 30], [-1, 0, 0]), dtype, heads=heads, kv_heads=kv_heads, scale=0.3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_trees(dtype, small_blocks):
    rng = random.Random(0)
    for case in range(12):
        layout = tree(*(shuffled_tree(rng) if case % 3 == 0 else random_tree(rng, max_segments=10)))
        check(layout, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_segments_in_real_blocks(dtype):
    check(tree([300, 90, 1, 129, 64, 40, 40], [-1, 0, 0, 2, -1, 4, 4]), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_large_random_trees(seed):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    lengths, parents = random_tree(rng)
    lengths = [rng.randint(1, 300) for _ in lengths]
    check(tree(lengths, parents), rng.choice([torch.float32, torch.float16]), width=64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chosen_rows(dtype):
    layout = tree([70, 20, 33, 5, 90, 6], [-1, 0, 0, -1, 3, 3])
    check(layout.at_rows([122, 89, 127, 0, 222, 223]), dtype, width=64)


@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
def test_nothing(lengths):
    check(tree(lengths, [-1] * len(lengths)), torch.float32)


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1]], ids=str)
def test_single_tokens_return_their_values(lengths):
    layout = flat(lengths)
    arguments = [x.detach().float().requires_grad_() for x in inputs(layout)]
    upstream = torch.randn(layout.num_queries, 2, 16, device=DEVICE)
    output, query_grad, key_grad, value_grad = forward_and_gradients(
        lambda *x: tree_attention(*x, layout, impl="triton"), arguments, upstream
    )
    assert torch.equal(output, arguments[2].expand_as(output))
    assert torch.equal(value_grad, upstream.sum(1, keepdim=True))
    # Zero but for the rounding of two sums of 16 products, which a budget of zero would not allow.
    assert max(query_grad.abs().max(), key_grad.abs().max()) <= 1e-5


def test_keys_that_nobody_sees_get_zero_gradients():
    layout = tree([10, 10], [-1, -1]).at_rows([3])
    arguments = [x.detach().float().requires_grad_() for x in inputs(layout)]
    output = tree_attention(*arguments, layout, impl="triton")
    _, key_grad, value_grad = torch.autograd.grad(output.sum(), arguments)
    assert value_grad[:4].abs().min() > 0
    assert not key_grad[4:].any() and not value_grad[4:].any()


def test_large_scores_do_not_overflow():
    """Scores of thousands: the softmax is one key. The budget would compare two roundings of that size."""
    layout = tree([20, 5, 5], [-1, 0, 0])
    exact = inputs(layout)
    upstream = torch.randn(30, 2, 16, dtype=torch.float64, device=DEVICE)
    truth = forward_and_gradients(lambda *x: tree_attention_reference(*x, layout, scale=300.0), exact, upstream)
    rounded = [x.detach().float().requires_grad_() for x in exact]
    ours = forward_and_gradients(
        lambda *x: tree_attention(*x, layout, scale=300.0, impl="triton"), rounded, upstream.float()
    )
    for a, b in zip(ours, truth, strict=True):
        assert (a - b).abs().max() <= 1e-3 * b.abs().max()


def test_every_output_element_is_written(small_blocks):
    layout = tree([37, 20, 0, 9, 3], [-1, 0, 1, 0, -1])
    torch.use_deterministic_algorithms(True)  # torch then fills fresh memory with NaN
    try:
        assert torch.empty(3).isnan().all()
        check(layout, torch.float32)
        check(layout.at_rows([50, 3]), torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("width", [16, 80])
def test_nothing_is_written_outside(width, small_blocks):
    from fastrm_kernels.tree_attention.triton_backward import (
        launch_tree_attention_bwd_key_value,
        launch_tree_attention_bwd_query,
    )
    from fastrm_kernels.tree_attention.triton_forward import launch_tree_attention_fwd

    layout = tree([37, 20, 9], [-1, 0, 0])
    work = work_lists(layout, SMALL, True)
    query, key, value = (x.detach().float() for x in inputs(layout, width=width))
    canary = 12345.0

    def guarded(*shape):
        """A tensor inside a larger one that is full of canaries, between heads and rows too."""
        padded = torch.full([n + 2 for n in shape], canary, device=DEVICE)
        return padded, padded[tuple(slice(1, n + 1) for n in shape)]

    buffers = [guarded(*shape) for shape in (query.shape, query.shape, (2, *key.shape), (2, *value.shape))]
    output, query_grad, *key_grads = (inner for _, inner in buffers)
    flat = torch.full((2 * 66 + 10,), canary, device=DEVICE)
    lse, row_stats = flat[5:-5].view(2, 66), torch.empty(2, 66, 2, device=DEVICE)
    launch_tree_attention_fwd(query, key, value, output, lse, work, SMALL, 0.25)
    upstream = torch.randn_like(query)
    launch_tree_attention_bwd_query(query, key, value, output, upstream, lse, row_stats, query_grad, work, SMALL, 0.25)
    launch_tree_attention_bwd_key_value(query, key, value, upstream, row_stats, *key_grads, work, SMALL, 0.25)
    for padded, inner in buffers:
        assert not (inner == canary).any()
        inner.fill_(canary)
        assert (padded == canary).all()
    assert (flat[:5] == canary).all() and (flat[-5:] == canary).all()


def test_offsets_beyond_32_bits():
    """300 rows, the last of them beyond element 2^31."""
    layout = tree([250, 50], [-1, 0])
    dense = [x.detach().half() for x in inputs(layout, heads=1)]
    upstream = torch.randn(300, 1, 16, device=DEVICE).half()
    results = []
    # Query, key and value side by side in each far row.
    with spread_out(torch.cat(dense, -1)) as joined:
        for arguments in (dense, joined.detach().split(16, -1)):
            arguments = [x.requires_grad_() for x in arguments]
            results.append(
                forward_and_gradients(lambda *x: tree_attention(*x, layout, impl="triton"), arguments, upstream)
            )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_rows_too_far_apart_are_refused():
    layout = tree([2], [-1])
    far = torch.empty(2**24 + 16, dtype=torch.float16, device=DEVICE).as_strided((2, 1, 16), (2**24, 16, 1))
    with pytest.raises(ValueError, match="rows 16,777,216 elements apart, wanted less than 16,777,216"):
        tree_attention(far, far, far, layout, impl="triton")


def test_strided_inputs_and_expanded_gradients(small_blocks):
    layout = tree([20, 15, 9], [-1, 0, 0])
    dense = [x.detach().float() for x in inputs(layout, heads=4, kv_heads=2)]
    # Heads outermost, as transformers hands them over; columns apart; rows of a wider buffer.
    views = [
        dense[0].transpose(0, 1).contiguous().transpose(0, 1),
        dense[1].transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([dense[2], dense[2]], -1)[..., :16],
    ]
    results, row = [], torch.randn(1, 4, 16, device=DEVICE)
    for arguments in (dense, views):
        arguments = [x.requires_grad_() for x in arguments]
        output = tree_attention(*arguments, layout, impl="triton")
        for upstream in (torch.ones(1, 1, 1, device=DEVICE), row):
            results.append(torch.autograd.grad(output, arguments, upstream.expand_as(output), retain_graph=True))
    assert all(torch.equal(a, b) for n in (0, 1) for a, b in zip(results[n], results[n + 2], strict=True))


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_each_subset_of_gradients(needed, small_blocks):
    layout = tree([20, 5, 5], [-1, 0, 0])
    exact = [x.detach().float() for x in inputs(layout)]
    everything = [x.clone().requires_grad_() for x in exact]
    output = tree_attention(*everything, layout, impl="triton")
    want = torch.autograd.grad(output.square().sum(), everything)
    some = [x.clone().requires_grad_(need) for x, need in zip(exact, needed, strict=True)]
    tree_attention(*some, layout, impl="triton").square().sum().backward()
    for x, need, gradient in zip(some, needed, want, strict=True):
        assert torch.equal(x.grad, gradient) if need else x.grad is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_every_division_of_a_group_gives_the_same(parts, dtype, small_blocks, monkeypatch):
    monkeypatch.setattr(tiles.TileList, "parts_wanted", lambda *_: parts)
    check(tree([30, 20, 9], [-1, 0, 0]), dtype, heads=12, kv_heads=2)


def test_runs_repeat_bitwise_and_responses_are_isolated(small_blocks):
    layout = tree([25, 12, 7, 30], [-1, 0, 0, -1])
    arguments = [x.detach().float() for x in inputs(layout)]
    first = tree_attention(*arguments, layout, impl="triton")
    assert torch.equal(first, tree_attention(*arguments, layout, impl="triton"))
    changed = [x.clone() for x in arguments]
    for x in changed:
        x[25:37] = 100 * torch.randn_like(x[25:37])
    second = tree_attention(*changed, layout, impl="triton")
    others = [*range(25), *range(37, 74)]
    assert torch.equal(first[others], second[others])
    assert not torch.equal(first[25:37], second[25:37])


def test_operators_pass_torchs_checks(small_blocks):
    from fastrm_kernels.tree_attention.autograd import tree_attention_backward, tree_attention_forward

    layout = tree([20, 5, 5], [-1, 0, 0])
    query, key, value = (x.detach().float() for x in inputs(layout))
    lists = work_lists(layout, SMALL, True).tensors()
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    torch.library.opcheck(tree_attention_forward, (*leaves, lists, False, 2, 0.25))
    output, lse = tree_attention_forward(query, key, value, lists, False, 2, 0.25)
    torch.library.opcheck(
        tree_attention_backward, (query, key, value, output, lse, torch.randn_like(output), lists, False, 2, 0.25, True)
    )


def test_compiles_as_one_graph(small_blocks):
    compiled = torch.compile(
        lambda q, k, v, layout: 2 * tree_attention(q, k, v, layout, impl="triton"), fullgraph=True, backend="aot_eager"
    )
    for lengths in ([20, 5, 5], [30, 7, 9], [12, 50, 3]):
        layout = tree(lengths, [-1, 0, 0])
        arguments = [x.detach().float().requires_grad_() for x in inputs(layout)]
        build_work_lists(layout, torch.float32, 16)
        upstream = torch.randn(layout.num_queries, 2, 16, device=DEVICE)
        got = forward_and_gradients(lambda *x, layout=layout: compiled(*x, layout), arguments, upstream)
        want = forward_and_gradients(
            lambda *x, layout=layout: 2 * tree_attention(*x, layout, impl="triton"), arguments, upstream
        )
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_compiling_with_a_layout_without_work_lists_says_so():
    layout = tree([20, 5, 5], [-1, 0, 0])
    compiled = torch.compile(lambda *x: tree_attention(*x, layout, impl="triton"), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"call tiles\.build_work_lists"):
        compiled(*[x.detach().float() for x in inputs(layout)])


def test_what_the_kernels_cannot_do_is_said():
    layout = tree([10, 5], [-1, 0])
    with pytest.raises(
        ValueError, match="got head dimension 24, wanted one of 16, 32, 64, 80, 96, 128; pass impl='eager'"
    ):
        tree_attention(*[x.float() for x in inputs(layout, width=24)], layout, impl="triton")
    with pytest.raises(ValueError, match=r"got torch\.float64, wanted float16, bfloat16 or float32"):
        tree_attention(*inputs(layout), layout, impl="triton")
    with pytest.raises(ValueError, match="causal=False: got a tree, wanted independent sequences"):
        tree_attention(*inputs(layout), layout, causal=False)


def gpu_case():
    layout = tree([1300, 150, 150, 40, 300], [-1, 0, 0, 0, -1])
    arguments = [x.detach().bfloat16().requires_grad_() for x in inputs(layout, 28, 4, 128, torch.bfloat16)]
    return layout, arguments, torch.randn(layout.num_queries, 28, 128, device=DEVICE).bfloat16()


@pytest.mark.gpu
def test_a_hundred_runs_on_a_gpu_are_bitwise_equal():
    layout, arguments, upstream = gpu_case()
    run = partial(forward_and_gradients, lambda *x: tree_attention(*x, layout, impl="triton"), arguments, upstream)
    first = run()
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.gpu
def test_a_captured_graph_repeats_what_it_captured():
    layout, arguments, upstream = gpu_case()
    run = partial(forward_and_gradients, lambda *x: tree_attention(*x, layout, impl="triton"), arguments, upstream)
    want = run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for x in captured:
        x.detach().fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))
