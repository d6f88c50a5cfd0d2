"""A pretrained model on real preferences: fastrm, TRL's RewardTrainer and a plain padded trainer, side by side.

    python bench/pretrained/convert.py                     # the model, once
    python bench/pretrained/run_pretrained.py --only "long prompts"   # one workload: 2 to 5 minutes on two cores
    python bench/pretrained/run_pretrained.py                         # all of them
    python bench/pretrained/run_pretrained.py --tables                # into docs/lab/pretrained.md, from bench/results

The model is SmolLM2-135M-Instruct. Weights, head, batches, their order, optimizer and dtype (float32) are the same, and
the three take turns in one process. The gate comes first: loss and every gradient of the first batch must agree to
rounding, or there is no figure.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.harness.results import RESULTS, cpu_name, environment, file_of, load_all, write_json
from bench.pretrained.convert import FOLDER
from bench.pretrained.tables import COMPARISON, DOCS, comparison_lines

PACKAGES = ("transformers", "trl", "accelerate", "numpy")
SUFFIX = "-pretrained.json"


def measure(model: Path, only: str | None, out: Path) -> Path:
    """Measure the workloads; save after each, and keep the results of others. Return the file."""
    import torch

    from bench.pretrained.batches import WORKLOADS
    from bench.pretrained.comparison import compare_workload, load_network
    from bench.training.measurement import matmul_rate

    device = cpu_name()
    file = file_of(device, SUFFIX, out)
    report = json.loads(file.read_text()) if file.exists() else {"device": device, "workloads": {}}
    network = load_network(model)
    for name in [only] if only else WORKLOADS:
        rate = matmul_rate("small", "cpu")
        with tempfile.TemporaryDirectory() as folder:
            entry = compare_workload(WORKLOADS[name], network, Path(folder))
        facts = {**environment(*PACKAGES), "threads": torch.get_num_threads(), "matmul_flops": rate}
        report["workloads"][name] = {**facts, **entry}
        write_json(file, report)
        print("\n".join(lines_of(name, report["workloads"][name])), flush=True)
    return file


def lines_of(name: str, entry: dict) -> list[str]:
    """Return a workload's figures as text."""
    lines = [f"{name}: {entry['what']}; {entry['num_pairs']} pairs a step; gradients agree"]
    for variant, figures in entry["variants"].items():
        lines.append(
            f"  {variant:<7} {figures['seconds']:8.3f} s  {figures['peak_mib']:8,.0f} MiB  "
            f"{figures['tokens']:7,} tokens  {figures['flops'] / 1e12:7.3f} TFLOP  "
            f"held-out accuracy {figures['accuracy']:.4f}"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=FOLDER, help=f"what convert.py has made; default: {FOLDER}")
    parser.add_argument("--only", metavar="WORKLOAD", help="one workload by its name")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results; default: bench/results")
    parser.add_argument("--tables", action="store_true", help="only make the tables of docs/lab/pretrained.md")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if arguments.tables:
        reports = load_all(SUFFIX, arguments.out)
        COMPARISON.write(comparison_lines(reports))
        print(f"wrote {DOCS}")
        return 0
    print(f"saved to {measure(arguments.model, arguments.only, arguments.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
