"""`tree_attention` against FlashAttention with copied K/V, duplicated sequences and FlexAttention."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby

import torch
import torch.nn.functional as F

from bench.harness.gate import Named, attempt, check, error_limits
from bench.harness.timing import Budget
from bench.kernels.head import DTYPES
from bench.kernels.measurement import Candidate, figures, host_ms
from bench.kernels.shapes import FORWARD, PACK_TOKENS, STEP, AttentionShape
from fastrm_kernels import TreeLayout, tree_attention
from fastrm_kernels.tree_attention.flash_attn import flash_attn_obstacle
from fastrm_kernels.tree_attention.reference import tree_attention_reference, visible
from fastrm_kernels.tree_attention.tiles import build_work_lists, pick_blocks, work_lists

OP = "tree_attention"
NAMES = ("output", "query", "key", "value")  # the last three stand for their gradients
TRUTH_BYTES = 4 << 30  # float64 score matrices that are computed at a time
FLEX_BLOCK = 128
DENSE_TOKENS = 1000  # the largest pack whose row is tried as one masked softmax on a CPU


@dataclass(frozen=True)
class Pack:
    """Inputs of one shape: leaves query (T, H, K), key and value (T, Hkv, K), and a gradient of the output."""

    shape: AttentionShape
    layout: TreeLayout
    leaves: tuple[torch.Tensor, ...]
    upstream: torch.Tensor

    @classmethod
    def draw(cls, shape: AttentionShape, device: str) -> "Pack":
        dtype, tokens = DTYPES[shape.dtype], shape.num_tokens

        def rows(heads):
            return torch.randn(tokens, heads, shape.head_dim, device=device).to(dtype)

        leaves = tuple(rows(n).requires_grad_() for n in (shape.heads, shape.kv_heads, shape.kv_heads))
        return cls(shape, build_layout(shape, device), leaves, rows(shape.heads))


@dataclass(frozen=True)
class Way:
    """One way to compute the attention of a pack.

    Attributes:
        forward: takes query, key and value as this way holds them.
        leaves, upstream: in that form.
        fold: this way's output, or the gradient of its query, key or value -> that of the pack's rows.
        build: makes the layout or mask that `forward` uses, once more; for its time.
    """

    forward: Callable[..., torch.Tensor]
    leaves: tuple[torch.Tensor, ...]
    upstream: torch.Tensor
    fold: Callable[[str, torch.Tensor], torch.Tensor]
    build: Callable[[], object]

    def run_forward(self) -> torch.Tensor:
        return self.forward(*self.leaves)

    def run_step(self) -> tuple[torch.Tensor, ...]:
        output = self.forward(*self.leaves)
        return (output, *torch.autograd.grad(output, self.leaves, self.upstream))

    def results(self) -> Named:
        return {name: self.fold(name, x.detach()) for name, x in zip(NAMES, self.run_step(), strict=True)}


def build_layout(shape: AttentionShape, device: str) -> TreeLayout:
    return TreeLayout.build(shape.lengths, shape.parents, device)


def in_place(pack: Pack, impl: str) -> Way:
    """Return tree_attention itself as a way."""
    shape, device = pack.shape, str(pack.upstream.device)

    def build():
        layout = build_layout(shape, device)
        if impl == "triton":
            build_work_lists(layout, pack.upstream.dtype, shape.head_dim, causal=shape.causal)

    forward = partial(tree_attention, layout=pack.layout, causal=shape.causal, impl=impl)
    return Way(forward, pack.leaves, pack.upstream, lambda _, x: x, build)


def dense(pack: Pack) -> Way:
    """Return one masked softmax over the whole row as a way."""
    forward = partial(tree_attention_reference, layout=pack.layout, causal=pack.shape.causal)
    return Way(forward, pack.leaves, pack.upstream, lambda _, x: x, partial(visible, pack.layout, pack.shape.causal))


def duplicated(pack: Pack, impl: str) -> Way:
    """Return the way that makes every response a causal sequence with its own copy of the prefix.

    Args:
        impl: of `tree_attention`; or "stock", PyTorch's scaled_dot_product_attention without padding: sequences of
            one length as a batch, others one after another.
    """
    shape, device = pack.shape, pack.upstream.device
    rows = torch.tensor(shape.duplicated_rows(), device=device)
    lengths = shape.duplicated_lengths
    layout = TreeLayout.from_lengths(lengths, device)
    leaves = tuple(leaf.detach()[rows].requires_grad_() for leaf in pack.leaves)
    # The copies of a prefix share its upstream gradient. Their number is a power of two, so that dividing is exact.
    copies = torch.bincount(rows)[rows]
    upstream = pack.upstream[rows] / copies[:, None, None].to(pack.upstream.dtype)

    def fold(name, x):
        folded = x.new_zeros(shape.num_tokens, *x.shape[1:], dtype=torch.float64)
        if name == "output":
            folded[rows] = x.double()  # any one of the copies of a prefix
            return folded
        return folded.index_add_(0, rows, x.double())

    forward = partial(tree_attention, layout=layout, impl=impl)
    if impl == "stock":
        forward = partial(_stock_attention, batches=[(length, len(list(same))) for length, same in groupby(lengths)])
    return Way(forward, leaves, upstream, fold, partial(TreeLayout.from_lengths, lengths, device))


def _stock_attention(query, key, value, batches: list[tuple[int, int]]):
    """Compute causal attention of sequences in one row; `batches`: (length, number) of equal ones."""
    sizes = [length * count for length, count in batches]
    outputs = []
    for (length, _), *rows in zip(batches, *(x.split(sizes) for x in (query, key, value)), strict=True):
        batch = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in rows)
        output = F.scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=True)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def flex(pack: Pack, compiled: bool = True) -> Way:
    """Return FlexAttention under the tree's mask, on a row padded so that all packs share one compiled kernel."""
    shape, tokens = pack.shape, pack.shape.num_tokens
    length = PACK_TOKENS if compiled else -(-tokens // FLEX_BLOCK) * FLEX_BLOCK
    if tokens > length:
        raise ValueError(f"left out: {tokens:,} tokens are more than the {length:,} that it is compiled for")
    block_mask = flex_mask(pack, length)

    def padded(x):
        whole = x.new_zeros(length, *x.shape[1:])
        whole[:tokens] = x.detach()
        return whole

    function = flex_function(compiled)
    gqa = shape.heads != shape.kv_heads

    def forward(*rows):
        output = function(*(x.transpose(0, 1)[None] for x in rows), block_mask=block_mask, enable_gqa=gqa)
        return output[0].transpose(0, 1)

    leaves = tuple(padded(leaf).requires_grad_() for leaf in pack.leaves)
    return Way(forward, leaves, padded(pack.upstream), lambda _, x: x[:tokens], partial(flex_mask, pack, length))


@cache
def flex_function(compiled: bool):
    from torch.nn.attention.flex_attention import flex_attention

    if not compiled:
        return flex_attention
    # Past the limit dynamo would silently run it eagerly, with all scores in memory.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(flex_attention, dynamic=False)


def flex_mask(pack: Pack, length: int):
    """Return the BlockMask of a pack; rows past its end see nothing and are not seen."""
    from torch.nn.attention.flex_attention import create_block_mask

    shape, device = pack.shape, str(pack.upstream.device)
    layout = build_layout(shape, device)
    work = work_lists(layout, pick_blocks(pack.upstream.dtype, shape.head_dim, False), shape.causal)
    nothing = work.query_rank.new_zeros(length - shape.num_tokens)
    rank = torch.cat([work.query_rank, nothing - 1])
    low, high = (torch.cat([bound, nothing]) for bound in work.key_bounds.unbind(1))

    def sees(batch, head, query, key):
        return (low[key] <= rank[query]) & (rank[query] < high[key])

    return create_block_mask(sees, None, None, length, length, device=device, BLOCK_SIZE=FLEX_BLOCK)


def exact(pack: Pack) -> Named:
    """Compute output and gradients in float64, tree by tree and head by head."""
    inputs = [x.detach() for x in (*pack.leaves, pack.upstream)]
    truth = {name: torch.zeros(x.shape, dtype=torch.float64, device=x.device)
             for name, x in zip(NAMES, (inputs[0], *inputs[:3]), strict=True)}  # fmt: skip
    start = 0
    for tree, same in groupby(pack.shape.trees):
        count, size = len(list(same)), sum(tree[0])
        rows = slice(start, start + count * size)
        hidden = ~visible(TreeLayout.build(*tree, inputs[0].device), pack.shape.causal)
        _exact_trees([x[rows].unflatten(0, (count, size)) for x in inputs],
                     {name: x[rows].unflatten(0, (count, size)) for name, x in truth.items()}, hidden)  # fmt: skip
        start += count * size
    return truth


def _exact_trees(inputs, truth: Named, hidden) -> None:
    """Add the results of trees of one kind to `truth`; everything is (trees, tokens, heads, K)."""
    query, key, value, upstream = inputs
    trees, size, heads, width = query.shape
    group, scale = heads // key.shape[2], width**-0.5
    batch = max(1, TRUTH_BYTES // (8 * size * size))
    for first in range(0, trees, batch):
        some = slice(first, first + batch)
        for head in range(heads):
            q, out_grad = (x[some, :, head].double() for x in (query, upstream))
            k, v = (x[some, :, head // group].double() for x in (key, value))
            weights = (q @ k.mT).mul_(scale).masked_fill_(hidden, float("-inf")).softmax(-1)
            output = weights @ v
            truth["output"][some, :, head] = output
            truth["value"][some, :, head // group] += weights.mT @ out_grad
            slopes = (out_grad @ v.mT).sub_((output * out_grad).sum(-1, keepdim=True)).mul_(weights).mul_(scale)
            del weights
            truth["query"][some, :, head] = slopes @ k
            truth["key"][some, :, head // group] += slopes.mT @ q


def _ways(pack: Pack, device: str, with_flex: bool) -> dict[str, Callable[[], Way]]:
    ours = ("triton", "varlen") if device == "cuda" else ("eager",)
    if flash_attn_obstacle(pack.leaves[0]) is None:
        ours += ("flash_attn",)
    ways: dict[str, Callable[[], Way]] = {impl: partial(in_place, pack, impl) for impl in ours}
    if pack.shape.num_responses:
        ways["duplicated"] = partial(duplicated, pack, "varlen" if device == "cuda" else "stock")
    if device == "cpu" and pack.shape.num_tokens <= DENSE_TOKENS:
        ways["dense"] = partial(dense, pack)
    elif device == "cuda" and with_flex:
        ways["flex"] = partial(flex, pack)
    return ways


def measure_attention(
    shape: AttentionShape, device: str, budget: Budget, drive=None, *, with_flex: bool = False, timed: bool = True
) -> dict:
    """Gate all variants, then time them forward and forward + backward; arguments as in `measure_head`."""
    torch.manual_seed(0)
    pack = Pack.draw(shape, device)
    candidates = _gated(pack, _ways(pack, device, with_flex), device)
    return {
        "op": OP, "name": shape.name, "shape": shape.to_json(),
        "flops": {direction: shape.flops(direction) for direction in (FORWARD, STEP)},
        "variants": figures(candidates, device, budget, drive, timed=timed),
    }  # fmt: skip


def _gated(pack: Pack, ways: dict[str, Callable[[], Way]], device: str) -> list[Candidate]:
    """Return a candidate for each way; one that does not agree with float64 is marked as failed."""
    truth = [exact(pack)]
    limits = error_limits([in_place(pack, "eager").results()], truth)

    def gate(candidate: Candidate, make: Callable[[], Way]) -> None:
        way = make()
        candidate.errors = check([way.results()], truth, limits)
        candidate.build_ms = host_ms(way.build)
        candidate.passes = {FORWARD: way.run_forward, STEP: way.run_step}
        candidate.once = way.run_step

    candidates = [Candidate(name, {}, queued=device == "cuda") for name in ways]
    for candidate in candidates:
        attempt(candidate, partial(gate, candidate, ways[candidate.name]))
    return candidates
