"""The picture report.png: each setting's seeds, their mean and its interval, and printed figures beside them."""

from matplotlib.figure import Figure

from fastrm.ablate.grid import ColumnConfig
from fastrm.ablate.results import Results
from fastrm.ui import new_figure

BLUE, ORANGE = "#1f5fa8", "#d1662a"
# Points by which the paper's own tables differ for one nominal setting (the recipe's facts).
PUBLISHED_SPREAD = 4.0
PANELS_IN_A_ROW = 4


def draw_results(results: Results) -> Figure:
    """Draw one panel for each column of the table, with its rows from top to bottom."""
    settings = results.grid.settings
    rows = [*settings.rows, *settings.ensembles]
    measured = settings.measured
    printed = list(dict.fromkeys(heading for row in _published(results).values() for heading in row))
    num_panels = len(measured) + len(printed)
    wide = min(PANELS_IN_A_ROW, num_panels)
    deep = -(-num_panels // wide)
    figure = new_figure(2.4 + 3.1 * wide, deep * (1.4 + 0.36 * len(rows)))
    figure.suptitle(settings.title)
    panels = list(figure.subplots(deep, wide, sharey=True, squeeze=False).flat)
    for axes in panels[num_panels:]:
        axes.set_visible(False)
    for axes, (_, group, heading, column) in zip(panels, measured, strict=False):
        _draw_measured(axes, results, rows, group, column)
        axes.set_title(f"{group}\n{heading}" if group else heading, fontsize=10)
    for axes, heading in zip(panels[len(measured) :], printed, strict=False):
        _draw_published(axes, results, rows, heading)
        axes.set_title(f"paper\n{heading}", fontsize=10)
    panels[0].set_yticks(range(len(rows)), rows)
    panels[0].invert_yaxis()
    return figure


def _draw_measured(axes, results: Results, rows: list[str], group: str, column: ColumnConfig) -> None:
    scale = column.scale
    for place, row in enumerate(rows):
        values = [scale * value for value in results.values(row, group, column.metric).values()]
        if not values:
            axes.text(0.5, place, "no figure", transform=axes.get_yaxis_transform(), ha="center", va="center")
            continue
        found = results.estimate(row, group, column.metric)
        axes.plot(values, [place] * len(values), "o", color=BLUE, alpha=0.35, markersize=5, markeredgewidth=0)
        half = scale * found.half if found.half is not None else None
        axes.errorbar(scale * found.mean, place, xerr=half, fmt="D", color=BLUE, markersize=5, capsize=3)
    axes.grid(axis="x", alpha=0.25)
    axes.set_xlabel("%, mean and 95 % interval" if column.percent else "mean and 95 % interval", fontsize=8)


def _draw_published(axes, results: Results, rows: list[str], heading: str) -> None:
    for place, row in enumerate(rows):
        value = _published(results).get(row, {}).get(heading)
        if value is not None:
            axes.errorbar(value, place, xerr=PUBLISHED_SPREAD, fmt="D", color=ORANGE, markersize=5, capsize=3)
    axes.grid(axis="x", alpha=0.25)
    axes.set_xlabel(f"as printed, ±{PUBLISHED_SPREAD:g} between its tables", fontsize=8)


def _published(results: Results) -> dict[str, dict[str, float]]:
    published = results.grid.settings.published
    return published.rows if published else {}
