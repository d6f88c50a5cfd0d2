"""A test whether sizes fit that `fastrm plan` says fit: memory.json in --out, written after each size.

For each way of recomputing, the largest pack of pairs of 1300/300 tokens whose planned peak fits the device, less the
plan's own reserve, is trained for two steps; peak memory is held against the plan.
"""

import argparse
import bisect
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from bench.harness.gate import describe
from bench.harness.memory import MIB, clean_memory
from bench.harness.results import device_name, environment, write_json
from bench.harness.timing import Budget
from bench.training.measurement import timed
from bench.training.models import make_network, training_config
from bench.training.plan import planned_bytes
from bench.training.results import FASTRM
from bench.training.shapes import TrainingShape, Variant, main_variants, training_shapes
from bench.training.variants import CompiledLayers, TrainingStep
from fastrm.forecast.plan import Assumptions

MODES = ("selective", "full")
CASE_SECONDS = 30  # a size is not begun with fewer: the layers are compiled first
MOST_GROUPS = 64
CPU_BYTES = 2 << 30  # a device for rehearsals


def largest(model: str, mode: str, variant: Variant, usable_bytes: float) -> tuple[TrainingShape, int] | None:
    """Return the largest shape whose planned peak is at most so many bytes, and that peak; None if no group fits."""
    config, shape = training_config(model, mode), training_shapes(model)[0]
    sizes = [replace(shape, num_groups=count) for count in range(1, MOST_GROUPS + 1)]

    def planned(size: TrainingShape) -> int:
        return planned_bytes(model, config, size, variant)

    count = bisect.bisect_right(sizes, usable_bytes, key=planned)
    return (sizes[count - 1], planned(sizes[count - 1])) if count else None


def try_size(model: str, device: str, mode: str, variant: Variant, shape: TrainingShape) -> dict:
    """Return the peak memory of two steps in MiB, or why there is none."""
    clean_memory()
    try:
        network = make_network(model, device)
        step = TrainingStep(variant, network, training_config(model, mode), shape, CompiledLayers())
        timed(step)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        timed(step)
    except torch.OutOfMemoryError as error:
        return {"fits": False, "failed": describe(error)}
    except Exception as error:
        return {"fits": None, "failed": describe(error)}
    peak = torch.cuda.max_memory_allocated() / MIB if device == "cuda" else None
    reserved = torch.cuda.max_memory_reserved() / MIB if device == "cuda" else None
    return {"fits": True, "failed": None, "peak_mib": peak, "reserved_mib": reserved}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("3B", "7B"), default="7B")
    parser.add_argument("--budget-seconds", type=float, default=120)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    budget, model = Budget(arguments.budget_seconds), arguments.model
    total = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else CPU_BYTES
    reserve = Assumptions.reserve_bytes
    usable = total - reserve if total > 2 * reserve else total
    variant = next(variant for variant in main_variants(on_gpu=True) if variant.name == FASTRM)
    found = {"device": device_name(), **environment(), "model": model, "usable_mib": usable / MIB, "sizes": []}
    for mode in MODES:
        size = largest(model, mode, variant, usable)
        entry = {"checkpointing": mode, "fits": None}
        found["sizes"].append(entry)
        if size is None:
            entry["failed"] = "left out: the plan says that not one group fits"
        elif budget.left < CASE_SECONDS:
            entry["failed"] = "left out: out of time"
        else:
            shape, planned = size
            entry |= {"groups": shape.num_groups, "tokens": shape.tree_tokens, "planned_mib": planned / MIB}
            entry |= try_size(model, device, mode, variant, shape)
        print(entry, flush=True)
        write_json(arguments.out / "memory.json", found)
    return 1 if any(entry["fits"] is False for entry in found["sizes"]) else 0


if __name__ == "__main__":
    sys.exit(main())
