"""tree_attention against its dense specification, and the layout against a definition of its own."""

import gc
import importlib
import inspect
import itertools
import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastrm_kernels import TreeLayout, tree_attention
from fastrm_kernels.tree_attention.gather import take_rows
from fastrm_kernels.tree_attention.reference import tree_attention_reference, visible
from fastrm_kernels.tree_attention.tiles import _tile_list
from fastrm_kernels.tree_attention.varlen import varlen_arguments, varlen_options
from kernel_cases.trees import random_tree

# The package has a function of the folder's name.
blocks, eager = (importlib.import_module(f"fastrm_kernels.tree_attention.{name}") for name in ("blocks", "eager"))
CASES = 40


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


def any_tree(rng, count):
    """Lengths and parents of segments whose children stand anywhere behind them."""
    return [rng.choice([0, 1, 2, 17, 40]) for _ in range(count)], [rng.randint(-1, n - 1) for n in range(count)]


@pytest.mark.parametrize("way", ["flash", "formula"])
@pytest.mark.parametrize("call_products", [1, 1 << 14, 1 << 21], ids=["alone", "some_padded", "padded"])
def test_blocks_of_any_tree_and_any_rows_equal_the_reference(way, call_products, monkeypatch):
    monkeypatch.setattr(blocks, "_CALL_PRODUCTS", call_products)
    monkeypatch.setattr(eager, "_has_flash", lambda query: way == "flash")
    monkeypatch.setattr(eager, "_FORMULA_SCORES", 5000)  # some batches by several heads at once, some head by head
    torch.manual_seed(0)
    rng = random.Random(4)
    for case in range(12):
        layout = TreeLayout.build(*(any_tree(rng, 10) if case % 2 else random_tree(rng, max_segments=12)))
        if layout.num_keys == 0:
            continue
        inputs = random_qkv(layout.num_keys, heads=6, kv_heads=2, width=24)
        if case % 3 == 0:
            rows = [rng.randrange(layout.num_keys) for _ in range(20)]
            layout = layout.at_rows(rows)
            inputs[0] = inputs[0].detach()[rows].requires_grad_()
        ours, truth = (function(*inputs, layout) for function in (eager.tree_attention_eager, tree_attention_reference))
        upstream = torch.randn_like(ours)
        got, want = (torch.autograd.grad(output, inputs, upstream) for output in (ours, truth))
        for a, b in zip((ours, *got), (truth, *want), strict=True):
            assert (a - b).abs().max() <= 1e-12, (layout.lengths, layout.parents, layout.query_rows)


def batches_of(layout, causal=True, width=2048):
    return [batch for level in blocks.block_layout(layout, causal, torch.float32, width).levels for batch in level]


def test_segments_of_a_training_pack_are_read_in_place():
    # Two prompts, one with two questions: five segments and three shared ones.
    layout = TreeLayout.build([900, 200, 150, 300, 120, 700, 80, 90], [-1, 0, 1, 1, 0, -1, 5, 5])
    batches = batches_of(layout)
    assert len(batches) == len(layout.lengths) + 3
    assert all(side.index is None for batch in batches for side in (batch.queries, batch.keys))
    assert all(batch.mask is None for batch in batches)


def test_many_windows_cost_few_calls():
    windows = TreeLayout.from_lengths([64] * 50 + [16] * 30 + [32] * 20)
    batches = batches_of(windows, causal=False, width=1280)
    assert len(batches) == 3 and all(batch.queries.index is None for batch in batches)
    # 160 short segments: a few padded batches, not a call for each.
    groups = TreeLayout.build([40, 3, 4, 5] * 40, [-1, 0, 0, 0] * 40)
    groups = TreeLayout.build(groups.lengths, [p if p < 0 else 4 * (n // 4) for n, p in enumerate(groups.parents)])
    assert len(batches_of(groups, width=64)) <= 4


def test_an_only_child_continues_its_parent():
    chain = TreeLayout.build([300, 0, 200, 100], [-1, 0, 1, 2])
    assert len(batches_of(chain)) == 1


def response_rows(lengths, number):
    start = sum(lengths[:number])
    return slice(start, start + lengths[number])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("num_responses", [2, 4, 8])
def test_eager_stays_within_twice_the_error_of_stock_attention(num_responses, dtype):
    torch.manual_seed(0)
    lengths = [260, *[60 + 10 * n for n in range(num_responses)]]
    layout = TreeLayout.build(lengths, [-1, *[0] * num_responses])
    exact = random_qkv(layout.num_keys, heads=6, kv_heads=2, width=64)
    inputs = [x.detach().to(dtype).requires_grad_() for x in exact]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    upstream = torch.randn(exact[0].shape, dtype=torch.float64).to(dtype)
    ours, truth = eager.tree_attention_eager(*inputs, layout), tree_attention_reference(*exact, layout)
    got, want = (
        (output, *torch.autograd.grad(output, leaves, upstream.to(output.dtype)))
        for output, leaves in ((ours, inputs), (truth, exact))
    )
    # Stock: every response with its own copy of the prompt, whose part of the upstream gradient they share.
    stock = [torch.zeros_like(x) for x in want]
    for number in range(1, num_responses + 1):
        rows = torch.cat([torch.arange(lengths[0]), torch.arange(layout.num_keys)[response_rows(lengths, number)]])
        leaves = [x.detach()[rows].transpose(0, 1)[None].requires_grad_() for x in inputs]
        output = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
        share = upstream[rows].clone()
        share[: lengths[0]] /= num_responses
        found = torch.autograd.grad(output, leaves, share.transpose(0, 1)[None])
        stock[0][rows] = output[0].transpose(0, 1).double()
        for total, part in zip(stock[1:], found, strict=True):
            total.index_add_(0, rows, part[0].transpose(0, 1).double())
    for name, a, b, c in zip(("output", "query", "key", "value"), got, want, stock, strict=True):
        error, allowed = (a.double() - b).abs().max(), (c - b).abs().max()
        assert error <= 2 * (allowed + torch.finfo(dtype).eps * b.abs().max()), name


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("call_products", [1, 1 << 21], ids=["alone", "padded"])
def test_eager_repeats_to_the_bit(threads, call_products, monkeypatch):
    monkeypatch.setattr(blocks, "_CALL_PRODUCTS", call_products)
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            layout = TreeLayout.build([200, 30, 40, 50, 9, 8], [-1, 0, 0, 0, 3, 3])
            inputs = random_qkv(layout.num_keys, dtype=dtype)
            runs = []
            for _ in range(5):
                output = tree_attention(*inputs, layout, impl="eager")
                runs.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
            assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("call_products", [1, 1 << 21], ids=["alone", "padded"])
def test_a_response_changes_no_other_response_by_a_bit(call_products, monkeypatch):
    monkeypatch.setattr(blocks, "_CALL_PRODUCTS", call_products)
    torch.manual_seed(0)
    lengths = [200, 30, 40, 50, 20, 25]
    layout = TreeLayout.build(lengths, [-1, 0, 0, -1, 3, 3])
    inputs = [x.detach() for x in random_qkv(layout.num_keys, dtype=torch.float32)]
    first = tree_attention(*inputs, layout, impl="eager")
    rows = response_rows(lengths, 2)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[rows] = float("nan")
    second = tree_attention(*changed, layout, impl="eager")
    others = torch.ones(layout.num_keys, dtype=torch.bool)
    others[rows] = False
    assert torch.equal(first[others], second[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("at_rows", [False, True], ids=["all", "anchors"])
@pytest.mark.parametrize("width", [16, 64])
def test_other_trees_of_a_pack_change_no_bit(width, at_rows, dtype):
    torch.manual_seed(0)
    tree, parents = [77, 26, 0, 20, 9, 31], [-1, 0, 0, 0, 1, 1]
    results = []
    inputs = [x.detach() for x in random_qkv(sum(tree), width=width, dtype=dtype)]
    upstream = torch.randn(inputs[0].shape).to(dtype)
    for before, after in (([], []), ([68], [176]), ([], [1, 300]), ([20, 900, 77], [])):
        first, start = len(before), sum(before)
        roots = [-1] * len(before)
        layout = TreeLayout.build(
            [*before, *tree, *after], [*roots, *[p if p < 0 else p + first for p in parents], *[-1] * len(after)]
        )
        rows = slice(start, start + sum(tree))
        leaves = [torch.randn(layout.num_keys, *x.shape[1:]).to(dtype) for x in inputs]
        above = torch.randn(leaves[0].shape).to(dtype)
        for whole, own in zip((*leaves, above), (*inputs, upstream), strict=True):
            whole[rows] = own
        leaves = [x.requires_grad_() for x in leaves]
        query = leaves[0]
        if at_rows:
            anchors = [*range(start), *(start + n for n in (102, 131, 162)), *range(rows.stop, layout.num_keys)]
            layout, query, above = layout.at_rows(anchors), query[anchors], above[anchors]
            rows = slice(start, start + 3)
        output = tree_attention(query, *leaves[1:], layout, impl="eager")
        own = slice(start, start + sum(tree))
        gradients = torch.autograd.grad(output, leaves, above)
        results.append((output[rows], *(x[own] for x in gradients)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_a_layout_lives_until_the_backward_pass_is_done():
    inputs = random_qkv(14)
    output = tree_attention(*inputs, TreeLayout.build([10, 4], [-1, 0]), impl="eager")
    gc.collect()
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(output.sum(), inputs))


@pytest.mark.parametrize("way", ["flash", "formula"])
@pytest.mark.parametrize("at_rows", [False, True], ids=["all", "rows"])
def test_eager_plans_and_runs_without_reading_from_the_device(way, at_rows, monkeypatch):
    # On a GPU every read waits for all that was given to it before. Fake tensors cannot be read at all.
    monkeypatch.setattr(eager, "_has_flash", lambda query: way == "flash")
    layout = TreeLayout.build([200, 30, 41, 5, 6, 7], [-1, 0, 0, -1, 3, 3])
    layout = layout.at_rows([229, 270, 275, 280, 288]) if at_rows else layout
    with FakeTensorMode():
        query, key, value = (torch.empty(rows, 4, 16) for rows in (layout.num_queries, 289, 289))
        output, lse = eager.attend(query, key, value, layout, 0.25, True)
        gradients = eager.attend_backward(query, key, value, output, lse, output, layout, 0.25, True)
    assert [x.shape for x in gradients] == [query.shape, key.shape, value.shape]


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
    with pytest.raises(ValueError, match="got 'flash', wanted auto or one of triton, eager, varlen, flash_attn"):
        tree_attention(*random_qkv(10), layout, impl="flash")


@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan")])
def test_triton_refuses_a_scale_that_does_not_keep_the_order_of_scores(scale):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = TreeLayout.from_lengths([10], device)
    inputs = [x.detach().to(device, torch.float32) for x in random_qkv(10, width=16)]
    with pytest.raises(ValueError, match=r"scale: got (0\.0|-0\.5|nan), wanted a number above 0"):
        tree_attention(*inputs, layout, impl="triton", scale=scale)


def test_a_parent_after_its_child_is_refused():
    with pytest.raises(ValueError, match="segment 0: got length 3 and parent 1"):
        TreeLayout.build([3, 2], [1, -1])


def test_the_call_of_varlen_fits_the_torch_that_is_installed():
    from torch.nn.attention.varlen import varlen_attn

    layout = TreeLayout.build([10, 4, 3], [-1, 0, 0])
    arguments = varlen_arguments(*random_qkv(17), layout)
    bound = inspect.signature(varlen_attn).bind(*arguments, **varlen_options(4, 2, 0.5, True))
    assert bound.arguments["window_size"] == (-1, 0) and bound.arguments["scale"] == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_of_gathered_rows_are_sums_in_one_order(dtype):
    torch.manual_seed(0)
    layout = TreeLayout.build([50, *[7] * 30], [-1, *[0] * 30])
    rows = torch.randn(layout.num_keys + 2, 3, 8, dtype=torch.float64).to(dtype).requires_grad_()  # two are not read
    upstream = torch.randn(len(layout.key_index), 3, 8, dtype=torch.float64).to(dtype)
    found = [torch.autograd.grad(take_rows(rows, layout.key_index), rows, upstream)[0] for _ in range(5)]
    assert all(torch.equal(found[0], again) for again in found)
    assert torch.equal(take_rows(rows, layout.key_index), rows[layout.key_index])
    truth = torch.zeros(rows.shape, dtype=torch.float64).index_add_(0, layout.key_index, upstream.double())
    assert (found[0].double() - truth).abs().max() <= 4 * torch.finfo(dtype).eps * truth.abs().max()


def test_a_compiled_gather_leaves_no_sum_to_the_compiler():
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def keep(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(take_rows, backend=aot_autograd(fw_compiler=keep), fullgraph=True, dynamic=True)
    rows, index = torch.randn(9, 4, requires_grad=True), torch.tensor([0, 1, 1, 8])
    compiled(rows, index).sum().backward()
    assert rows.grad[:, 0].tolist() == [1, 2, 0, 0, 0, 0, 0, 0, 1]
    targets = " ".join(itertools.chain(*graphs))
    assert "fastrm.sum_rows" in targets
    assert not any(name in targets for name in ("index_put", "embedding", "scatter", "index_add"))


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
