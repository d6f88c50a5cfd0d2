"""Measure whole training steps: fastrm against a plain pairwise trainer and packed rows, feature by feature.

    python bench/run_training.py                     7B on a GPU, a small model on a CPU
    python bench/run_training.py --model 3B          another shape, random weights
    python bench/run_training.py --quick             two workloads, no features
    python bench/run_training.py --only features     one part (a workload's name will do); the rest of the file stays
    python bench/run_training.py --readme            make the tables and charts from bench/results

Inside 9 minutes of GPU time: what does not fit is listed as left out, and --only measures it later. Besides
torch, triton and transformers it needs numpy, pillow and pydantic (with pydantic-core, annotated-types and
typing-inspection), for a large model also torchao (FP8, 8-bit moments) and liger-kernel (layers that are not
compiled), and matplotlib for the charts alone. Results go to <device>-training.json in --out after every
workload, so that a run which is cut short keeps what it has.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "kernels"), str(ROOT)]

from kernel_results import RESULTS, device_name, environment, package_versions  # noqa: E402
from training_results import FASTRM, FEATURES, GOAL_MODEL, GOALS, MAIN, load_all, save  # noqa: E402
from training_shapes import MODELS, leave_one_out, main_variants, training_shapes  # noqa: E402
from training_tables import README, draw_all, report_lines, updated_readme  # noqa: E402

BUDGET_SECONDS = 490  # what is left of 9 minutes after imports and the start of the device
PACKAGES = ("transformers", "torchao", "liger-kernel", "numpy")
# Features are measured after this many workloads: should the time run out, they say more than the rest.
WORKLOADS_BEFORE_FEATURES = 2


def run(model: str | None, quick: bool, only: str | None, seconds: float, out: Path) -> tuple[dict, Path]:
    """Measure everything that fits in the time; returns the report of this run alone, and the file it is in."""
    import torch

    from kernel_timing import DeviceLost
    from training_run import Measured

    model = model or ("7B" if torch.cuda.is_available() else "small")
    measured = Measured(model, seconds)
    facts = {"device": device_name(), **environment(), "threads": torch.get_num_threads()}
    facts["versions"] |= package_versions(*PACKAGES)
    facts |= {"matmul_flops": measured.matmul_flops, "left_out": measured.left_out}
    for kind, shape, variants in parts(model, quick, only, measured.device == "cuda"):
        profiled = {goal.name for goal in GOALS if (model, kind, shape.name) == (GOAL_MODEL, MAIN, goal.workload)}
        try:
            _progress(measured.measure(shape, variants, kind, profiled))
        except DeviceLost as error:
            measured.left_out.append(f"{kind} of {shape.name} and all after it: the device was lost, {error}")
            print(measured.left_out[-1], flush=True)
            break
        save(model, facts, measured.entries, out, quick=quick)
    file = save(model, facts, measured.entries, out, quick=quick)
    return {"device": facts["device"], "runs": {model: facts}, "entries": measured.entries}, file


def parts(model: str, quick: bool, only: str | None, on_gpu: bool) -> list[tuple]:
    """(kind, shape, variants) to measure, in order of what they are worth.

    Raises:
        SystemExit: if `only` names none.
    """
    shapes, variants = training_shapes(model, quick), main_variants(on_gpu)
    fastrm = next(variant for variant in variants if variant.name == FASTRM)
    found = [(MAIN, shape, variants) for shape in shapes]
    if not quick:
        found.insert(WORKLOADS_BEFORE_FEATURES, (FEATURES, shapes[0], [fastrm, *leave_one_out(on_gpu)]))
    if only is not None:
        names = {FEATURES if kind == FEATURES else shape.name for kind, shape, _ in found}
        if only not in names:
            raise SystemExit(f"--only {only}: no such part; there are {'; '.join(sorted(names))}")
        found = [part for part in found if only == (FEATURES if part[0] == FEATURES else part[1].name)]
    return found


def _progress(entry: dict) -> None:
    for name, variant in entry["variants"].items():
        figure = variant["failed"] or f"{variant['seconds']['median']:.3f} s, {variant['pairs_per_second']:.2f} pairs/s"
        print(f"{entry['model']} {entry['name']}, {name}: {figure}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, help="default: 7B on a GPU, small on a CPU")
    parser.add_argument("--quick", action="store_true", help="two workloads, no features; the file is named -quick")
    parser.add_argument("--only", metavar="PART", help="features, or a workload such as 'pairs, 640/300'")
    parser.add_argument("--budget-seconds", type=float, default=BUDGET_SECONDS, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file; default: bench/results")
    parser.add_argument("--readme", action="store_true", help="only make the tables of bench/README.md and the charts")
    arguments = parser.parse_args()
    if arguments.readme:
        reports = load_all()
        README.write_text(updated_readme(README.read_text(), reports))
        print("\n".join(f"wrote {file}" for file in [README, *draw_all(reports)]))
        return 0
    report, file = run(arguments.model, arguments.quick, arguments.only, arguments.budget_seconds, arguments.out)
    print("\n".join(["", *report_lines(report)]))
    print(f"\nsaved to {file}; python bench/run_training.py --readme makes tables and charts from it")
    failed = [variant["failed"] for entry in report["entries"] for variant in entry["variants"].values()]
    # A variant that there was no time for is no failure of the run.
    return 1 if any(reason and "left out" not in reason for reason in failed) else 0


if __name__ == "__main__":
    sys.exit(main())
