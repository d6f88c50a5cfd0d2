"""fastrm against ms-swift: whole training runs of a small random Qwen2.5-VL on this machine, side by side.

    make ms-swift                                        ms-swift's environment, in .venv-ms-swift
    python bench/peers/ms_swift.py                       all workloads, nothing recomputed; a quarter of an hour
    python bench/peers/ms_swift.py --only pairs          one workload
    python bench/peers/ms_swift.py --recompute full      with full activation checkpointing on both sides
    python bench/peers/ms_swift.py --docs                make the tables of docs/lab/peers.md from bench/results

Both read the same files and run as their users run them, each in a process of its own, in turn. Before a figure is
saved the script asserts that both were given the same tokens and pixels, trained the same number of parameters, and
had the same loss and gradient norm in their first step. bench/peers/README.md says what is the same and what is not.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import ROOT
from bench.harness.results import RESULTS, device_name, environment, package_versions
from bench.peers.ms_swift_gate import check_batch, check_runs
from bench.peers.ms_swift_inputs import SIZES, WORKLOADS, Sizes, Workload, make_inputs, step_flops
from bench.peers.ms_swift_results import FASTRM, PART, SWIFT, load_all, page_lines, report_lines, save
from bench.peers.ms_swift_sides import Run, run_fastrm, run_swift

PYTHON = ROOT / ".venv-ms-swift" / "bin" / "python"
OURS = ("transformers", "torch", "numpy")
THEIRS = ("ms-swift", "trl", "transformers", "torch", "torchvision", "numpy")


def measure(
    python: Path, inputs: Path, workload: Workload, checkpointing: str, rounds: int, steps: int, sizes: Sizes = SIZES
) -> dict:
    """Run both trainers in turn, `rounds` times each, and compare their results; return an entry to save.

    Raises:
        RedGate: if they computed different things.
        RunFailed: if one of them fails.
    """
    import torch

    runs: dict[str, list[Run]] = {FASTRM: [], SWIFT: []}
    with tempfile.TemporaryDirectory() as name:
        for number in range(rounds):
            folder = Path(name) / str(number)
            runs[FASTRM].append(run_fastrm(inputs, workload, steps, checkpointing, folder / FASTRM))
            runs[SWIFT].append(run_swift(python, inputs, workload, steps, checkpointing, folder / SWIFT))
            batch = torch.load(folder / SWIFT / "record" / "batch.pt", weights_only=True)
            check_batch(inputs, inputs / f"{workload.name}.jsonl", batch)
            gate = check_runs(runs[FASTRM][-1], runs[SWIFT][-1])
            for trainer, found in runs.items():
                print(f"{workload.name}, {trainer}: seconds {[round(s, 2) for s in found[-1].seconds]}", flush=True)
    flops = step_flops(inputs / "model", workload, sizes, checkpointing)
    return {
        "workload": workload.name, "checkpointing": checkpointing, "pairs": workload.pairs, "gate": gate,
        "flops": dict(zip((FASTRM, SWIFT), flops, strict=True)),
        "runs": {trainer: [asdict(run) for run in found] for trainer, found in runs.items()},
    }  # fmt: skip


def _facts(python: Path) -> dict:
    import torch

    code = "import json; from importlib.metadata import version; print(json.dumps({n: version(n) for n in %r}))"
    theirs = subprocess.run([str(python), "-c", code % (THEIRS,)], capture_output=True, text=True, check=True).stdout
    versions = {FASTRM: package_versions(*OURS), SWIFT: json.loads(theirs)}
    return {
        "device": device_name(),
        "date": environment()["date"],
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=PYTHON, help="of ms-swift's environment; default: %(default)s")
    parser.add_argument("--only", choices=WORKLOADS, help="one workload")
    parser.add_argument("--recompute", choices=("none", "full"), default="none", help="on both sides")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each trainer; default: %(default)s")
    parser.add_argument("--steps", type=int, default=3, help="of a run; the first is not timed; default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file; default: bench/results")
    parser.add_argument("--docs", action="store_true", help="only make the tables of docs/lab/peers.md")
    arguments = parser.parse_args()
    if arguments.docs:
        PART.write(page_lines(load_all()))
        print(f"wrote {PART.page}")
        return 0
    if not arguments.python.exists():
        parser.error(f"{arguments.python} is not there; make ms-swift makes it, or name another with --python")
    if arguments.steps < 2:
        parser.error("--steps: at least 2, since the first is not timed")
    facts = _facts(arguments.python)
    with tempfile.TemporaryDirectory() as name:
        make_inputs(Path(name))
        for workload in [WORKLOADS[arguments.only]] if arguments.only else WORKLOADS.values():
            entry = measure(
                arguments.python, Path(name), workload, arguments.recompute, arguments.rounds, arguments.steps
            )
            file = save(entry, facts, arguments.out)
    print("\n".join(["", *report_lines(json.loads(file.read_text())), "", f"saved to {file}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
