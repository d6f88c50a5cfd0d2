"""The loss of what critics and judges write, alone, at a model's widths: turn_loss.json in --out.

Two programs over the same rows: fastrm's chunks of PyTorch's operations, and Liger's fused linear cross entropy. Each
must first agree, in losses and gradients of few rows, with plain cross entropy over logits in float64. The floor is the
three products of rows, gradients of rows and gradients of the head, at the rate of a large matrix product.
"""

import argparse
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import nn

from bench.harness.gate import Named, attempt, check, error_limits
from bench.harness.rates import product_seconds
from bench.harness.results import device_name, environment, write_json
from bench.harness.timing import Rounds, Stats, in_turns, timed
from bench.training.models import make_network
from fastrm.model.turn_loss import turn_losses

PROGRAMS = {"chunks of PyTorch's operations": "eager", "Liger's kernel": "triton"}
# A quarter of a pack of 32,768 tokens: of a judge's text most is the prompt.
ROWS = 8192
GATE_ROWS = 64
DRAWS = 3
ROUNDS = Rounds(3, 10)


class Case:
    """Random rows and a head, whose loss is computed.

    Attributes:
        rows: (N, D), of which gradients are wanted, as of the head (V, D).
        pack: of a `Pack` what the loss reads: one turn of all rows, whose targets and weights are random.
    """

    def __init__(self, num_rows: int, width: int, vocabulary: int, device: str, dtype: torch.dtype, seed: int = 0):
        make = torch.Generator(device).manual_seed(seed)
        self.rows = torch.randn(num_rows, width, generator=make, device=device, dtype=dtype).requires_grad_()
        head = torch.randn(vocabulary, width, generator=make, device=device, dtype=dtype) * width**-0.5
        self.head = nn.Parameter(head)
        numbers = torch.arange(num_rows, device=device)
        self.pack = SimpleNamespace(
            turn_rows=numbers,
            turn_targets=torch.randint(vocabulary, (num_rows,), generator=make, device=device),
            turn_owners=torch.zeros_like(numbers),
            turn_weights=torch.rand(num_rows, generator=make, device=device),
            response_lengths=[num_rows],
        )

    def step(self, impl: str) -> torch.Tensor:
        """Compute the loss and leave gradients of rows and head."""
        self.rows.grad = self.head.grad = None
        total, _ = turn_losses(self.rows, nn.Identity(), self.head, self.pack, impl)
        total.backward()
        return total.detach()

    def plain(self, dtype: torch.dtype) -> Named:
        """Return the loss and gradients of plain cross entropy over all logits, its products in `dtype`."""
        rows, head = (value.detach().to(dtype).requires_grad_() for value in (self.rows, self.head))
        logits = (rows @ head.T).to(torch.promote_types(dtype, torch.float32))
        losses = F.cross_entropy(logits, self.pack.turn_targets, reduction="none")
        total = (losses * self.pack.turn_weights).sum()
        total.backward()
        return {"loss": total.detach(), "rows": rows.grad, "head": head.grad}

    def found(self, impl: str) -> Named:
        """Return what a program gives, under the names of `plain`."""
        total = self.step(impl)
        return {"loss": total, "rows": self.rows.grad, "head": self.head.grad}


@dataclass
class Program:
    """A way to compute the loss, and what was measured of it; `failed` says why it has no figures."""

    name: str
    impl: str
    failed: str | None = None
    peak_mib: float | None = None
    seconds: list[float] = field(default_factory=list)

    def warm_up(self, case: Case, device: str) -> None:
        """Compile what is compiled, and on a GPU measure the peak of a step, its gradients included."""
        case.step(self.impl)
        if device == "cuda":
            case.rows.grad = case.head.grad = None
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            case.step(self.impl)
            self.peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20

    def timed(self, case: Case, device: str) -> float:
        """Return the seconds of a step."""
        return timed(lambda: case.step(self.impl), device)

    def to_json(self) -> dict:
        """Return the figures, or why there are none."""
        if self.failed is not None:
            return {"failed": self.failed}
        peak = {} if self.peak_mib is None else {"peak_mib": self.peak_mib}
        return {"failed": None, **peak, **Stats.of(self.seconds).to_json()}


def gate(width: int, vocabulary: int, device: str, dtype: torch.dtype, impl: str) -> None:
    """Compare a program with plain cross entropy.

    Raises:
        RedGate: if it is more than twice as far from float64 as plain cross entropy in `dtype`, and a rounding of its
            sums over the vocabulary.
    """
    cases = [Case(GATE_ROWS, width, vocabulary, device, dtype, seed) for seed in range(DRAWS)]
    truth = [case.plain(torch.float64) for case in cases]
    limits = error_limits([case.plain(dtype) for case in cases], truth)
    # All of them sum over the vocabulary in float32, each in an order of its own.
    slack = math.sqrt(vocabulary) * torch.finfo(torch.float32).eps
    for name in limits:
        limits[name] += slack * max(float(values[name].abs().max()) for values in truth)
    check([case.found(impl) for case in cases], truth, limits)


def measure(width: int, vocabulary: int, device: str, dtype: torch.dtype) -> dict[str, dict]:
    """Return by program its seconds of forward and backward and, on a GPU, the peak of its memory, or why it failed."""
    programs = [Program(name, impl) for name, impl in PROGRAMS.items()]
    for program in programs:
        attempt(program, lambda program=program: gate(width, vocabulary, device, dtype, program.impl))
    case = Case(ROWS if device == "cuda" else GATE_ROWS, width, vocabulary, device, dtype)
    for program in programs:
        attempt(program, lambda program=program: program.warm_up(case, device))
    samplers = [
        lambda program=program: attempt(program, lambda: program.seconds.append(program.timed(case, device)))
        for program in programs
    ]
    in_turns(samplers, ROUNDS.during(5.0))
    return {program.name: program.to_json() for program in programs}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("3B", "7B"), default="7B")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # Triton's interpreter has no bfloat16
    vocabulary, width = make_network(arguments.model, "meta").model.get_input_embeddings().weight.shape
    num_rows = ROWS if device == "cuda" else GATE_ROWS
    floor = 3 * min(product_seconds(num_rows, width, vocabulary, device, dtype))
    found = {"device": device_name(), **environment("liger-kernel"), "model": arguments.model, "rows": num_rows,
             "width": width, "vocabulary": vocabulary, "floor_seconds": floor,
             "programs": measure(width, vocabulary, device, dtype)}  # fmt: skip
    write_json(arguments.out / "turn_loss.json", found)
    for name, program in found["programs"].items():
        print(name, program, flush=True)
    return 1 if any(program["failed"] for program in found["programs"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
