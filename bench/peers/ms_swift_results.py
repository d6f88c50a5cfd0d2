"""The results of the comparison with ms-swift: their file, and the tables and goals made from it."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import ROOT
from bench.harness import results
from bench.harness.pages import Part, one_after_another, table
from bench.harness.results import RESULTS, file_of, write_json

SUFFIX = "-peers-ms-swift.json"
FASTRM, SWIFT = "fastrm", "ms-swift"
PART = Part(ROOT / "docs" / "lab" / "peers.md", "ms-swift", "bench/peers/ms_swift.py --docs")
COLUMNS = (
    "workload", "recomputation", "trainer", "tokens a step", "s/step", "least - most", "pairs/s", "GFLOP/s", "peak MiB",
    "speed", "by arithmetic", "memory",
)  # fmt: skip


@dataclass(frozen=True)
class Goal:
    """A goal for fastrm on a workload, with nothing recomputed on either side: a ratio of the two trainers."""

    workload: str
    what: str
    wanted: float


GOALS = (
    Goal("pairs", "speed", 3.0), Goal("groups-of-4", "speed", 10.0),
    Goal("pairs", "memory", 0.5), Goal("groups-of-4", "memory", 0.5),
)  # fmt: skip


def save(entry: dict, facts: dict, folder: Path) -> Path:
    """Write a workload's measurement to the file of its device; its other entries stay.

    Args:
        entry: workload, checkpointing, pairs, gate (relative differences), and for each trainer flops of a step and
            runs: those of `ms_swift_sides.Run`, as dictionaries, in the order in which they were made.
        facts: device, date, threads, and versions of each trainer's environment.
    """
    file = file_of(facts["device"], SUFFIX, folder)
    kept = json.loads(file.read_text())["entries"] if file.exists() else []
    entry = {**entry, **{name: value for name, value in facts.items() if name != "device"}}
    entries = sorted([other for other in kept if _key(other) != _key(entry)] + [entry], key=_key, reverse=True)
    write_json(file, {"device": facts["device"], "entries": entries})
    return file


def _key(entry: dict) -> tuple[str, str]:
    return entry["workload"], entry["checkpointing"]


def load_all(folder: Path = RESULTS) -> list[dict]:
    """Return the reports of all devices."""
    return results.load_all(SUFFIX, folder)


def seconds_of(entry: dict, trainer: str) -> list[float]:
    """Return the seconds of all timed steps; the first step of each run warms up and does not count."""
    return [second for run in entry["runs"][trainer] for second in run["seconds"][1:]]


def ratio(entry: dict, what: str) -> float:
    """Return a ratio of the two trainers by name: speed, memory or flops.

    speed is ms-swift's median step time over fastrm's; memory is fastrm's largest peak over ms-swift's; flops is
    ms-swift's over fastrm's, the speed that shared work alone would give at one rate of arithmetic.
    """
    if what == "flops":
        return entry["flops"][SWIFT] / entry["flops"][FASTRM]
    if what == "speed":
        ours, theirs = (statistics.median(seconds_of(entry, trainer)) for trainer in (FASTRM, SWIFT))
        return theirs / ours
    ours, theirs = (max(run["peak_bytes"] for run in entry["runs"][trainer]) for trainer in (FASTRM, SWIFT))
    return ours / theirs


def report_lines(report: dict) -> list[str]:
    """Return all measurements of one device as Markdown."""
    lines = [f"**{report['device']}**", "", *table(COLUMNS, [row for e in report["entries"] for row in _rows(e)]), ""]
    lines += table(("goal", "wanted", "measured", "verdict"), [_goal_row(goal, report) for goal in GOALS])
    for entry in report["entries"]:
        differences = ", ".join(f"{name} {value:.0e}" for name, value in entry["gate"].items())
        text = f"measured {entry['date']}; relative differences in the first step: {differences}"
        lines += ["", f"{entry['workload']}, recomputation {entry['checkpointing']}: {text}."]
    versions = report["entries"][0]["versions"]
    lines += ["", *(f"- {trainer}: {_versions(found)}" for trainer, found in versions.items())]
    return lines


def _rows(entry: dict) -> list[list[str]]:
    rows = []
    for trainer in (SWIFT, FASTRM):
        runs, seconds = entry["runs"][trainer], seconds_of(entry, trainer)
        median = statistics.median(seconds)
        ratios = [f"{ratio(entry, what):.2f}x" for what in ("speed", "flops", "memory")]
        rows.append([
            entry["workload"], entry["checkpointing"], trainer, f"{runs[0]['tokens']:,}", f"{median:.2f}",
            f"{min(seconds):.2f} - {max(seconds):.2f}", f"{entry['pairs'] / median:.2f}",
            f"{entry['flops'][trainer] / median / 1e9:,.0f}",
            f"{max(run['peak_bytes'] for run in runs) / 2**20:,.0f}", *(ratios if trainer == FASTRM else ["1"] * 3),
        ])  # fmt: skip
    return rows


def _goal_row(goal: Goal, report: dict) -> list[str]:
    at_least = goal.what == "speed"
    name = f"{goal.what}, {goal.workload}"
    wanted = f"{'at least' if at_least else 'at most'} {goal.wanted:g}x"
    entry = next((e for e in report["entries"] if _key(e) == (goal.workload, "none")), None)
    if entry is None:
        return [name, wanted, "not measured", "not measured"]
    value = ratio(entry, goal.what)
    reached = value >= goal.wanted if at_least else value <= goal.wanted
    return [name, wanted, f"{value:.2f}x", "reached" if reached else "missed"]


def _versions(found: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {number}" for name, number in found.items() if number)


def page_lines(reports: Sequence[dict]) -> list[str]:
    """Return the generated part of docs/lab/peers.md."""
    return one_after_another(reports, report_lines)
