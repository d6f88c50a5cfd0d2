"""Tables of the kernel benchmarks, for the terminal and for bench/README.md."""

from collections.abc import Sequence

from bench import ROOT
from bench.harness.pages import Part, aligned_table
from bench.kernels.results import (
    ATTENTION,
    GOALS,
    HEAD,
    NOT_MEASURED,
    floor_ratio,
    is_goal_device,
    median,
    pair_ratio,
    ratio,
    verdict,
)
from bench.kernels.shapes import FORWARD, STEP

PART = Part(ROOT / "bench" / "README.md", "kernel tables", "bench/kernels/run_kernels.py --readme")
TITLES = {HEAD: "Preference head, forward and all gradients", ATTENTION: "Tree attention"}


def goal_table(report: dict | None) -> list[str]:
    rows = [(goal.text, goal.wanted, *verdict(goal, report)) for goal in GOALS]
    return aligned_table(("goal (forward + backward)", "wanted", "measured", "verdict"), rows)


def duration(seconds: float | None, quartiles: Sequence[float] | None = None) -> str:
    """Format seconds as 1.23 ms, or with quartiles as 1.23 ms (1.20 - 1.31), in the unit that fits the median."""
    if seconds is None:
        return "-"
    unit, scale = ("ms", 1e3) if seconds >= 1e-3 else ("us", 1e6)

    def digits(value):
        return f"{value * scale:.3g}" if value * scale < 100 else f"{value * scale:.0f}"

    spread = f" ({digits(quartiles[0])} - {digits(quartiles[1])})" if quartiles else ""
    return f"{digits(seconds)} {unit}{spread}"


def _cell(entry, variant, direction=STEP) -> str:
    found = entry["variants"].get(variant)
    if found is None:
        return "-"
    if found["failed"]:
        return "failed"
    seconds = found["seconds"].get(direction)
    return duration(seconds["median"], seconds["quartiles"]) if seconds else "-"


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _peaks(entry) -> str:
    """Return the peak memory of each variant in MiB; captured ones have it in a pool of their own."""
    found = {name: v["peak_mib"] for name, v in entry["variants"].items() if v["peak_mib"] is not None}
    return ", ".join(f"{name} {peak:,.{0 if peak >= 10 else 1}f}" for name, peak in found.items()) or "-"


def _standing(entry, ours: str, direction: str = STEP) -> str:
    """Return which variants are not slower than ours; a captured one is compared with captured ones only.

    Level: the ranges between the quartiles overlap.
    """
    if median(entry, ours, direction) is None:
        return "-"
    graph, found = ours.endswith("+graph"), []
    mine = entry["variants"][ours]["seconds"][direction]["quartiles"]
    for rival in entry["variants"]:
        value = ratio(entry, ours, rival, direction)
        if rival == ours or rival.endswith("+graph") != graph or value is None:
            continue
        theirs = entry["variants"][rival]["seconds"][direction]["quartiles"]
        if mine[0] <= theirs[1] and theirs[0] <= mine[1]:
            found.append(f"level with {rival} ({value:.2f}x)")
        elif value < 1:
            found.append(f"slower than {rival} ({value:.2f}x)")
    return "; ".join(found) or "fastest"


def variant_names(entries: Sequence[dict]) -> list[str]:
    """Return the names of all variants, in the order in which they first occur."""
    return list(dict.fromkeys(name for entry in entries for name in entry["variants"]))


def head_table(part: dict) -> list[str]:
    entries = sorted(part["entries"], key=_by_size)
    names, copy = variant_names(entries), part["copy_bytes_per_second"]
    ours = next((name for name in ("triton+graph", "triton") if name in names), "eager")
    header = ["shape", *names, "peak MiB", f"{ours} is"]
    rows = [[e["name"], *(_cell(e, name) for name in names), _peaks(e), _standing(e, ours)] for e in entries]
    if copy:
        header[1:1] = ["floor", f"{ours} / floor", f"GB/s of {ours}"]
        for entry, row in zip(entries, rows, strict=True):
            seconds = median(entry, ours)
            row[1:1] = [duration(entry["floor_bytes"] / copy), times(floor_ratio(entry, ours, copy)),
                        f"{entry['floor_bytes'] / seconds / 1e9:,.0f}" if seconds else "-"]  # fmt: skip
    if ours != "eager":
        header.insert(-2, f"{ours} against eager")
        for entry, row in zip(entries, rows, strict=True):
            row.insert(-2, times(ratio(entry, ours, "eager")))
    return aligned_table(header, rows)


def attention_table(part: dict, direction: str) -> list[str]:
    entries = sorted(part["entries"], key=_by_size)
    names = variant_names(entries)
    ours = "triton" if "triton" in names else "eager"
    rivals = [name for name in names if name != ours]
    rows = []
    for entry in entries:
        shape = entry["shape"]
        rows.append((
            entry["name"], str(shape["num_trees"]), f"{shape['num_tokens']:,}", times(shape["work_ratio"]),
            *(_cell(entry, name, direction) for name in names),
            *(times(ratio(entry, ours, rival, direction)) for rival in rivals),
            times(pair_ratio(entry, ours, direction)),
            " / ".join(_tflops(entry, name, direction) for name in names),
            *([_peaks(entry)] if direction == STEP else []), _standing(entry, ours, direction),
        ))  # fmt: skip
    header = ("shape", "trees", "tokens", "work of duplicates", *names, *(f"{ours} against {r}" for r in rivals),
              "time a pair, of duplicated",
              "TFLOP/s of " + " / ".join(names), *(["peak MiB"] if direction == STEP else []),
              f"{ours} is")  # fmt: skip
    return aligned_table(header, rows)


def _tflops(entry, variant, direction) -> str:
    seconds = median(entry, variant, direction)
    return f"{entry['flops'][direction] / seconds / 1e12:.3g}" if seconds else "-"


def build_table(part: dict) -> list[str]:
    """Return the table of the median milliseconds of building layouts and masks: smallest and largest shape."""
    rows = []
    for name in variant_names(part["entries"]):
        found = [e["variants"][name]["build_ms"] for e in part["entries"] if name in e["variants"]]
        found = [value for value in found if value is not None]
        if found:
            rows.append((name, f"{min(found):.2f}", f"{max(found):.2f}"))
    return aligned_table(("layout or mask of", "smallest, ms", "largest, ms"), rows)


def _by_size(entry: dict) -> tuple:
    """Return the key by which shapes are shown in order of size; they were measured in order of importance."""
    shape = entry["shape"]
    if "width" in shape:
        return (shape["dtype"], shape["width"], shape["rows"])
    return (not shape["causal"], -shape["heads"], shape["prefix"], shape["response"], shape["num_responses"])


def failures(part: dict) -> list[str]:
    """Return one line for each reason why variants have no figure."""
    reasons: dict[str, list[str]] = {}
    for entry in part["entries"]:
        for name, variant in entry["variants"].items():
            if variant["failed"]:
                reasons.setdefault(f"{name}: {variant['failed']}", []).append(entry["name"])
    return [f"failed: {reason} ({', '.join(names)})" for reason, names in reasons.items()] + [
        f"left out: {text}" for text in part["left_out"]
    ]


def operation_lines(op: str, part: dict) -> list[str]:
    """Return all tables of one operation on one device."""
    copy = part["copy_bytes_per_second"]
    versions = ", ".join(f"{name} {value}" for name, value in part["versions"].items() if value)
    lines = [f"{part['date']}; {versions}." + (f" A large copy moves {copy / 1e9:,.0f} GB/s." if copy else ""), ""]
    if op == HEAD:
        lines += head_table(part)
    else:
        lines += ["Forward and backward:", "", *attention_table(part, STEP), "", "Forward alone:", "",
                  *attention_table(part, FORWARD), "", *build_table(part)]  # fmt: skip
    found = failures(part)
    return [*lines, "", *(f"- {line}" for line in found)] if found else lines


def report_lines(report: dict) -> list[str]:
    """Return all tables of one device."""
    lines = []
    if is_goal_device(report["device"]):
        lines += [*goal_table(report), ""]
    for op, part in report["operations"].items():
        lines += [f"#### {TITLES[op]}", "", *operation_lines(op, part), ""]
    return lines[:-1]


def readme_section(reports: Sequence[dict]) -> list[str]:
    """Return the generated part of bench/README.md."""
    lines = []
    if not any(is_goal_device(report["device"]) for report in reports):
        lines += [f"H100 or H200: {NOT_MEASURED}.", "", *goal_table(None), ""]
    for report in reports:
        lines += [f"### {report['device']}", "", *report_lines(report), ""]
    return lines[:-1]
