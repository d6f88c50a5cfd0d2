"""Measure whole training steps: fastrm against a plain pairwise trainer and packed rows, feature by feature.

    python bench/training/run_training.py                  7B on a GPU, a small model on a CPU
    python bench/training/run_training.py --model 3B       another shape, random weights
    python bench/training/run_training.py --quick          two workloads, no features
    python bench/training/run_training.py --only features  one part, or a workload; the rest of the file stays
    python bench/training/run_training.py --only alternatives FP8 recipes and attention backends, against fastrm
    python bench/training/run_training.py --readme         make the tables and charts from bench/results

Inside 9 minutes of GPU time: what does not fit is listed as left out, and --only measures it later. Besides
torch, triton and transformers it needs numpy, pillow and pydantic (with pydantic-core, annotated-types and
typing-inspection), for a large model also torchao (FP8, 8-bit moments) and liger-kernel (layers that are not
compiled), and matplotlib for the charts alone. Results go to <device>-training.json in --out after every
variant, so that a run which is cut short keeps what it has.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.harness.results import RESULTS, device_name, environment
from bench.training.results import (
    ALTERNATIVES,
    FASTRM,
    FEATURES,
    GOAL_MODEL,
    GOALS,
    MAIN,
    load_all,
    save,
    was_left_out,
)
from bench.training.shapes import MODELS, alternatives, leave_one_out, main_variants, training_shapes
from bench.training.tables import PART, draw_all, readme_section, report_lines

# Without it, packs of varying size fragment the allocator's memory. torch reads it when it first uses the device.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

BUDGET_SECONDS = 490  # the rest of 9 minutes after imports and the start of the device
PACKAGES = ("transformers", "torchao", "liger-kernel", "numpy")
# Features are measured after this many workloads: if the time runs out, they say more than the other workloads.
WORKLOADS_BEFORE_FEATURES = 2


def run(
    model: str | None, quick: bool, only: Sequence[str], names: Sequence[str], seconds: float, out: Path
) -> tuple[dict, Path]:
    """Measure everything that fits in the time; return the report of this run alone, and its file.

    The file is written after every variant, so that a run which is killed keeps what it has.
    """
    import torch

    from bench.harness.gate import DeviceLost
    from bench.training.measurement import Measured

    model = model or ("7B" if torch.cuda.is_available() else "small")
    on_gpu = torch.cuda.is_available()
    planned = parts(model, quick, only, names, on_gpu)
    facts = {"device": device_name(), **environment(*PACKAGES), "threads": torch.get_num_threads()}

    def keep(entry: dict, name: str) -> None:
        _progress(entry, name)
        save(model, facts, measured.entries, out, quick=quick)

    measured = Measured(model, seconds, keep)
    facts |= {"matmul_flops": measured.matmul_flops, "left_out": measured.left_out}
    for kind, shape, variants in planned:
        profiled = {goal.name for goal in GOALS if (model, kind, shape.name) == (GOAL_MODEL, MAIN, goal.workload)}
        try:
            measured.measure(shape, variants, kind, profiled)
        except DeviceLost as error:
            measured.left_out.append(f"{kind} of {shape.name} and all after it: the device was lost, {error}")
            print(measured.left_out[-1], flush=True)
            break
    file = save(model, facts, measured.entries, out, quick=quick)
    return {"device": facts["device"], "runs": {model: facts}, "entries": measured.entries}, file


def parts(model: str, quick: bool, only: Sequence[str], names: Sequence[str], on_gpu: bool) -> list[tuple]:
    """Return (kind, shape, variants) to measure, the most valuable first, or in the order of `only`.

    Args:
        only: features, alternatives or names of workloads; none of them for all.
        names: of the variants to measure; none of them for all.

    Raises:
        SystemExit: if one of `only`, or of `names`, names nothing.
    """
    shapes, variants = training_shapes(model, quick), main_variants(on_gpu)
    fastrm = next(variant for variant in variants if variant.name == FASTRM)
    found = [(MAIN, shape, variants) for shape in shapes]
    if not quick:
        extra = [(FEATURES, shapes[0], [fastrm, *leave_one_out(on_gpu)])]
        if others := alternatives(on_gpu):
            extra.insert(0, (ALTERNATIVES, shapes[0], [fastrm, *others]))
        found[WORKLOADS_BEFORE_FEATURES:WORKLOADS_BEFORE_FEATURES] = extra
    if only:
        by_name = {shape.name if kind == MAIN else kind: (kind, shape, given) for kind, shape, given in found}
        if unknown := [name for name in only if name not in by_name]:
            raise SystemExit(f"--only {unknown[0]}: no such part; there are {'; '.join(sorted(by_name))}")
        found = [by_name[name] for name in only]
    if names:
        known = {variant.name for _, _, given in found for variant in given}
        if unknown := [name for name in names if name not in known]:
            raise SystemExit(f"--variant {unknown[0]}: no such variant; there are {'; '.join(sorted(known))}")
        found = [(kind, shape, [v for v in given if v.name in names]) for kind, shape, given in found]
    return found


def _progress(entry: dict, name: str) -> None:
    """Print a line for a variant whose figures have changed."""
    variant = entry["variants"][name]
    if variant["failed"]:
        text = variant["failed"]
    elif "profile" in variant:
        text = "profile: " + ", ".join(f"{kind} {share:.0%}" for kind, share in variant["profile"]["shares"].items())
    else:
        text = f"{variant['seconds']['median']:.3f} s, {variant['pairs_per_second']:.2f} pairs/s"
    print(f"{entry['model']} {entry['name']}, {name}: {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, help="default: 7B on a GPU, small on a CPU")
    parser.add_argument("--quick", action="store_true", help="two workloads, no features; the file is named -quick")
    parser.add_argument(
        "--only", metavar="PART", action="append", default=[],
        help="features, alternatives, or a workload such as 'pairs, 640/300'; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--variant", metavar="NAME", action="append", default=[], help="one of the part's; may be given several times"
    )
    parser.add_argument("--budget-seconds", type=float, default=BUDGET_SECONDS, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file; default: bench/results")
    parser.add_argument("--readme", action="store_true", help="only make the tables of bench/README.md and the charts")
    arguments = parser.parse_args()
    if arguments.readme:
        reports = load_all()
        PART.write(readme_section(reports))
        print("\n".join(f"wrote {file}" for file in [PART.page, *draw_all(reports)]))
        return 0
    report, file = run(
        arguments.model, arguments.quick, arguments.only, arguments.variant, arguments.budget_seconds, arguments.out
    )
    print("\n".join(["", *report_lines(report)]))
    print(f"\nsaved to {file}; python bench/training/run_training.py --readme makes tables and charts from it")
    found = [variant for entry in report["entries"] for variant in entry["variants"].values()]
    # A variant for which no time was left is no failure of the run.
    return 1 if any(variant["failed"] and not was_left_out(variant) for variant in found) else 0


if __name__ == "__main__":
    sys.exit(main())
