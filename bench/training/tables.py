"""Tables and charts of the training-step benchmark, made from its results."""

from collections.abc import Sequence
from pathlib import Path

from bench import ROOT
from bench.harness.pages import Part, table
from bench.harness.results import RESULTS, file_stem
from bench.training.results import (
    ALTERNATIVES,
    FASTRM,
    FEATURES,
    MAIN,
    PLAIN,
    SUFFIX,
    entries_of,
    goal_lines,
    goals_of,
    speedup,
    worth,
)
from fastrm.ui import new_figure

PART = Part(ROOT / "bench" / "README.md", "training tables", "bench/training/run_training.py --readme")
COLORS = {"plain": "#9aa0a6", "packed rows": "#5f8dd3", "fastrm": "#e07b39", "fastrm FP8": "#b3372f"}
MAIN_COLUMNS = (
    "variant", "s/step", "quartiles", "pairs/s", "against plain", "useful tokens/s", "processed tokens/s",
    "peak MiB", "of the matmul rate", "gradient error",
)  # fmt: skip
ALTERNATIVE_COLUMNS = ("variant", "s/step", "quartiles", "against fastrm", "peak MiB", "gradient error")


def readme_section(reports: Sequence[dict]) -> list[str]:
    """Return the generated part of bench/README.md: goals, charts and tables of these reports."""
    return [*goal_lines(reports), *(line for report in reports for line in ["", *report_lines(report)])]


def report_lines(report: dict) -> list[str]:
    """Return all measurements of one device as Markdown."""
    lines = []
    for model, run in report["runs"].items():
        versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items() if number)
        rate = f"threads: {run['threads']}"
        if run["matmul_flops"]:
            rate += f"; {run['matmul_flops'] / 1e12:,.2f} TFLOP/s in large matrix products"
        lines += ["", f"**{model} on {report['device']}** ({run['date']}; {versions}; {rate})"]
        lines += ["", f"![pairs per second, and what each feature is worth](results/{chart_name(report, model)})"]
        for entry in entries_of(report, model, MAIN):
            lines += ["", f"{entry['name']} (prompts in a step: {entry['shape']['num_groups']}):", ""]
            lines += table(MAIN_COLUMNS, [_main_row(entry, name) for name in entry["variants"]])
        for entry in entries_of(report, model, ALTERNATIVES):
            lines += ["", f"{entry['name']}: other recipes and attention backends in place of fastrm's:", ""]
            lines += table(ALTERNATIVE_COLUMNS, [_alternative_row(entry, name) for name in entry["variants"]])
        for entry in entries_of(report, model, FEATURES):
            lines += ["", f"{entry['name']}: step time without a feature over that of fastrm:", ""]
            rows = [[name, "-" if value is None else f"{value:.2f}x"] for name, value in worth(report, entry)]
            lines += table(("feature", "worth"), rows)
            lines += _failures(entry)
        if run["left_out"]:
            lines += ["", "Not measured: " + "; ".join(run["left_out"]) + "."]
    return [*lines[1:], *profile_lines(report)]


def _main_row(entry: dict, name: str) -> list[str]:
    variant = entry["variants"][name]
    if variant["failed"]:
        return [name, variant["failed"]]
    low, high = variant["seconds"]["quartiles"]
    over, peak = speedup(entry, name, PLAIN), variant["peak_mib"]
    return [
        name if variant["checkpointing"] != "full" or name == PLAIN else f"{name} (full checkpointing)",
        f"{variant['seconds']['median']:.3f}", f"{low:.3f} - {high:.3f}", f"{variant['pairs_per_second']:.2f}",
        "-" if over is None else f"{over:.2f}x", f"{variant['useful_tokens_per_second']:,.0f}",
        f"{variant['processed_tokens_per_second']:,.0f}", "-" if peak is None else f"{peak:,.0f}",
        _percent(variant["matmul_share"]), f"{variant['gradient_error']:.1e}",
    ]  # fmt: skip


def _alternative_row(entry: dict, name: str) -> list[str]:
    variant = entry["variants"][name]
    if variant["failed"]:
        return [name, variant["failed"]]
    low, high = variant["seconds"]["quartiles"]
    over, peak = speedup(entry, name, FASTRM), variant["peak_mib"]
    return [
        name, f"{variant['seconds']['median']:.3f}", f"{low:.3f} - {high:.3f}", "-" if over is None else f"{over:.2f}x",
        "-" if peak is None else f"{peak:,.0f}", f"{variant['gradient_error']:.1e}",
    ]  # fmt: skip


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _failures(entry: dict) -> list[str]:
    failed = [f"{name}: {found['failed']}" for name, found in entry["variants"].items() if found["failed"]]
    return ["", "; ".join(failed)] if failed else []


def profile_lines(report: dict) -> list[str]:
    """Return where the time goes in the variants of goals that are missed."""
    missed = {
        (entry["name"], goal.name): entry["variants"][goal.name]
        for goal, entry, value in goals_of(report)
        if value < goal.at_least
    }
    lines = []
    for (workload, name), variant in missed.items():
        if "profile" not in variant:
            lines += ["", f"No profile of {name}, {workload}: {variant.get('profile_failed', 'not made')}."]
            continue
        profile = variant["profile"]
        phases = ", ".join(f"{phase} {seconds:.3f} s" for phase, seconds in profile["phases"].items())
        lines += ["", f"Where the time of {name} goes, {workload} ({phases}):", ""]
        rows = [
            [_short(operation), f"{calls:,}", f"{seconds:.4f}", f"{share:.1%}"]
            for operation, calls, seconds, share in profile["operations"]
        ]
        lines += table(("operation", "calls", "s", "share"), rows)
    return lines


def _short(operation: str, limit: int = 70) -> str:
    """Shorten a kernel's name for a cell: C++ templates fill whole pages."""
    operation = operation.replace("|", "/").replace("<", "(").replace(">", ")")
    return operation if len(operation) <= limit else operation[: limit - 3] + "..."


def chart_name(report: dict, model: str) -> str:
    """Return the file name of a model's chart, beside the results file."""
    return f"{file_stem(report['device'])}{SUFFIX.removesuffix('.json')}-{model.lower()}.png"


def draw_all(reports: Sequence[dict], folder: Path = RESULTS) -> list[Path]:
    """Draw the charts of all devices and models; return their files."""
    drawn = []
    for report in reports:
        for model in report["runs"]:
            drawn.append(folder / chart_name(report, model))
            draw(report, model, drawn[-1])
    return drawn


def draw(report: dict, model: str, file: Path) -> None:
    """Draw the chart of a model: speed of each variant and workload, and what each feature is worth."""
    figure = new_figure(13, 4.8)
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    _draw_variants(left, entries_of(report, model, MAIN))
    _draw_features(right, report, entries_of(report, model, FEATURES))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{model} model on {report['device']}")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def _draw_variants(axes, entries: Sequence[dict]) -> None:
    names = list(dict.fromkeys(name for entry in entries for name in entry["variants"]))
    width = 0.84 / max(1, len(names))
    for number, name in enumerate(names):
        ratios = [speedup(entry, name, PLAIN) or 0.0 for entry in entries]
        places = [place + (number - (len(names) - 1) / 2) * width for place in range(len(entries))]
        bars = axes.bar(places, ratios, width * 0.92, label=name, color=COLORS.get(name))
        axes.bar_label(bars, [f"{ratio:.1f}" if ratio else "-" for ratio in ratios], fontsize=8, padding=1)
    axes.set_xticks(range(len(entries)), [entry["name"].replace(", ", "\n") for entry in entries])
    axes.set_ylabel("pairs per second, plain = 1")
    axes.set_title("Whole training steps, by prefix/response tokens")
    axes.legend(frameon=False, loc="upper left")
    axes.margins(y=0.12)


def _draw_features(axes, report: dict, entries: Sequence[dict]) -> None:
    if not entries:
        axes.set_axis_off()
        return
    rows = sorted(((name, value) for name, value in worth(report, entries[0]) if value), key=lambda row: row[1])
    bars = axes.barh(
        [name for name, _ in rows], [value - 1 for _, value in rows], left=1, color=COLORS[FASTRM], height=0.6
    )
    # Labels stand right of the bar and the axis, so that neither crosses them.
    for bar, (_, value) in zip(bars, rows, strict=True):
        axes.annotate(
            f"{value:.2f}x", (max(value, 1), bar.get_y() + bar.get_height() / 2), (4, 0),
            textcoords="offset points", va="center", fontsize=8,
        )  # fmt: skip
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(x=0.15)
    axes.set_xlabel("step time without it, with it = 1")
    axes.set_title(f"What each feature is worth ({entries[0]['name']})")
