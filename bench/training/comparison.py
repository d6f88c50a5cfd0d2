"""The measurement that compares any two variants of a step: agreement, time, memory, FLOPs."""

import functools
import math
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from bench.harness.gate import GRADIENT_TOLERANCE, LOSS_TOLERANCE
from bench.harness.memory import resident_peak_mib
from bench.harness.timing import Stats, Stopwatch
from fastrm_kernels.tree_attention.eager import layout_of

ROUNDS = 5


class Variant(Protocol):
    """A way to train: the same weights, batches and optimizer as its rival."""

    name: str

    def step(self, number: int) -> None:
        """Run forward, backward and update on batch `number` (any integer; batches repeat)."""

    def gradients(self, number: int) -> tuple[float, dict[str, torch.Tensor]]:
        """Return the mean loss of the batch and its gradient by parameter name; change no weight."""

    def num_tokens(self, number: int) -> int:
        """Return the number of tokens that the model processes for the batch, padding included."""


@dataclass(frozen=True)
class Times:
    """Seconds of one step over the timed rounds: by the clock, and of CPU time over all threads."""

    wall: list[float]
    cpu: list[float]

    @property
    def median(self) -> float:
        return Stats.of(self.wall).median

    @property
    def cpu_median(self) -> float:
        return Stats.of(self.cpu).median

    @property
    def quartiles(self) -> tuple[float, float]:
        found = Stats.of(self.wall)
        return found.low, found.high


@dataclass(frozen=True)
class Measurement:
    """The measurement of one variant on one workload.

    Attributes:
        times: of the timed rounds.
        tokens: processed in the timed rounds together, padding included.
        flops: of forward and backward on batch 0, as counted by torch.
        peak_mib: rise of the process's resident memory during a step.
    """

    variant: str
    times: Times
    tokens: int
    flops: int
    peak_mib: float | None


@dataclass(frozen=True)
class Agreement:
    """The findings of the gate on a batch.

    Attributes:
        flops: of forward and backward by variant, as counted by torch.
        gradient_error: norm of the difference of the two gradients over the rival's norm.
    """

    flops: dict[str, int]
    gradient_error: float


@dataclass(frozen=True)
class Comparison:
    """fastrm against a rival on one workload; ratios above 1 say that fastrm needs less."""

    workload: str
    pairs_per_step: int
    fastrm: Measurement
    rival: Measurement
    floor: float

    @property
    def time_ratio(self) -> float:
        return self.rival.times.median / self.fastrm.times.median

    @property
    def cpu_ratio(self) -> float:
        return self.rival.times.cpu_median / self.fastrm.times.cpu_median

    @property
    def token_ratio(self) -> float:
        return self.rival.tokens / self.fastrm.tokens

    @property
    def flop_ratio(self) -> float:
        return self.rival.flops / self.fastrm.flops

    def pairs_per_second(self, side: Measurement) -> float:
        return self.pairs_per_step / side.times.median

    def to_json(self) -> dict:
        sides = {
            side.variant: {
                **asdict(side),
                "median_s": side.times.median,
                "quartiles_s": side.times.quartiles,
                "pairs_per_second": self.pairs_per_second(side),
            }
            for side in (self.fastrm, self.rival)
        }
        ratios = {
            "time": self.time_ratio,
            "cpu": self.cpu_ratio,
            "tokens": self.token_ratio,
            "flops": self.flop_ratio,
            "floor": self.floor,
        }
        return {"workload": self.workload, "pairs_per_step": self.pairs_per_step, "ratios": ratios, "sides": sides}


def compare(workload: str, fastrm: Variant, rival: Variant, pairs_per_step: int, floor: float, benchmark):
    """Gate, then time both variants in alternation; return a `Comparison`, or None under --benchmark-disable.

    pytest-benchmark drives the rounds and keeps fastrm's times; the rival runs in each round's setup,
    on the same batch, so that a slow phase of the machine falls on both.
    """
    variants = (fastrm, rival)
    flops = check_agreement(fastrm, rival).flops
    if benchmark.disabled:
        benchmark(fastrm.step, 0)
        return None
    seconds: dict[str, list[tuple[float, float]]] = {variant.name: [] for variant in variants}

    def timed(variant: Variant) -> None:
        times = seconds[variant.name]
        # The first call is the warm-up round; round n then runs batch n.
        number = len(times)
        with Stopwatch() as watch:
            variant.step(number)
        times.append((watch.wall, watch.cpu))

    benchmark.pedantic(timed, args=(fastrm,), setup=lambda: timed(rival), rounds=ROUNDS, warmup_rounds=1)
    sides = [
        Measurement(
            variant.name,
            Times(*map(list, zip(*seconds[variant.name][1:], strict=True))),
            sum(variant.num_tokens(number) for number in range(1, ROUNDS + 1)),
            flops[variant.name],
            resident_peak_mib(lambda variant=variant: variant.step(0)),
        )
        for variant in variants
    ]
    return Comparison(workload, pairs_per_step, *sides, floor)


def check_agreement(fastrm: Variant, rival: Variant) -> Agreement:
    """Assert equal losses and gradients on batch 0.

    No speed figure on a red gate: two variants that compute different things cannot be compared.
    """
    found, flops = {}, {}
    for variant in (fastrm, rival):
        with flop_counter() as counter:
            found[variant.name] = variant.gradients(0)
        flops[variant.name] = counter.get_total_flops()
    (loss, ours), (wanted, theirs) = found[fastrm.name], found[rival.name]
    assert abs(wanted - math.log(2)) > 0.01, f"loss {wanted:.4f} says nothing: it is that of equal rewards"
    assert abs(loss - wanted) <= LOSS_TOLERANCE * wanted, f"loss: got {loss:.8f}, {rival.name} has {wanted:.8f}"
    assert ours.keys() == theirs.keys(), f"parameters of one variant only: {ours.keys() ^ theirs.keys()}"
    norm = _norm(theirs)
    error = _norm({name: ours[name] - theirs[name] for name in ours}) / norm
    assert error <= GRADIENT_TOLERANCE, (  # also false for NaN
        f"gradient: relative error {error:.2e} of a norm of {norm:.4g}, wanted at most {GRADIENT_TOLERANCE:.0e}"
    )
    return Agreement(flops, error)


def _norm(gradients: dict[str, torch.Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm([gradient.double() for gradient in gradients.values()]))


def flop_counter() -> FlopCounterMode:
    """Return torch's FLOP counter, extended by CPU attention, stock and eager tree; whole even if causal."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    formulas = {
        attention: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda upstream, query, key, value, *_, **__: sdpa_backward_flop_count(upstream, query, key, value)
        ),
        torch.ops.fastrm.tree_attention_eager: functools.partial(_tree_flops, 4),
        torch.ops.fastrm.tree_attention_eager_backward: functools.partial(_tree_flops, 10),
    }
    for name in ("tree_attention_eager", "tree_attention_eager_backward"):
        formulas[getattr(torch.ops.fastrm, name)]._get_raw = True  # the tensors, not their shapes alone
    return FlopCounterMode(display=False, custom_mapping=formulas)


def _tree_flops(operations: int, query, *arguments, **_) -> int:
    """Return this many operations for each element of a query and each key of its run."""
    handle = next(x for x in arguments if isinstance(x, torch.Tensor) and x.dtype == torch.int64)
    layout = layout_of(handle)
    pairs = sum(q * k for q, k in zip(layout.query_lengths, layout.key_lengths, strict=True))
    return operations * query.shape[1] * query.shape[2] * pairs
