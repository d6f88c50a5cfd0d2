"""`preference_head_loss`, forward and all gradients, against eager code and torch.compile of it."""

from dataclasses import dataclass
from functools import partial

import torch

from bench.harness.gate import Named, attempt, check, error_limits
from bench.harness.memory import MIB
from bench.harness.timing import Budget, synchronize
from bench.kernels.measurement import Candidate, captured, figures
from bench.kernels.shapes import STEP, HeadShape
from fastrm_kernels.preference_head import preference_head_loss, reference

OP = "preference_head"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DRAWS = 8  # draws of inputs that the gate tries
NAMES = ("loss", "rewards", "rows", "norm weight", "weight", "bias", "last weight", "last bias")
NORM_EPS = 1e-6
# Weights and gradients of all sets together are this many times the L2 cache, so that each comes from memory.
L2_MULTIPLE = 4


@dataclass(frozen=True)
class Inputs:
    """The leaves: rows (R, D), norm weight (D,), weight (D, D), bias (D,), last weight (1, D), last bias (1,)."""

    leaves: tuple[torch.Tensor, ...]
    edges: torch.Tensor
    edge_weight: torch.Tensor

    @classmethod
    def draw(cls, shape: HeadShape, device: str) -> "Inputs":
        """Draw random values that give rewards of about 1."""
        dtype, width = DTYPES[shape.dtype], shape.width

        def leaf(*size, scale=1.0, base=0.0):
            return (base + scale * torch.randn(size, device=device)).to(dtype).requires_grad_()

        leaves = (
            leaf(shape.rows, width), leaf(width, scale=0.1, base=1.0),
            leaf(width, width, scale=width**-0.5), leaf(width, scale=0.1),
            leaf(1, width, scale=2 * width**-0.5), leaf(1, scale=0.1),
        )  # fmt: skip
        edges = torch.tensor(shape.edges(), device=device)
        return cls(leaves, edges, torch.rand(len(edges), device=device) + 0.5)

    def with_rows(self) -> "Inputs":
        """Return the same weights with new rows."""
        rows = torch.randn_like(self.leaves[0]).requires_grad_()
        return Inputs((rows, *self.leaves[1:]), self.edges, self.edge_weight)

    def double(self) -> "Inputs":
        leaves = tuple(leaf.detach().double().requires_grad_() for leaf in self.leaves)
        return Inputs(leaves, self.edges, self.edge_weight.double())


def fused(inputs: Inputs, impl: str):
    """Return (loss, rewards) as this package computes them."""
    rows, norm, weight, bias, last, last_bias = inputs.leaves
    return preference_head_loss(
        rows, None, [(weight, bias), (last, last_bias)], inputs.edges, norm_weight=norm, norm_eps=NORM_EPS,
        weight=inputs.edge_weight, impl=impl,
    )  # fmt: skip


def plain(leaves, edges, edge_weight):
    """Compute the eager formulas without checks and dispatch, for torch.compile."""
    rows, norm, weight, bias, last, last_bias = leaves
    layers = [(weight, bias), (last, last_bias)]
    rewards = reference.reward_head(rows, None, layers, norm_weight=norm, norm_eps=NORM_EPS)
    return reference.preference_loss(rewards, edges, weight=edge_weight), rewards


def pairwise(inputs: Inputs):
    """Compute the loss as pairwise trainers do: the head runs on both rows of every pair."""
    rows, *parameters = inputs.leaves
    flat = inputs.edges.reshape(-1)
    pairs = torch.arange(len(flat), device=flat.device).view(-1, 2)
    loss, rewards = plain((rows.index_select(0, flat), *parameters), pairs, inputs.edge_weight)
    return loss, rewards.new_zeros(rows.shape[0]).index_put((flat,), rewards)


def step(function, inputs: Inputs) -> Named:
    """Run forward and backward."""
    loss, rewards = function(inputs)
    gradients = torch.autograd.grad(loss, inputs.leaves)
    return dict(zip(NAMES, (loss.detach(), rewards.detach(), *gradients), strict=True))


def measure_head(
    shape: HeadShape, device: str, budget: Budget, drive=None, *, compiled: bool = False, timed: bool = True
) -> dict:
    """Gate all variants, then time them.

    Args:
        device: cuda or cpu.
        compiled: also torch.compile, which takes seconds to compile.
        timed: False for the gate alone.

    Returns:
        an entry of the results file.
    """
    torch.manual_seed(0)
    functions = _functions(device, compiled)
    count = num_sets(shape, _l2_bytes(device))
    sets = [Inputs.draw(shape, device) for _ in range(count)]
    draws = [sets[number % count].with_rows() for number in range(DRAWS)]
    truth = [step(partial(fused, impl="eager"), draw.double()) for draw in draws]
    limits = error_limits([step(partial(fused, impl="eager"), draw) for draw in draws], truth)
    candidates = []
    for name, function in functions.items():
        run = partial(step, function)
        found = Candidate(name, {STEP: partial(_all_sets, run, sets)}, count, once=partial(run, sets[0]))
        found.errors = attempt(found, lambda run=run: check([run(draw) for draw in draws], truth, limits)) or {}
        candidates.append(found)
        if device == "cuda":
            candidates.append(_graph(found, run, sets, limits))
    # Uncaptured ones last, because the first is the one that pytest-benchmark shows.
    candidates.sort(key=lambda candidate: not candidate.name.endswith("+graph"))
    return {
        "op": OP, "name": shape.name, "shape": shape.to_json(), "sets": count, "floor_bytes": shape.floor_bytes,
        "flops": {STEP: shape.flops}, "variants": figures(candidates, device, budget, drive, timed=timed),
    }  # fmt: skip


def num_sets(shape: HeadShape, l2_bytes: int) -> int:
    """Return the number of sets of weights that one pass goes through, at least 2."""
    return max(2, -(-L2_MULTIPLE * l2_bytes // (2 * shape.weight_bytes)))


def _l2_bytes(device: str) -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else MIB


def _functions(device: str, compiled: bool) -> dict:
    eager = partial(fused, impl="eager")
    if device == "cpu":
        return {"eager": eager, "pairwise": pairwise}
    functions = {"triton": partial(fused, impl="triton"), "eager": eager}
    if compiled:
        # One function has many shapes: past its limit of recompilations dynamo would silently run eagerly.
        torch.compiler.reset()
        graph = torch.compile(plain, dynamic=False)
        functions["compiled"] = lambda inputs: graph(inputs.leaves, inputs.edges, inputs.edge_weight)
    return functions


def _all_sets(run, sets) -> list[Named]:
    # All results are kept to the end: gradients that are written to one place again would stay in the cache.
    return [run(inputs) for inputs in sets]


def _graph(plain_one: Candidate, run, sets, limits) -> Candidate:
    """Capture the variant in a CUDA graph, which must repeat what it computes uncaptured."""
    # Queued, because the launch of one graph would weigh on the few operations in it.
    candidate = Candidate(f"{plain_one.name}+graph", {}, len(sets), queued=True, failed=plain_one.failed)

    def capture():
        replay, outputs = captured(partial(_all_sets, run, sets))
        for tensor in (tensor for output in outputs for tensor in output.values()):
            tensor.fill_(float("nan"))
        replay()
        synchronize()
        wanted = _all_sets(run, sets)
        # Both may be off by their limit, in opposite directions.
        doubled = {name: 2 * limit for name, limit in limits.items()}
        candidate.errors = check(outputs, [{k: v.double() for k, v in w.items()} for w in wanted], doubled)
        candidate.passes = {STEP: replay}

    attempt(candidate, capture)
    return candidate
