"""Results of the training-step benchmark: the file of each device, its figures, and the goals."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.harness import results as device_results
from bench.harness.pages import table
from bench.harness.results import RESULTS, file_of, write_json
from bench.kernels.results import NOT_MEASURED, is_goal_device

SUFFIX = "-training.json"
PLAIN, PACKED, FASTRM, FP8 = "plain", "packed rows", "fastrm", "fastrm FP8"
MAIN, FEATURES, ALTERNATIVES = "main", "features", "alternatives"  # kinds of entries
LEFT_OUT = "left out"  # the beginning of the reason of a variant that was not tried
PAIRS, GROUPS = "pairs, 1300/300", "groups of 4, 1300/300"  # the workloads that goals are about
FLOOR_SHAPE, FLOOR = "pairs, 640/300", 1.5  # the least speed of fastrm over plain on a CPU, asserted by pytest


def save(model: str, facts: dict, entries: Sequence[dict], folder: Path, *, quick: bool = False) -> Path:
    """Write the entries of a model; the entries of other models in the device's file stay.

    Entries of the same model that this run did not measure stay too, if they come from the same versions; so do
    the figures of single variants that this run left out.

    Args:
        facts: of the run: device, and what `environment` and the run itself know.
        quick: a run of few workloads, which goes to a file of its own that no table is made from.
    """
    device = facts["device"]
    file = file_of(device, SUFFIX, folder, quick=quick)
    report = json.loads(file.read_text()) if file.exists() else {"device": device, "runs": {}, "entries": []}
    same = report["runs"].get(model, {}).get("versions") == facts["versions"]
    old = [entry for entry in report["entries"] if entry["model"] != model or same]
    mine = {key(entry): entry for entry in entries}
    before = {key(entry): entry for entry in old}
    entries = [completed(entry, before.get(key(entry))) for entry in entries]
    kept = [entry for entry in old if key(entry) not in mine]
    report["runs"][model] = {key: value for key, value in facts.items() if key != "device"}
    report["entries"] = [*kept, *entries]
    write_json(file, report)
    return file


def key(entry: dict) -> tuple[str, str, str]:
    return entry["model"], entry["kind"], entry["name"]


def completed(entry: dict, before: dict | None) -> dict:
    """Return an entry with the variants of an earlier run that this one did not try."""
    if before is None:
        return entry
    tried = {name: found for name, found in entry["variants"].items() if not was_left_out(found)}
    return {**entry, "variants": {**entry["variants"], **before["variants"], **tried}}


def was_left_out(variant: dict) -> bool:
    """Return whether there was no time for a variant."""
    return bool(variant["failed"]) and variant["failed"].startswith(LEFT_OUT)


def load_all(folder: Path = RESULTS) -> list[dict]:
    """Return the reports of all devices."""
    return device_results.load_all(SUFFIX, folder)


def entries_of(report: dict, model: str, kind: str) -> list[dict]:
    """Return a model's entries of one kind."""
    return [entry for entry in report["entries"] if entry["model"] == model and entry["kind"] == kind]


def seconds(entry: dict, name: str) -> float | None:
    """Return the median seconds of a variant's step; None where there is no figure."""
    variant = entry["variants"].get(name)
    return variant["seconds"]["median"] if variant and not variant["failed"] else None


def speedup(entry: dict, name: str, over: str) -> float | None:
    """Return how many times as fast a variant is as another."""
    ours, theirs = seconds(entry, name), seconds(entry, over)
    return theirs / ours if ours and theirs else None


def worth(report: dict, entry: dict) -> Iterator[tuple[str, float | None]]:
    """Yield (feature, step time without it over that with it) of an entry of features; FP8 from the variants' entry."""
    for name in entry["variants"]:
        if name != FASTRM:
            yield name.removeprefix("without "), speedup(entry, FASTRM, name)
    for main in entries_of(report, entry["model"], MAIN):
        if main["name"] == entry["name"] and FP8 in main["variants"]:
            yield "FP8 (on top)", speedup(main, FP8, FASTRM)


@dataclass(frozen=True)
class Goal:
    """A target of issue 4, section 3, for Qwen2.5-VL-7B on one H100 or H200."""

    text: str
    workload: str
    name: str
    over: str | None  # the variant to compare with; None: share of the device's matmul rate
    at_least: float

    def measure(self, entry: dict) -> float | None:
        """Return the ratio, or None where a figure is missing."""
        if self.over is not None:
            return speedup(entry, self.name, self.over)
        variant = entry["variants"].get(self.name)
        return variant["matmul_share"] if variant and not variant["failed"] else None


GOALS = [
    Goal("fastrm over plain, pairs 1300/300", PAIRS, FASTRM, PLAIN, 2.2),
    Goal("fastrm over packed rows, pairs 1300/300", PAIRS, FASTRM, PACKED, 1.5),
    Goal("FP8 over bf16, pairs 1300/300", PAIRS, FP8, FASTRM, 1.2),
    Goal("fastrm, share of the measured bf16 matmul rate, pairs 1300/300", PAIRS, FASTRM, None, 0.5),
    Goal("fastrm over plain, groups of 4, 1300/300", GROUPS, FASTRM, PLAIN, 5.0),
]
GOAL_MODEL = "7B"


def goals_of(report: dict) -> list[tuple[Goal, dict, float]]:
    """Return (goal, entry, value) for all goals that this report has figures of."""
    entries = entries_of(report, GOAL_MODEL, MAIN) if is_goal_device(report["device"]) else []
    return [
        (goal, entry, value)
        for goal in GOALS
        for entry in entries
        if entry["name"] == goal.workload and (value := goal.measure(entry)) is not None
    ]


def goal_lines(reports: Sequence[dict]) -> list[str]:
    """Return a table of the goals, with figures only of the goals' devices."""
    rows = []
    found = {goal.text: (value, report["device"]) for report in reports for goal, _, value in goals_of(report)}
    for goal in GOALS:
        shown, verdict = NOT_MEASURED, NOT_MEASURED
        if goal.text in found:
            value, device = found[goal.text]
            shown, verdict = f"{value:.2f} ({device})", "met" if value >= goal.at_least else "not met"
        rows.append((goal.text, f"at least {goal.at_least:g}", shown, verdict))
    return table(("goal (7B, one H100 or H200)", "wanted", "measured", "verdict"), rows)
