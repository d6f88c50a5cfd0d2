"""The report of a preparation: report.json, report.png, and tables of the sources' rows.

The sharing factor is the number of tokens that a pairwise trainer processes, which runs both conversations of
every preference whole, over that of the groups' prefix trees. The predicted speed-up is the same quotient in a
cost model's FLOPs: tokens, query-key pairs of causal attention, and images, which the pairwise trainer
encodes twice for every preference and a group once. Both are of single groups: groups of one pack that
begin with the same image save more.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from fastrm.config import Config
from fastrm.data.balance import CostModel
from fastrm.data.paradigm import reading_of
from fastrm.data.prepared.count import Counted, refusals
from fastrm.data.prepared.findings import PAIR, PairFindings, bare_sentence, find_in_pairs
from fastrm.data.prepared.records import read_refusals
from fastrm.data.prepared.select import Selection
from fastrm.data.prepared.units import PAIRS, REFUSED, RecordTable
from fastrm.data_config import SourceConfig
from fastrm.json_files import to_json
from fastrm.storage import write_whole
from fastrm.tables import Table
from fastrm.ui import new_figure

HISTOGRAMS = {
    "tokens": "tokens of a group",
    "image_tokens": "image tokens (merged patches) of a group",
    "responses": "responses of a group",
}
_NUM_BINS = 40
_FAR = 20  # ratio of the largest to the smallest value from which on bins are of equal ratio


def make_report(
    config: Config,
    table: RecordTable,
    removed: dict[str, np.ndarray],
    chosen: dict[str, Selection],
    counted: dict[str, Counted],
    cost: CostModel,
) -> dict:
    """Make the contents of report.json.

    Returns:
        {"sources": one row of counts for each source of each split, "histograms": {name: {"edges", "counts"}},
        "sharing": tokens and costs of an epoch, and their quotients}.
    """
    rows, reading = [], reading_of(config)
    for split, selection in chosen.items():
        is_split = table.is_of(split)
        for number, source in enumerate(config.data.sources(split).values()):
            mine = is_split & (table.source == number)
            rows.append(
                {"split": split, "source": source_label(source)}
                | _reading(table, split, number, mine, removed)
                | _grouping(table, selection, counted[split], number)
                | ({} if reading is None else {"without": {reading.lesson: int(table.columns["num_bare"][mine].sum())}})
            )
    train = counted["train"]
    times = chosen["train"].times[train.counts["selected"]]
    trained = times > 0
    values = {
        "tokens": train.counts["num_tokens"],
        "image_tokens": image_tokens(train),
        "responses": train.counts["num_responses"],
    }
    return {
        "sources": rows,
        "histograms": {name: _histogram(found[trained]) for name, found in values.items()},
        "sharing": _sharing(train, times, cost, 1 if config.loss.is_rating else 2),
    }


def source_label(source: SourceConfig) -> str:
    """Return the name of a source in a report."""
    return source.name or source.set or source.path


def image_tokens(counted: Counted) -> np.ndarray:
    """Return (G,) int64: the tokens of each group's distinct images and videos."""
    images = counted.images
    each = images["height"].astype(np.int64) * images["width"] * images["frames"]
    return _sums(each, counted.counts["num_images"])


def _reading(table: RecordTable, split: str, number: int, mine: np.ndarray, removed: dict[str, np.ndarray]) -> dict:
    """Return counts of a source's rows: read, refused, and kept from training."""
    refused, partial = Counter(), Counter()
    for unit in table.units:
        if (unit.split, unit.source) == (split, number):
            for refusal in read_refusals(table.folder / unit.name / REFUSED):
                (partial if refusal.partial else refused)[refusal.code] += 1
    kinds = {kind: int((matches & mine).sum()) for kind, matches in removed.items() if kind != "copy_of"}
    is_copy = removed["copy_of"] != np.arange(len(table))
    matched = np.zeros(len(table), dtype=bool)
    for kind in kinds:
        matched |= removed[kind]
    return {
        "rows": int(mine.sum()) + refused.total(),
        "refused_reading": dict(refused),
        "parts_left_out": dict(partial),  # parts of records that live on without them
        "duplicates": int((is_copy & mine).sum()),
        "contaminated": {"removed": int((matched & mine & ~is_copy).sum()), **kinds},
        "pairs": asdict(_find_in_pairs(table, split, number)),
    }


def _find_in_pairs(table: RecordTable, split: str, number: int) -> PairFindings:
    """Find contradictions and lengths in a source's preferences as they were read."""
    mine = [unit for unit in table.units if (unit.split, unit.source) == (split, number)]
    return find_in_pairs(np.concatenate([np.empty(0, PAIR), *(np.load(table.folder / u.name / PAIRS) for u in mine)]))


def pair_lines(report: dict) -> list[str]:
    """Return one line for each finding in the sources' preferences and texts that a model may learn from, or cannot."""
    lines = []
    for row in report["sources"]:
        pairs = PairFindings(**row["pairs"])
        bare = [bare_sentence(*item) for item in row.get("without", {}).items()]
        found = [one for one in (pairs.contradiction, pairs.liking, *bare) if one is not None]
        lines += [f"{row['source']}: {sentence}" for sentence in found]
    return lines


def _grouping(table: RecordTable, selection: Selection, counted: Counted, number: int) -> dict:
    """Return counts of the groups and the fate of a source's kept records."""
    mine = table.source[selection.first] == number
    sizes = np.diff(selection.starts)
    of_mine = mine[counted.counts["selected"]]
    counts = counted.counts[of_mine]
    times = selection.times[counts["selected"]]
    held_out = selection.held_out[counts["selected"]]
    refused = Counter(
        refusal.code for refusal, group in zip(refusals(counted), counted.refused_of, strict=True) if mine[group]
    )
    return {
        "records": int(sizes[mine].sum()),
        "merged": int(sizes[mine].sum() - mine.sum()),
        "not_drawn_groups": int((mine & ~selection.is_used).sum()),
        "not_drawn_records": int(sizes[mine & ~selection.is_used].sum()),
        "refused_counting": dict(refused),
        "groups": len(counts),
        "held_out_groups": int(held_out.sum()),
        "ties_ignored": int(counts["num_ties_ignored"].sum()),
        "preferences": int(counts["num_preferences"].sum()),
        "tokens": int(counts["num_tokens"].sum()),
        "epoch_groups": int(times.sum()),
        "epoch_preferences": int((times * counts["num_preferences"]).sum()),
        "epoch_tokens": int((times * counts["num_tokens"]).sum()),
        "epoch_unshared_tokens": int((times * counts["num_unshared_tokens"]).sum()),
    }


def _sharing(counted: Counted, times: np.ndarray, cost: CostModel, per_preference: int) -> dict:
    """Return tokens of an epoch, exact, and its FLOPs as float64, as pairwise trainer and as prefix trees.

    Args:
        per_preference: conversations of a preference: 2, or 1 where it is a rating.
    """
    counts = counted.counts
    pictures = _sums(_image_costs(counted.images, cost), counts["num_images"])
    shared = _text_costs(counts["num_tokens"], counts["num_attention_pairs"], cost) + pictures
    unshared = _text_costs(counts["num_unshared_tokens"], counts["num_unshared_pairs"], cost)
    unshared += per_preference * counts["num_preferences"] * pictures
    tokens, unshared_tokens = (int((times * counts[name]).sum()) for name in ("num_tokens", "num_unshared_tokens"))
    return {
        "tokens": tokens,
        "unshared_tokens": unshared_tokens,
        "sharing_factor": unshared_tokens / max(1, tokens),
        "predicted_speedup": float((times * unshared).sum() / max(1e-9, (times * shared).sum())),
    }


def _text_costs(num_tokens: np.ndarray, num_pairs: np.ndarray, cost: CostModel) -> np.ndarray:
    """Return (G,) float64; a cost model may hold Python integers, whose products have 60 bits and more."""
    return float(cost.per_token) * num_tokens + float(cost.per_attention_pair) * num_pairs


def _image_costs(images: np.ndarray, cost: CostModel) -> np.ndarray:
    """Return (M,) float64; each of the few sizes among many images is computed once."""
    sizes = images[["height", "width", "frames"]]
    distinct, back = np.unique(sizes, return_inverse=True)
    return np.array([cost.of_medium(*size.item()) for size in distinct], dtype=np.float64)[back]


def _sums(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the sums (G,) of runs of values."""
    ends = np.cumsum(counts)
    totals = np.concatenate([[0], np.cumsum(values)])
    return totals[ends] - totals[ends - counts]


def _histogram(values: np.ndarray) -> dict:
    """Count values in bins of equal width, or of equal ratio where they reach far; zeros are apart."""
    positive = values[values > 0]
    if not len(positive):
        return {"edges": [], "counts": [], "zero": len(values)}
    low, high = int(positive.min()), int(positive.max()) + 1
    spaced = np.geomspace if high > _FAR * low else np.linspace
    edges = np.unique(np.ceil(spaced(low, high, _NUM_BINS + 1)).astype(np.int64))
    counts, edges = np.histogram(positive, edges)
    return {"edges": edges.tolist(), "counts": counts.tolist(), "zero": int((values == 0).sum())}


def write_report(report: dict, folder: Path) -> None:
    """Write report.json."""
    write_whole(folder / "report.json", to_json(report, indent=1) + "\n")


def draw_report(report: dict, path: Path) -> None:
    """Draw report.png: the fate of every source's rows, and the lengths of groups."""
    figure = new_figure(12, 8)
    sharing = report["sharing"]
    figure.suptitle(
        f"Prepared data: {sharing['tokens']:,} tokens an epoch, sharing factor {sharing['sharing_factor']:.2f}, "
        f"predicted speed-up {sharing['predicted_speedup']:.2f}"
    )
    axes = figure.subplots(2, 2)
    _draw_sources(axes[0, 0], report["sources"])
    for place, (name, label) in zip((axes[0, 1], axes[1, 0], axes[1, 1]), HISTOGRAMS.items(), strict=True):
        _draw_histogram(place, report["histograms"][name], label)
    figure.savefig(path, dpi=110)


def _draw_sources(axes, rows: Sequence[dict]) -> None:
    parts = {
        "kept": (_num_kept, "#1f5fa8"),
        "not drawn": (lambda row: row["not_drawn_records"], "#c9c9c9"),
        "duplicate": (lambda row: row["duplicates"], "#9bb8d9"),
        "contaminated": (lambda row: row["contaminated"]["removed"], "#d1662a"),
        "refused": (_num_refused, "#b03030"),
    }
    left = np.zeros(len(rows))
    for label, (value, colour) in parts.items():
        widths = np.array([value(row) for row in rows])
        axes.barh(np.arange(len(rows)), widths, left=left, color=colour, label=label)
        left += widths
    axes.set_yticks(np.arange(len(rows)), [f"{_end_of(row['source'])} ({row['split']})" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_title("Rows by source", fontsize=10)
    axes.locator_params(axis="x", nbins=6)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(fontsize=8, ncols=len(parts), loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)


def _end_of(name: str, length: int = 32) -> str:
    """Return the end of a name, which tells files of one folder apart."""
    return name if len(name) <= length else f"…{name[1 - length :]}"


def _draw_histogram(axes, histogram: dict, label: str) -> None:
    axes.set_title(f"{label}, {histogram['zero']:,} without" if histogram["zero"] else label, fontsize=10)
    axes.set_ylabel("groups")
    axes.grid(alpha=0.25)
    if histogram["edges"]:
        edges = histogram["edges"]
        # A bin [a, b) of whole numbers, drawn around them.
        axes.stairs(histogram["counts"], np.array(edges) - 0.5, fill=True, color="#1f5fa8")
        if edges[-1] > _FAR * edges[0]:
            axes.set_xscale("log")
            ticks = [digit * 10**power for power in range(9) for digit in (1, 2, 5)]
            axes.set_xticks([tick for tick in ticks if edges[0] <= tick <= edges[-1]])
            axes.minorticks_off()
        else:
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,.0f}")


def report_tables(report: dict) -> list[Table]:
    """Return the tables that a preparation ends with: what is trained on, and what became of the other rows."""
    headings, rows = describe_sources(report)
    kept = Table(*headings, title="Prepared data")
    left = Table("source", "what", "number", title="Rows and parts that are not trained on as they were", text=(0, 1))
    for (label, *numbers), row in zip(rows, report["sources"], strict=True):
        kept.add_row(label, *(f"{number:,}" for number in numbers))
        for what, number in _losses(row).items():
            left.add_row(label, what, f"{number:,}")
            label = ""
    return [kept] if left.is_empty else [kept, left]


def describe_sources(report: dict) -> tuple[list[str], list[tuple]]:
    """Return headings, and for each source of a report its name and its numbers."""
    labels = [("eval: " if row["split"] == "eval" else "") + row["source"] for row in report["sources"]]
    numbers = [_table_row(row) for row in report["sources"]]
    return ["source", *numbers[0]], [(label, *row.values()) for label, row in zip(labels, numbers, strict=True)]


def _table_row(row: dict) -> dict[str, int]:
    is_train = row["split"] == "train"
    return {
        "rows": row["rows"],
        "kept": _num_kept(row),
        "groups": row["epoch_groups"] if is_train else row["groups"],
        "pairs": row["epoch_preferences"] if is_train else row["preferences"],
        "tokens": row["epoch_tokens"] if is_train else row["tokens"],
    }


def _num_kept(row: dict) -> int:
    return row["records"] - sum(row["refused_counting"].values()) - row["not_drawn_records"]


def _num_refused(row: dict) -> int:
    return sum(row["refused_reading"].values()) + sum(row["refused_counting"].values())


def _losses(row: dict) -> dict[str, int]:
    """Return the counts, without zeros, of a source's lost rows by reason."""
    refused = Counter(row["refused_reading"]) + Counter(row["refused_counting"])
    kinds = dict(row["contaminated"])
    losses = {
        **{f"rows refused, {code}": number for code, number in refused.most_common()},
        **{f"parts of rows left out, {code}": number for code, number in row["parts_left_out"].items()},
        "copies removed": row["duplicates"],
        "contaminated, removed": kinds.pop("removed"),
        **{f"- matches by {kind}": number for kind, number in kinds.items()},
        "merged into a group of the same prompt": row["merged"],
        "ties left out": row["ties_ignored"],
        "groups held out": row["held_out_groups"],
        "groups not drawn, by cap and repeat": row["not_drawn_groups"],
    }
    return {what: number for what, number in losses.items() if number}


def sharing_line(report: dict) -> str:
    """Return one line about the saving by prefix trees."""
    sharing = report["sharing"]
    return (
        f"an epoch has {sharing['tokens']:,} tokens; a pairwise trainer would process {sharing['unshared_tokens']:,}: "
        f"sharing factor {sharing['sharing_factor']:.2f}, predicted speed-up {sharing['predicted_speedup']:.2f}"
    )
