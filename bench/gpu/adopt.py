"""Take the figures of a GPU day into the project, so that none is typed by hand.

    python bench/gpu/adopt.py FOLDER/gpu_day.json [SECOND/gpu_day.json]

Sets MEASURED in kernels/fastrm_kernels/dispatch.py (what `auto` chooses on that device), writes the device's files
in bench/results, and makes the tables of bench/README.md and README.md anew. Refuses a rehearsal, a day without a
GPU, several devices or versions at once, and a day on which anything was wrong: a test, a gate, a test run that
did not finish. Running it again changes nothing.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import ROOT
from bench.gpu.results import MODEL, kernel_report, one_result, red_gates, training_report
from bench.harness.pages import Part, table
from bench.harness.results import file_of, write_json
from bench.kernels import results as kernel_results
from bench.kernels import tables as kernel_tables
from bench.kernels.results import ATTENTION, HEAD, NOT_MEASURED, TORCH_DTYPES, winners
from bench.training import results as training_results
from bench.training import tables as training_tables
from bench.training.results import FASTRM, FP8, GROUPS, MAIN, PACKED, PAIRS, PLAIN, entries_of, speedup

DISPATCH = Path("kernels/fastrm_kernels/dispatch.py")
BEGIN, END = "MEASURED: dict[tuple[str, str, torch.dtype], str] = {", "}"
FIGURES = Part(ROOT / "README.md", "GPU figures", "bench/gpu/adopt.py")
DAY_SUFFIX = "-gpu-day.json"
DECIDING = ("torch", "triton", "cuda", "transformers", "torchao")  # packages whose versions have to agree


class Refused(Exception):
    """These figures must not be taken; the message says why."""


def joined(records: list[dict]) -> dict:
    """Join the records of several calls on one device into one.

    Raises:
        Refused: if they are no measurements, or not of one device and one set of versions.
    """
    facts = []
    for record in records:
        if record.get("rehearsal", True):
            raise Refused("a rehearsal: its figures are those of emulated operators on a CPU")
        found = one_result(record, "facts.json")
        if found is None or not found["on_gpu"]:
            raise Refused("no GPU: facts.json is missing, or names none")
        facts.append(found)
    if len({found["device"] for found in facts}) > 1:
        raise Refused(f"several devices: {', '.join(found['device'] for found in facts)}; adopt them one by one")
    for name in DECIDING:
        numbers = {found["versions"].get(name) for found in facts}
        if len(numbers) > 1:
            raise Refused(f"several versions of {name}: {', '.join(map(str, numbers))}; adopt them one by one")
    record = {**records[-1], "stages": [stage for record in records for stage in record["stages"]]}
    if wrong := red_gates(record):
        raise Refused("\n  ".join(["something was wrong on that day:", *wrong]))
    return record


def adopt(record: dict, root: Path) -> list[Path]:
    """Write everything that follows from the record; return the files that have changed.

    Args:
        record: of `joined`.
        root: of the project.
    """
    results, report = root / "bench" / "results", kernel_report(record)
    bench, readme, dispatch = root / "bench" / "README.md", root / "README.md", root / DISPATCH
    # All markers are looked for before the first file is written.
    kernel_tables.PART.replaced(bench.read_text(), [])
    FIGURES.replaced(readme.read_text(), [])
    chosen = updated_dispatch(dispatch.read_text(), report) if report else dispatch.read_text()
    _write_results(record, results)
    kernels, training = kernel_results.load_all(results), training_results.load_all(results)
    days = [json.loads(file.read_text()) for file in sorted(results.glob("*" + DAY_SUFFIX))]
    text = kernel_tables.PART.replaced(bench.read_text(), kernel_tables.readme_section(kernels))
    changed = _rewritten(bench, training_tables.PART.replaced(text, training_tables.readme_section(training)))
    changed += _rewritten(readme, FIGURES.replaced(readme.read_text(), figures(training, days)))
    return changed + _rewritten(dispatch, chosen)


def _write_results(record: dict, folder: Path) -> None:
    """Write the device's files in bench/results as the benchmarks themselves would have written them."""
    facts = one_result(record, "facts.json")
    if kernels := kernel_report(record):
        for op, part in kernels["operations"].items():
            left_out = [(op, text) for text in part["left_out"]]
            run = {key: value for key, value in part.items() if key not in ("entries", "quick")}
            run |= {"device": kernels["device"], "left_out": left_out}
            kernel_results.save(part["entries"], run, folder, quick=part["quick"])
    if training := training_report(record):
        for model, run in training["runs"].items():
            entries = [entry for entry in training["entries"] if entry["model"] == model]
            training_results.save(model, {**run, "device": training["device"]}, entries, folder)
        training_tables.draw_all([training], folder)
    day = {
        "device": facts["device"], "date": record["date"], "facts": facts,
        "stages": {stage["name"]: stage["status"] for stage in record["stages"]},
        **{name: one_result(record, f"{name}.json") for name in ("tests", "update", "memory", "turn_loss")},
    }  # fmt: skip
    write_json(file_of(facts["device"], DAY_SUFFIX, folder), day)


def updated_dispatch(text: str, report: dict) -> str:
    """Return the text of dispatch.py with the winners of this device; its entries of other devices stay.

    Raises:
        Refused: if the table is not where it was.
    """
    if text.count(BEGIN) != 1:
        raise Refused(f"{DISPATCH}: wanted the line {BEGIN!r} once")
    before, rest = text.split(BEGIN)
    body, after = rest.split(END, 1)
    others, comment = [], []
    for line in body.strip("\n").splitlines():
        comment.append(line)
        if not line.lstrip().startswith("#"):
            others += [] if f'"{report["device"]}"' in line else comment
            comment = []
    lines = []
    for op in (HEAD, ATTENTION):
        part = report["operations"].get(op)
        for dtype, winner, why in winners(op, part["entries"]) if part else []:
            versions = part["versions"]
            quick = " (a quick run)" if part["quick"] else ""
            text = f"{why}{quick}; {part['date'][:10]}, torch {versions['torch']}, triton {versions['triton']}"
            lines += textwrap.wrap(text, 110, initial_indent="    # ", subsequent_indent="    # ")
            lines.append(f'    ("{op}", "{report["device"]}", {TORCH_DTYPES[dtype]}): "{winner}",')
    return before + "\n".join([BEGIN, *others, *lines, END]) + after


def figures(training: Sequence[dict], days: Sequence[dict]) -> list[str]:
    """Return the lines of README.md's short table, with all devices that have a day."""
    devices = [day["device"] for day in days]
    reports = {report["device"]: report for report in training if report["device"] in devices}
    if not reports:
        return [
            f"**GPU figures: {NOT_MEASURED}.** Nothing has run on a GPU yet: its paths are built and tested on CPUs, "
            "and every figure here is of a CPU.",
            "`make gpu-day` gathers what a GPU machine needs and prints the command that measures there, "
            "in nine minutes.",
        ]
    rows = []
    for title, workload, name, over in (
        ("pairs of 1300/300 tokens: fastrm over a plain pairwise trainer", PAIRS, FASTRM, PLAIN),
        ("the same: over packed rows without sharing", PAIRS, FASTRM, PACKED),
        ("the same: FP8 over bf16", PAIRS, FP8, FASTRM),
        ("groups of 4, 1300/300: fastrm over a plain pairwise trainer", GROUPS, FASTRM, PLAIN),
    ):
        ratios = (_ratio(report, workload, name, over) for report in reports.values())
        rows.append((title, *("-" if ratio is None else f"{ratio:.2f}x" for ratio in ratios)))
    rows.append(("pairs of 1300/300 tokens: preferences a second", *map(_pairs_per_second, reports.values())))
    lines = table(("Qwen2.5-VL-7B, one GPU", *reports), rows)
    return [*lines, "", *(_versions(day) for day in days if day["device"] in reports)]


def _entry(report: dict, workload: str) -> dict | None:
    return next((entry for entry in entries_of(report, MODEL, MAIN) if entry["name"] == workload), None)


def _ratio(report: dict, workload: str, name: str, over: str) -> float | None:
    entry = _entry(report, workload)
    return speedup(entry, name, over) if entry else None


def _pairs_per_second(report: dict) -> str:
    variant = (_entry(report, PAIRS) or {"variants": {}})["variants"].get(FASTRM)
    return f"{variant['pairs_per_second']:.2f}" if variant and not variant["failed"] else "-"


def _versions(day: dict) -> str:
    numbers = day["facts"]["versions"]
    shown = ", ".join(f"{name} {numbers[name]}" for name in ("torch", "triton", "transformers") if numbers.get(name))
    return f"{day['device']}: measured {day['date']}, {shown}; all figures in [bench/README.md](bench/README.md)."


def _rewritten(file: Path, text: str) -> list[Path]:
    if file.read_text() == text:
        return []
    file.write_text(text)
    return [file]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="gpu_day.json of one or more calls on one device")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the project; default: this one")
    arguments = parser.parse_args()
    try:
        record = joined([json.loads(file.read_text()) for file in arguments.files])
        changed = adopt(record, arguments.root)
    except (Refused, OSError, ValueError, KeyError) as error:
        print(f"nothing adopted: {error if not isinstance(error, KeyError) else f'no {error}'}", file=sys.stderr)
        return 1
    facts = one_result(record, "facts.json")
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items() if number)
    print(f"{facts['device']}; {versions}")
    print("\n".join(f"changed {file}" for file in changed) or "nothing has changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
