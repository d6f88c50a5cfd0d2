"""Reward curves: held-out pair accuracy against the number of preferences that a run has trained on.

Steps of two runs are not comparable where their batches differ; preferences trained on are.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from fastrm.evaluate.accuracy import wilson_interval
from fastrm.report.page import Charts, Paragraph, Section, chart
from fastrm.ui import new_figure

NAME = "reward-curves"
_SAYS = (
    "Held-out pair accuracy against the preferences trained on. Bands are 95 % Wilson intervals, which take the "
    "held-out preferences as independent; several of one prompt are less than that."
)
_NOTES = {
    "critic": (
        "A critic's accuracy in a run is that of rewards behind the rows' own critiques, which may hold what the "
        "preference is about. fastrm eval reads rewards behind the critiques that the model writes: only that is "
        "comparable with other models."
    ),
    "judge": (
        "A judge has no accuracy in a run, which computes the loss of its texts alone. fastrm eval lets it write, "
        "and counts its verdicts."
    ),
}


@dataclass(frozen=True)
class CurvePoint:
    """A point of a reward curve.

    Attributes:
        seen: preferences trained on before the evaluation.
        low, high: the 95 % interval of the accuracy.
    """

    seen: int
    accuracy: float
    low: float
    high: float


def curve_points(rows: Sequence[dict]) -> dict[str, list[CurvePoint]]:
    """Return the reward curves of a run by named set of held-out data, that of all sets under "".

    Args:
        rows: of metrics.jsonl. Evaluations that do not say how many preferences were trained on and held out, as those
            of older runs, have no point.
    """
    found: dict[str, list[CurvePoint]] = {}
    for row in rows:
        for key in row if "preferences" in row else ():
            place, _, figure = key.rpartition("/")
            top, _, name = place.partition("/")
            if (top, figure) == ("eval", "accuracy") and (count := row.get(f"{place}/preferences")):
                low, high = wilson_interval(round(row[key] * count), count)
                found.setdefault(name, []).append(CurvePoint(row["preferences"], row[key], low, high))
    return found


def draw_curve(axes, points: Sequence[CurvePoint], colour: str, label: str, style: str = "o-") -> None:
    """Draw a reward curve with its interval as a band, or as a bar where there is one point only."""
    seen, accuracy = [point.seen for point in points], [point.accuracy for point in points]
    axes.plot(seen, accuracy, style, color=colour, markersize=3.5, linewidth=1.4, label=label)
    low, high = [point.low for point in points], [point.high for point in points]
    if len(points) > 1:
        axes.fill_between(seen, low, high, color=colour, alpha=0.15, linewidth=0)
    else:
        axes.vlines(seen, low, high, color=colour, alpha=0.4)


def reward_curves(runs: Mapping[str, Sequence[dict]], paradigms: Collection[str] = ()) -> list[Section]:
    """Return the section `reward-curves` of a page: one chart of all held-out data, one of each named set.

    Args:
        runs: rows of metrics.jsonl by the run's name.
        paradigms: those of the runs. What a run's own evaluation cannot know of one is said below the charts.

    Returns:
        No section if there is nothing to show or say.
    """
    curves = {name: curve_points(rows) for name, rows in runs.items()}
    parts = list(dict.fromkeys(part for found in curves.values() for part in found))
    if len(parts) == 2:  # a single named set is all there is
        parts = parts[:1]
    charts = []
    for part in parts:
        figure = new_figure(5.2, 3.1)
        axes = figure.subplots()
        drawn = {name: found[part] for name, found in curves.items() if part in found}
        for number, (name, points) in enumerate(drawn.items()):
            draw_curve(axes, points, f"C{number % 10}", name)
        finish_axes(axes)
        charts.append(chart(figure, f"The same of set {part} alone." if part else _SAYS))
    blocks = [*([Charts(charts)] if charts else ()), *(Paragraph(_NOTES[name]) for name in _NOTES if name in paradigms)]
    return [Section(NAME, blocks, NAME)] if blocks else []


def finish_axes(axes, cost: str = "") -> None:
    """Name the axes of a chart of held-out accuracies, with a line at chance; `cost` is not what was trained on."""
    axes.axhline(0.5, color="grey", linewidth=0.8, linestyle=":", label="chance")
    axes.set_ylim(top=1.01)
    axes.set_xlabel(cost or "training preferences seen")
    axes.set_ylabel("held-out pair accuracy")
    if not cost:
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)  # a frame would hide its names on a dark page
