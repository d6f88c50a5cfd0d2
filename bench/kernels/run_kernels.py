"""Run the kernel benchmarks without pytest: needs torch, triton and this repository alone.

    python bench/kernels/run_kernels.py                      all shapes, inside 8 minutes of GPU time
    python bench/kernels/run_kernels.py --quick              few shapes, in about a minute
    python bench/kernels/run_kernels.py --only attention     one operation
    python bench/kernels/run_kernels.py --sweep              try other block sizes of the Triton kernels
    python bench/kernels/run_kernels.py --readme             make the tables of bench/README.md from bench/results

Without a GPU it runs small shapes through the eager paths. Results go to <device>-kernels.json in --out
after every shape, so that a run which is cut short keeps what it has.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.harness.results import RESULTS, device_name, environment
from bench.kernels.results import ATTENTION, HEAD, load_all, proposals, save
from bench.kernels.shapes import attention_shapes, head_shapes
from bench.kernels.tables import PART, readme_section, report_lines

BUDGET_SECONDS = 450  # the rest of 8 minutes after imports and the start of the device
HEAD_SHARE = 0.4  # the head's share of the budget where both operations run
# A shape is not begun with fewer seconds: a first compilation of its kernels may take as long.
SHAPE_RESERVE_SECONDS = {"cuda": 15, "cpu": 1}


class Run:
    """One pass over the shapes of the chosen operations; the tests of bench/ use it as well.

    Attributes:
        device: cuda or cpu.
        entries: of the results file, as they are measured.
        left_out: (operation, what and why), for shapes and variants that were not measured.
    """

    def __init__(self, seconds: float, quick: bool = False):
        import torch

        from bench.harness.rates import copy_bytes_per_second
        from bench.harness.timing import Budget

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.quick = quick
        self.budget = Budget(seconds)
        self.entries: list[dict] = []
        self.left_out: list[tuple[str, str]] = []
        self.facts = {
            "device": device_name(), **environment(), "threads": torch.get_num_threads(),
            "copy_bytes_per_second": copy_bytes_per_second(self.device),
        }  # fmt: skip

    def measure(self, op: str, shape, budget, drive=None, *, timed: bool = True) -> dict | None:
        """Gate and time one shape, or with `timed` False gate it alone; return None if no time was left."""
        from bench.harness.memory import clean_memory
        from bench.kernels.attention import measure_attention
        from bench.kernels.head import measure_head

        clean_memory()
        if budget.left < SHAPE_RESERVE_SECONDS[self.device]:
            self.left_out.append((op, f"{shape.name}: out of time"))
            return None
        if op == HEAD:
            slow = self.device == "cuda" and not self.quick and wants_compile(shape)
            return measure_head(shape, self.device, budget, drive, compiled=slow, timed=timed)
        slow = self.device == "cuda" and not self.quick
        return measure_attention(shape, self.device, budget, drive, with_flex=slow, timed=timed)

    def leave_out_slow_variants(self, op: str) -> None:
        """Note which variants this run does not build at all."""
        if self.device == "cpu":
            return
        if op == HEAD:
            shapes = [s.name for s in head_shapes(True, self.quick) if self.quick or not wants_compile(s)]
            self.left_out.append((op, f"torch.compile, for the time it takes to compile: {', '.join(shapes)}"))
        elif self.quick:
            self.left_out.append((op, "FlexAttention, for the time it takes to compile: all shapes of a quick run"))

    def save(self, folder: Path) -> Path:
        return save(self.entries, {**self.facts, "left_out": self.left_out}, folder, quick=self.quick)

    def report(self) -> dict:
        """Return the report of this run alone, in the form of the file."""
        facts = {key: value for key, value in self.facts.items() if key != "device"}
        operations = {
            op: {**facts, "left_out": [text for where, text in self.left_out if where == op], "entries": found}
            for op in (HEAD, ATTENTION)
            if (found := [entry for entry in self.entries if entry["op"] == op])
        }
        return {"device": self.facts["device"], "operations": operations}

    def lines(self) -> list[str]:
        """Return the lines of the tables, and of what to paste into dispatch.py."""
        lines = report_lines(self.report())
        found = proposals(self.entries, self.facts["device"])
        if found:
            lines += ["", "For MEASURED in kernels/fastrm_kernels/dispatch.py, once checked:", *found]
        return lines


def wants_compile(shape) -> bool:
    """Return whether torch.compile is worth its seconds for a head shape: for one of each kind."""
    return (shape.width == 3584 and shape.dtype == "bf16") or (shape.rows == 8 and shape.width in (1536, 3584))


def run_all(run: Run, only: str | None, out: Path) -> bool:
    """Measure all shapes; return whether every variant of every shape has its figures."""
    from bench.harness.gate import DeviceLost, describe
    from bench.harness.timing import Budget

    on_gpu, complete = run.device == "cuda", True
    shapes = {HEAD: head_shapes(on_gpu, run.quick), ATTENTION: attention_shapes(on_gpu, run.quick)}
    for op in (HEAD, ATTENTION):
        if only and op != only:
            continue
        budget = run.budget if only or op == ATTENTION else Budget(HEAD_SHARE * run.budget.left)
        run.leave_out_slow_variants(op)
        for shape in shapes[op]:
            start = time.monotonic()
            try:
                entry = run.measure(op, shape, budget)
            except DeviceLost as error:
                print(f"{shape.name}: {error}; the run ends here", flush=True)
                run.left_out.append((op, f"{shape.name} and all after it: the device was lost, {error}"))
                run.save(out)
                return False
            except Exception as error:
                run.left_out.append((op, f"{shape.name}: {describe(error)}"))
                print(f"{shape.name}: {describe(error)}", flush=True)
                complete = False
                continue
            if entry is not None:
                run.entries.append(entry)
                complete &= not print_progress(entry, time.monotonic() - start)
                run.save(out)
    return complete


def print_progress(entry: dict, seconds: float) -> list[str]:
    """Print one line for a shape; return the names of the variants that failed."""
    failed = [name for name, variant in entry["variants"].items() if variant["failed"]]
    reasons = "".join(f"\n    {name} failed: {entry['variants'][name]['failed']}" for name in failed)
    print(f"{entry['op']} {entry['name']}: {seconds:.1f} s{reasons}", flush=True)
    # A variant that was left out is no failure of the run.
    return [name for name in failed if "left out" not in entry["variants"][name]["failed"]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few shapes; the results file is named -quick")
    parser.add_argument("--only", choices=("head", "attention"))
    parser.add_argument("--budget-seconds", type=float, default=BUDGET_SECONDS, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file; default: bench/results")
    parser.add_argument("--sweep", action="store_true", help="try other block sizes; writes no results file")
    parser.add_argument("--readme", action="store_true", help="only make the tables of bench/README.md")
    arguments = parser.parse_args()
    if arguments.readme:
        PART.write(readme_section(load_all()))
        print(f"wrote {PART.page}")
        return 0
    only = {"head": HEAD, "attention": ATTENTION, None: None}[arguments.only]
    if arguments.sweep:
        from bench.kernels.sweep import sweep

        return sweep(only, arguments.budget_seconds)
    run = Run(arguments.budget_seconds, arguments.quick)
    complete = run_all(run, only, arguments.out)
    print("\n" + "\n".join(run.lines()))
    file = run.save(arguments.out)
    print(f"\nsaved to {file}; python bench/kernels/run_kernels.py --readme makes the tables from it")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
