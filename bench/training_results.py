"""Results of the training-step benchmark: the file of each device, tables, goals, and charts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kernel_results import NOT_MEASURED, RESULTS, file_stem, is_goal_device

SUFFIX = "-training.json"
PLAIN, PACKED, FASTRM, FP8 = "plain", "packed rows", "fastrm", "fastrm FP8"
FLOOR_SHAPE, FLOOR = "pairs, 640/300", 1.5  # of fastrm over plain on a CPU, asserted by pytest


def save(report: dict, folder: Path) -> Path:
    """Write a report; entries of other models in the device's file stay."""
    file = folder / (file_stem(report["device"]) + SUFFIX)
    if file.exists():
        mine = {entry["model"] for entry in report["entries"]}
        old = json.loads(file.read_text())["entries"]
        report = {**report, "entries": [entry for entry in old if entry["model"] not in mine] + report["entries"]}
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n")
    return file


def load_all(folder: Path = RESULTS) -> list[dict]:
    """The reports of all devices."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*" + SUFFIX))]


def seconds(entry: dict, name: str) -> float | None:
    """Median of a variant's step; None where there is no figure."""
    variant = entry["variants"].get(name)
    return variant["seconds"]["median"] if variant and not variant["failed"] else None


def speedup(entry: dict, name: str, over: str) -> float | None:
    """How many times as fast a variant is as another."""
    ours, theirs = seconds(entry, name), seconds(entry, over)
    return theirs / ours if ours and theirs else None


@dataclass(frozen=True)
class Goal:
    """A target of issue 4, section 3, for Qwen2.5-VL-7B on one H100 or H200."""

    text: str
    workload: str
    name: str
    over: str | None  # None: share of the device's own matmul rate
    at_least: float

    def measure(self, entry: dict) -> float | None:
        """The ratio, or None where a figure is missing."""
        if self.over is not None:
            return speedup(entry, self.name, self.over)
        variant = entry["variants"].get(self.name)
        return variant["matmul_share"] if variant and not variant["failed"] else None


GOALS = [
    Goal("fastrm over plain, pairs 1300/300", "pairs, 1300/300", FASTRM, PLAIN, 2.2),
    Goal("fastrm over packed rows, pairs 1300/300", "pairs, 1300/300", FASTRM, PACKED, 1.5),
    Goal("FP8 over bf16, pairs 1300/300", "pairs, 1300/300", FP8, FASTRM, 1.2),
    Goal("fastrm, share of the measured bf16 matmul rate, pairs 1300/300", "pairs, 1300/300", FASTRM, None, 0.5),
    Goal("fastrm over plain, groups of 4, 1300/300", "groups of 4, 1300/300", FASTRM, PLAIN, 5.0),
]


def goal_lines(reports: Sequence[dict]) -> list[str]:
    """A table of the goals; only a figure that was measured on a goal's device appears."""
    lines = ["| goal (7B, one H100 or H200) | wanted | measured | verdict |", "|---|---|---|---|"]
    devices = [report for report in reports if is_goal_device(report["device"])]
    for goal in GOALS:
        found = [
            value
            for report in devices
            for entry in report["entries"]
            if entry["model"] == "7B" and entry["name"] == goal.workload and entry["kind"] == "main"
            if (value := goal.measure(entry)) is not None
        ]
        shown = f"{found[-1]:.2f}" if found else NOT_MEASURED
        verdict = NOT_MEASURED if not found else "met" if found[-1] >= goal.at_least else "not met"
        lines.append(f"| {goal.text} | at least {goal.at_least:g} | {shown} | {verdict} |")
    return lines


def table_lines(report: dict) -> list[str]:
    """All entries of a device as Markdown tables."""
    lines = []
    for kind, title in (("main", "variants"), ("features", "fastrm with one feature taken out")):
        entries = [entry for entry in report["entries"] if entry["kind"] == kind]
        for entry in entries:
            lines += ["", f"{entry['model']}, {entry['name']}: {title}", ""]
            lines.append(
                "| variant | s/step | quartiles | pairs/s | against plain | useful tokens/s | tokens processed "
                "| peak MiB | of the matmul rate |"
                if kind == "main"
                else "| variant | s/step | quartiles | pairs/s | the feature is worth |"
            )
            lines.append("|---" * (lines[-1].count("|") - 1) + "|")
            lines += [_row(entry, name, kind) for name in entry["variants"]]
    return lines


def _row(entry: dict, name: str, kind: str) -> str:
    variant = entry["variants"][name]
    if variant["failed"]:
        return f"| {name} | {variant['failed']} |"
    low, high = variant["seconds"]["quartiles"]
    median, pairs = variant["seconds"]["median"], variant["pairs_per_second"]
    cells = [name, f"{median:.3f}", f"{low:.3f} - {high:.3f}", f"{pairs:.2f}"]
    if kind == "main":
        over = speedup(entry, name, PLAIN)
        cells += [
            "-" if over is None else f"{over:.2f}x",
            f"{variant['useful_tokens_per_second']:,.0f}",
            f"{variant['processed_tokens']:,}",
            "-" if variant["peak_mib"] is None else f"{variant['peak_mib']:,.0f}",
            f"{variant['matmul_share']:.0%}",
        ]
    else:
        worth = speedup(entry, FASTRM, name)
        cells.append("-" if worth is None else f"{worth:.2f}x")
    return "| " + " | ".join(cells) + " |"


def draw(report: dict, file: Path) -> None:
    """Chart: pairs per second of each variant and workload, and what each feature is worth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    main = [entry for entry in report["entries"] if entry["kind"] == "main"]
    features = [entry for entry in report["entries"] if entry["kind"] == "features"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.6), width_ratios=[3, 2], layout="constrained")
    names = list(dict.fromkeys(name for entry in main for name in entry["variants"]))
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        ratios = [speedup(entry, name, PLAIN) or 0.0 for entry in main]
        places = [place + (number - (len(names) - 1) / 2) * width for place in range(len(main))]
        bars = left.bar(places, ratios, width * 0.92, label=name)
        left.bar_label(bars, [f"{ratio:.1f}" if ratio else "-" for ratio in ratios], fontsize=8, padding=1)
    left.set_xticks(range(len(main)), [entry["name"].replace(", ", "\n") for entry in main])
    left.set_ylabel("pairs per second, plain = 1")
    left.set_title("Whole training steps, by prefix/response tokens")
    left.legend(frameon=False, loc="upper left")
    rows = [(name, speedup(entry, FASTRM, name)) for entry in features for name in entry["variants"] if name != FASTRM]
    rows = sorted(((name, value) for name, value in rows if value), key=lambda row: row[1])
    bars = right.barh([name.removeprefix("without ") for name, _ in rows], [value - 1 for _, value in rows], left=1)
    right.bar_label(bars, [f"{value:.2f}x" for _, value in rows], fontsize=8, padding=2)
    right.axvline(1, color="black", linewidth=0.8)
    right.margins(x=0.2)
    right.set_xlabel("step time without it, fastrm = 1")
    right.set_title("What each feature is worth" + (f" ({features[0]['name']})" if features else ""))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{main[0]['model']} on {report['device']}")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
