"""The 8-bit AdamW update alone, at all shapes of a model: update.json in --out, written after each program.

Three programs over the same chunks: the kernel that fastrm uses, and what torch.compile makes of its eager form, with
every size dynamic (how fastrm had it at first), and with a static width and no bounds checks. The floor is the bytes
that an update must move, at the bandwidth of a large copy.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from bench.harness.gate import describe
from bench.harness.rates import copy_bytes_per_second
from bench.harness.results import device_name, environment, write_json
from bench.harness.timing import Stopwatch
from bench.training.models import make_network
from fastrm.train import compact_adamw
from fastrm.train.compact_adamw import BLOCK, CompactAdamW
from fastrm_kernels.compact_adamw import compact_adamw as fused_update
from fastrm_kernels.compact_adamw import reference

ROUNDS = 5
# An element's bfloat16 weight and two 8-bit moments are read and written, its float32 gradient is read; each
# moment's scale of 4 bytes a block is read and written.
BYTES_PER_ELEMENT = 2 * 2 + 4 + 2 * 2 + 2 * 8 / BLOCK


def programs(device: str) -> dict[str, Callable]:
    """Return the programs by name; each takes the arguments of `compact_adamw`."""
    found = {"as fastrm has it": fused_update}
    if device == "cuda":
        found["static width, no checks"] = _static_width()
        found["every size dynamic"] = torch.compile(_copy("every"), dynamic=True, fullgraph=True)
    return found


def _static_width() -> Callable:
    compiled = torch.compile(_copy("static"), fullgraph=True, options={"assert_indirect_indexing": False})

    def update(weight, gradient, exp_avg, exp_avg_sq, noise, coefficients):
        for value in (weight, gradient, *exp_avg[:-1], *exp_avg_sq[:-1], noise):
            if value is not None and value.shape[0] > 1:
                torch._dynamo.mark_dynamic(value, 0)
        compiled(weight, gradient, exp_avg, exp_avg_sq, noise, coefficients)

    return update


def _copy(name: str) -> Callable:
    """Return the eager form with a code object of its own, by which torch.compile counts graphs, and without `impl`."""
    from fastrm.model.compiled import own_copy

    found = own_copy(reference.compact_adamw)
    found.__name__ = f"compact_adamw_{name}"
    return found


def make_optimizer(model: str, device: str) -> tuple[CompactAdamW, int]:
    """Return an optimizer over weights of the model's trained shapes, and the number of elements in 8 bits."""
    shapes = {name: p.shape for name, p in make_network(model, "meta").named_parameters()
              if p.requires_grad and p.ndim > 1 and compact_adamw.is_quantizable(p)}  # fmt: skip
    largest = max(shape.numel() for shape in shapes.values())
    # All gradients are the same memory, far larger than the cache, so that as many bytes are read.
    gradients = torch.randn(largest, device=device) * 1e-3
    parameters = []
    for name, shape in shapes.items():
        parameter = torch.nn.Parameter(torch.full(shape, 0.02, dtype=torch.bfloat16, device=device))
        parameter.grad_dtype = torch.float32
        parameter.grad = gradients[: shape.numel()].view(shape)
        parameters.append((name, parameter))
    groups = [{"params": parameters, "weight_decay": 0.01}]
    optimizer = CompactAdamW(groups, lr=1e-6, betas=[0.9, 0.95], eps=1e-8, states="8bit", seed=0)
    return optimizer, sum(shape.numel() for shape in shapes.values())


def measure(optimizer: CompactAdamW, program: Callable) -> dict:
    """Return the seconds of an update by this program, after one that compiles."""
    options = ("impl",) if program is fused_update else ()  # the eager form has no choice

    def update(*arguments, **given):
        program(*arguments, **{name: given[name] for name in options})

    compact_adamw.compact_adamw = update
    seconds = []
    for _ in range(1 + ROUNDS):
        with Stopwatch() as watch:
            optimizer.step()
        seconds.append(watch.wall)
    return {"failed": None, "first": seconds[0], "median": statistics.median(seconds[1:]), "rounds": ROUNDS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("3B", "7B"), default="7B")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    candidates = programs(device)
    optimizer, num_elements = make_optimizer(arguments.model, device)
    bandwidth = copy_bytes_per_second(device)
    floor = num_elements * BYTES_PER_ELEMENT / bandwidth if bandwidth else None
    found = {"device": device_name(), **environment(), "model": arguments.model, "elements": num_elements,
             "floor_seconds": floor, "programs": {}}  # fmt: skip
    for name, program in candidates.items():
        try:
            found["programs"][name] = measure(optimizer, program)
        except Exception as error:
            found["programs"][name] = {"failed": describe(error)}
        print(name, found["programs"][name], flush=True)
        write_json(arguments.out / "update.json", found)
    return 1 if any(program["failed"] for program in found["programs"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
