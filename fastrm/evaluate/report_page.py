"""The page of `fastrm eval --report`: accuracy, rewards, calibration, length, and the preferences to look at."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fastrm.data.record import Preference
from fastrm.data.show import as_example, show_record
from fastrm.evaluate import judged as figures
from fastrm.evaluate.accuracy import wilson_interval
from fastrm.evaluate.judged import MOST_SHOWN, Judged, Shown, by_label, calibration
from fastrm.limits import MediaLimits
from fastrm.report.page import Block, Cell, Chart, Charts, Facts, Paragraph, Section, SortableTable, chart, page
from fastrm.ui import new_figure

_GAPS = ((1, 50), (51, 200), (201, None))  # characters
_COLOURS = ("#1f77b4", "#d1662a")


def evaluation_page(judged: Judged, names: Sequence[str], data: str, limits: MediaLimits, refused: int = 0) -> str:
    """Return the page about one model, or about two side by side, as HTML.

    Args:
        names: of the models; several names of one model are an ensemble's members.
        refused: rows that were not counted.
    """
    compared = judged.num_models == 2
    labels = [f"{number} {name}" for number, name in enumerate(names, 1)] if compared else [" + ".join(names)]
    gaps = [_gap(gap) for gap in judged.gaps]
    tables = [_accuracies(judged, "source", judged.sources)]
    tables += [_accuracies(judged, "category", judged.categories)] if any(judged.categories) else []
    sections = [
        Section("Summary", _summary(judged, labels, refused)),
        Section("Accuracy by source" + (" and category" if len(tables) > 1 else ""), tables),
        Section("Rewards and calibration", [Charts([_histogram(judged, labels), _calibration(judged, labels)])]),
        Section("Length", [*_length(judged), _accuracies(judged, "length gap", gaps)]),
        Section("Where the models differ" if compared else "Most confident mistakes", _pairs(judged, limits)),
    ]
    return page("Two models compared" if compared else "Evaluation", f"{' and '.join(labels)} on {data}", sections)


def _summary(judged: Judged, labels: Sequence[str], refused: int) -> list[Block]:
    rows = []
    for number, label in enumerate(labels):
        margins = judged.margins[:, number]
        values = [float(margins.mean()), figures.bradley_terry_loss(margins), calibration(margins)[1]]
        right, count = int(judged.right[:, number].sum()), len(margins)
        rows.append([label, (f"{count:,}", count), *_share(right, count), *(_number(value) for value in values)])
    headings = ["model", "preferences", "accuracy", "95 % interval", "mean margin", "Bradley-Terry loss"]
    headings.append("calibration error")
    blocks: list[Block] = [SortableTable("Ties are left out; equal rewards count as wrong", headings, rows)]
    if judged.num_models == 2:
        flips = judged.flips()
        blocks.append(Facts([("only 1 right", f"{flips.gained:,}"), ("only 2 right", f"{flips.lost:,}")]))
        independent = "It takes preferences to be independent, which those of one prompt are not."
        blocks.append(Paragraph(f"{figures.sentence_of_test(flips)}. {independent}"))
    return blocks + ([Paragraph(f"Rows that could not be scored and are not counted: {refused:,}.")] if refused else [])


def _accuracies(judged: Judged, heading: str, labels: Sequence[str]) -> SortableTable:
    several = judged.num_models == 2
    headings = [heading, "preferences"]
    for number in range(judged.num_models):
        headings += [f"accuracy of {number + 1}" if several else "accuracy", "95 % interval"]
    rows = []
    for label, right in by_label(labels, lambda chosen: judged.right[chosen]).items():
        cells = [cell for number in right.sum(axis=0) for cell in _share(int(number), len(right))]
        rows.append([label or "none", (f"{len(right):,}", len(right)), *cells])
    return SortableTable(f"Accuracy by {heading}", headings, rows)


def _share(right: int, count: int) -> tuple[Cell, Cell]:
    low, high = wilson_interval(right, count)
    return (f"{right / count:.4f}", right / count), (f"{low:.4f} - {high:.4f}", low)


def _number(value: float) -> Cell:
    return "-" if math.isnan(value) else (f"{value:.4g}", value)


def _gap(gap: int) -> str:
    """Return the class of a difference in characters, in words whose order is that of the alphabet."""
    if gap == 0:
        return "equally long"
    low, high = next(bounds for bounds in _GAPS if bounds[1] is None or abs(gap) <= bounds[1])
    size = f"more than {low - 1}" if high is None else f"{low} to {high}"
    return f"{'longer' if gap > 0 else 'shorter'} by {size} characters"


def _length(judged: Judged) -> list[Block]:
    responses, gaps = judged.responses, judged.gaps
    first = " of 1" if judged.num_models == 2 else ""
    pairs = [(f"reward{first} and length of responses", figures.rank_correlation(*responses.T))]
    for number in range(judged.num_models):
        of = f" of {number + 1}" if judged.num_models == 2 else ""
        pairs.append((f"margin{of} and length gap", figures.rank_correlation(judged.margins[:, number], gaps)))
    sides = ["longer" if gap > 0 else "shorter" if gap < 0 else "equally long" for gap in gaps]
    return [
        Paragraph("Lengths are in characters. Spearman's correlations, from -1 to 1; - where one side never changes:"),
        Facts([(name, "-" if math.isnan(value) else f"{value:.3f}") for name, value in pairs]),
        _accuracies(judged, "length of the chosen response", sides),
    ]


def _histogram(judged: Judged, labels: Sequence[str]) -> Chart:
    figure = new_figure(5, 3 * len(labels))
    for number, axes in enumerate(np.atleast_1d(figure.subplots(len(labels)))):
        rewards = judged.rewards[:, number]
        edges = np.histogram_bin_edges(rewards, 40)
        for side, name in enumerate(("chosen", "rejected")):
            axes.hist(rewards[:, side], edges, histtype="stepfilled", alpha=0.5, color=_COLOURS[side], label=name)
        axes.set_xlabel("reward" if len(labels) == 1 else f"reward of {number + 1}")
        axes.set_ylabel("preferences")
        axes.legend(frameon=False)
    return chart(figure, "Rewards of the chosen and of the rejected responses")


def _calibration(judged: Judged, labels: Sequence[str]) -> Chart:
    figure = new_figure(5, 3)
    axes = figure.subplots()
    axes.plot([0.5, 1], [0.5, 1], color="#808080", linewidth=1)
    for number in range(len(labels)):
        bins, _ = calibration(judged.margins[:, number])
        if not bins:
            continue
        predicted, found, counts = map(np.array, zip(*bins, strict=True))
        bounds = [wilson_interval(round(share * count), count) for share, count in zip(found, counts, strict=True)]
        spread = np.abs(np.array(bounds).T - found)
        label = None if len(labels) == 1 else str(number + 1)
        axes.errorbar(predicted, found, spread, fmt="o-", color=_COLOURS[number], capsize=2, markersize=4, label=label)
    axes.set_xlabel("probability by the rewards (Bradley-Terry)")
    axes.set_ylabel("share that is right")
    axes.set_xlim(0.48, 1.02)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False)
    return chart(figure, "Probability that the response of larger reward is preferred, and how often it is; bars: 95 %")


def _pairs(judged: Judged, limits: MediaLimits) -> list[Block]:
    shown = judged.shown
    if not shown:
        return [Paragraph("There are none.")]
    several = judged.num_models == 2
    headings, rows = ["row", "source", "chosen longer by"], []
    headings += ["margin of 1", "margin of 2"] if several else ["margin"]
    for one in shown:
        preference, responses = one.preference, one.record.responses
        gap = len(responses[preference.winner].text) - len(responses[preference.loser].text)
        margins = [(f"{winner - loser:.4g}", winner - loser) for winner, loser in one.rewards]
        rows.append([one.record.origin, one.record.source, (f"{gap:,}", gap), *margins])
    order = "those on whose margins the models differ most" if several else "the most confident"
    caption = f"At most {MOST_SHOWN}, {order} first; margin: the chosen reward less the rejected one"
    return [SortableTable(caption, headings, rows), *(as_example(_row(one, several), limits) for one in shown)]


def _row(one: Shown, several: bool):
    winner, loser = one.record.responses[one.preference.winner], one.record.responses[one.preference.loser]
    pair = replace(one.record, responses=(winner, loser), preferences=(Preference(0, 1),))
    notes = [
        (f"model {number}: " if several else "") + f"reward {better:.4g} chosen, {worse:.4g} rejected"
        for number, (better, worse) in enumerate(one.rewards, 1)
    ]
    return show_record(pair, None, notes)
