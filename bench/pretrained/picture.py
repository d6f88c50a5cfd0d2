"""The picture of a run on human preferences: its curve, its margins on held-out pairs, and accuracy with intervals.

    fastrm score runs/human/run/model runs/human/eval.jsonl --out runs/human/rewards.jsonl
    python bench/pretrained/picture.py runs/human --docs    # and into docs/lab/pretrained.md, with a picture

Two intervals of 95 %: Wilson's, which takes the pairs for independent, and a bootstrap over prompts, since pairs of one
prompt share responses. Beside them stands how often the longer response is the better one.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.pretrained.tables import DOCS, LEARNING
from fastrm.evaluate.accuracy import wilson_interval
from fastrm.train.metrics import read_rows
from fastrm.ui import new_figure

RESAMPLES = 10_000
PICTURE = DOCS.with_name("pretrained.png")
COLOURS = {"captions": "tab:blue", "answers": "tab:orange"}


class Pair(NamedTuple):
    """A held-out pair: difference of rewards, better less worse response, and of lengths in characters.

    Lengths are in characters.
    """

    source: str
    prompt: str
    margin: float
    length_gap: int


def read_pairs(folder: Path) -> list[Pair]:
    """Read the rows of eval.jsonl with their rewards of rewards.jsonl, in order."""
    rows, rewards = (
        [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        for name in ("eval.jsonl", "rewards.jsonl")
    )
    pairs = []
    for row, scored in zip(rows, rewards, strict=True):
        assert row["id"] == scored["id"], f"rewards.jsonl: {scored['id']} where eval.jsonl has {row['id']}"
        margin = scored["rewards"][0] - scored["rewards"][1]
        pairs.append(Pair(row["source"], row["prompt"], margin, len(row["chosen"]) - len(row["rejected"])))
    return pairs


def bootstrap_interval(pairs: list[Pair]) -> tuple[float, float]:
    """Return the 95 % percentile interval of accuracy over resampled prompts, each with all its pairs."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for pair in pairs:
        groups[pair.prompt].append(pair.margin > 0)
    right, total = (np.array([count(group) for group in groups.values()]) for count in (sum, len))
    drawn = np.random.default_rng(0).integers(len(groups), size=(RESAMPLES, len(groups)))
    low, high = np.percentile(right[drawn].sum(1) / total[drawn].sum(1), [2.5, 97.5])
    return float(low), float(high)


def table(pairs: list[Pair]) -> list[str]:
    """Return the table of accuracy by source, as Markdown."""
    lines = [
        "| held-out pairs | pairs | prompts | accuracy | 95 %, pairs | 95 %, prompts | the longer one |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    sources = _sources(pairs)
    for source in [*sources, "all"] if len(sources) > 1 else sources:
        found = [pair for pair in pairs if source in (pair.source, "all")]
        right = sum(pair.margin > 0 for pair in found)
        longer = sum((pair.length_gap > 0) + 0.5 * (pair.length_gap == 0) for pair in found) / len(found)
        cells = [source, f"{len(found):,}", len({pair.prompt for pair in found}), f"{right / len(found):.3f}"]
        intervals = wilson_interval(right, len(found)), bootstrap_interval(found)
        cells += [f"{low:.3f} to {high:.3f}" for low, high in intervals]
        lines.append("| " + " | ".join(map(str, [*cells, f"{longer:.3f}"])) + " |")
    return lines


def draw(pairs: list[Pair], rows: list[dict], file: Path) -> None:
    """Draw loss and held-out accuracy over the steps, margins, and margins against the difference in length."""
    figure = new_figure(15, 4.4)
    curve, histogram, scatter = figure.subplots(1, 3)
    _draw_curve(curve, rows, _sources(pairs))
    for source, colour in _sources(pairs).items():
        found = [pair for pair in pairs if pair.source == source]
        margins = np.array([pair.margin for pair in found])
        share = float((margins > 0).mean())
        bins = np.linspace(-np.abs(margins).max(), np.abs(margins).max(), 41)
        histogram.hist(margins, bins, density=True, alpha=0.6, color=colour, label=f"{source}: {share:.1%} above 0")
        gaps = [pair.length_gap for pair in found]
        scatter.scatter(gaps, margins, s=9, alpha=0.5, color=colour, label=source, linewidths=0)
    histogram.axvline(0, color="black", linewidth=0.8)
    histogram.set(title="margins of held-out pairs", xlabel="reward of the preferred less that of the other", yticks=[])
    scatter.axhline(0, color="black", linewidth=0.8)
    scatter.set(
        title="margin and difference in length", xlabel="characters that the preferred one is longer", ylabel="margin"
    )
    scatter.set_xscale("symlog", linthresh=10)
    for axes in (histogram, scatter):
        axes.legend(frameon=False)
    figure.savefig(file, dpi=110)


def _sources(pairs: list[Pair]) -> dict[str, str]:
    found = {pair.source for pair in pairs}
    return {source: colour for source, colour in COLOURS.items() if source in found}


def _draw_curve(axes, rows: list[dict], sources: dict[str, str]) -> None:
    rows_with_loss = [row for row in rows if row.get("loss") is not None]
    steps = [row["step"] for row in rows_with_loss]
    losses = np.array([row["loss"] for row in rows_with_loss])
    width = max(1, len(losses) // 20)
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    axes.plot(steps, losses, color="lightgray", linewidth=0.8)
    axes.plot(steps[width - 1 :], smooth, color="black", label=f"training loss, mean of {width} steps")
    axes.axhline(np.log(2), color="gray", linewidth=0.8, linestyle=":")
    axes.set(xlabel="step", ylabel="loss (dotted: log 2)", title="training and held-out accuracy")
    right = axes.twinx()
    evaluations = [row for row in rows if "eval/accuracy" in row]
    for source, colour in sources.items():
        steps = [row["step"] for row in evaluations]
        found = [row["eval/sources"][source] for row in evaluations]
        middle = np.array([part["accuracy"] for part in found])
        bounds = [wilson_interval(round(p["accuracy"] * p["preferences"]), p["preferences"]) for p in found]
        errors = np.abs(np.array(bounds).T - middle)
        right.errorbar(steps, middle, yerr=errors, color=colour, marker="o", capsize=3, label=source)
    right.set_ylabel("held-out accuracy, 95 % (pairs)")
    handles = [axes.get_legend_handles_labels(), right.get_legend_handles_labels()]
    axes.legend(*[first + second for first, second in zip(*handles, strict=True)], frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="with eval.jsonl, rewards.jsonl and run/metrics.jsonl")
    parser.add_argument("--docs", action="store_true", help=f"write {DOCS.name} and {PICTURE.name}")
    arguments = parser.parse_args()
    pairs = read_pairs(arguments.folder)
    lines = table(pairs)
    print("\n".join(lines))
    if arguments.docs:
        draw(pairs, read_rows(arguments.folder / "run" / "metrics.jsonl"), PICTURE)
        summary = json.loads((arguments.folder / "run" / "summary.json").read_text())
        facts = (
            f"{summary['steps']:,} steps, {summary['preferences']:,} preferences, {summary['train_seconds'] / 60:.0f} "
            f"minutes; {summary['tokens_processed']:,} tokens where a pairwise trainer needs "
            f"{summary['tokens_unshared']:,}."
        )
        body = [facts, "", *lines, "", f"![Curve and margins]({PICTURE.name})"]
        LEARNING.write(body)


if __name__ == "__main__":
    main()
