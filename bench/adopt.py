"""Take the figures of a GPU day into the project, so that none is typed by hand.

    python bench/adopt.py FOLDER/gpu_day.json [SECOND/gpu_day.json]

Sets MEASURED in kernels/fastrm_kernels/dispatch.py (what `auto` chooses on that device), writes the device's files
in bench/results, and makes the tables of bench/README.md and README.md anew. Refuses a rehearsal, a day without a
GPU, several devices or versions at once, and a day on which anything was wrong: a test, a gate, a test run that
did not finish. Running it again changes nothing.
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "kernels"), str(ROOT)]

import kernel_results  # noqa: E402
import kernel_tables  # noqa: E402
import training_results  # noqa: E402
import training_tables  # noqa: E402
from gpu_results import kernel_report, one_result, red_gates, training_report  # noqa: E402
from gpu_speed import updated_section  # noqa: E402
from kernel_results import ATTENTION, HEAD, TORCH_DTYPES, file_stem, winners, write_json  # noqa: E402

DISPATCH = Path("kernels/fastrm_kernels/dispatch.py")
BEGIN, END = "MEASURED: dict[tuple[str, str, torch.dtype], str] = {", "}"
DAY_SUFFIX = "-gpu-day.json"
DECIDING = ("torch", "triton", "cuda", "transformers", "torchao")  # versions that have to agree


class Refused(Exception):
    """These figures must not be taken; the message says why."""


def joined(records: list[dict]) -> dict:
    """One record of several calls on one device.

    Raises:
        Refused: if it is no measurement, or not one.
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
    """Write everything that follows from the record; returns the files that have changed.

    Args:
        record: of `joined`.
        root: of the project.
    """
    results, report = root / "bench" / "results", kernel_report(record)
    bench, readme, dispatch = root / "bench" / "README.md", root / "README.md", root / DISPATCH
    # All markers are looked for before the first file is written.
    kernel_tables.updated_readme(bench.read_text(), [])
    updated_section(readme.read_text(), [], [])
    chosen = updated_dispatch(dispatch.read_text(), report) if report else dispatch.read_text()
    _write_results(record, results)
    kernels, training = kernel_results.load_all(results), training_results.load_all(results)
    days = [json.loads(file.read_text()) for file in sorted(results.glob("*" + DAY_SUFFIX))]
    text = kernel_tables.updated_readme(bench.read_text(), kernels)
    changed = _rewritten(bench, training_tables.updated_readme(text, training))
    changed += _rewritten(readme, updated_section(readme.read_text(), training, days))
    return changed + _rewritten(dispatch, chosen)


def _write_results(record: dict, folder: Path) -> None:
    """The device's files in bench/results, as the benchmarks themselves would have written them."""
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
        **{name: one_result(record, f"{name}.json") for name in ("tests", "update", "memory")},
    }  # fmt: skip
    write_json(folder / (file_stem(facts["device"]) + DAY_SUFFIX), day)


def updated_dispatch(text: str, report: dict) -> str:
    """dispatch.py with the winners of this device; what it says of others stays.

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
