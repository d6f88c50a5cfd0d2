"""Reward curves of a grid: accuracy against the preferences trained on, and against what a judgement costs."""

from collections.abc import Callable, Iterator
from pathlib import Path

from fastrm.ablate.results import Results
from fastrm.train.reward_curves import CurvePoint, draw_curve, finish_axes
from fastrm.ui import new_figure

SEEN = "run/preferences"
Draw = Callable[[object, Results], None]
_SAYS = (
    "Each row's accuracy after trainings of several lengths, each a run of its own: mean over seeds with its 95 % "
    "t-interval as a band, and each seed as a point."
)
_SAYS_COST = (
    "The accuracy after the longest training against what one judgement costs, on a logarithmic axis: mean over seeds "
    "with its 95 % t-interval, and each seed as a point."
)


def curve_charts(results: Results) -> Iterator[tuple[Draw, str]]:
    """Yield for each chart of a grid what draws it into axes, and what it shows; nothing without `curves`."""
    settings = results.grid.settings.curves
    if settings is not None:
        yield _draw_over_preferences, _SAYS
        if settings.cost is not None:
            yield _draw_over_cost, _SAYS_COST


def save_reward_curves(results: Results, path: Path) -> None:
    """Write the charts side by side as a PNG; nothing without `curves`."""
    charts = [draw for draw, _ in curve_charts(results)]
    if charts:
        figure = new_figure(5.6 * len(charts), 3.6)
        for axes, draw in zip(figure.subplots(1, len(charts), squeeze=False).flat, charts, strict=True):
            draw(axes, results)
        figure.savefig(path, dpi=110)


def _draw_over_preferences(axes, results: Results) -> None:
    """Draw a line for each row of the table."""
    metric = results.grid.settings.curves.accuracy
    for number, row in enumerate(results.grid.settings.rows):
        colour, points = f"C{number % 10}", []
        for group in results.grid.settings.groups:
            if _draw_seeds(axes, results, row, group, SEEN, metric, colour):
                seen, found = results.estimate(row, group, SEEN), results.estimate(row, group, metric)
                half = found.half or 0.0
                low, high = max(0.0, found.mean - half), min(1.0, found.mean + half)  # an accuracy is within them
                points.append(CurvePoint(round(seen.mean), found.mean, low, high))
        if points:
            draw_curve(axes, sorted(points, key=lambda point: point.seen), colour, row)
    finish_axes(axes)


def _draw_over_cost(axes, results: Results) -> None:
    """Draw a point for each row of the table."""
    settings, metric = results.grid.settings.curves, results.grid.settings.curves.accuracy
    axes.set_xscale("log")
    for number, row in enumerate(results.grid.settings.rows):
        colour, groups = f"C{number % 10}", results.grid.settings.groups
        seen = {group: found.mean for group in groups if (found := results.estimate(row, group, SEEN)) is not None}
        longest = max(seen, key=seen.get, default="")
        if _draw_seeds(axes, results, row, longest, settings.cost, metric, colour):
            cost, found = results.estimate(row, longest, settings.cost).mean, results.estimate(row, longest, metric)
            axes.errorbar(cost, found.mean, found.half, fmt="D", color=colour, markersize=5, capsize=3, label=row)
    finish_axes(axes, settings.cost_name)


def _draw_seeds(axes, results: Results, row: str, group: str, x: str, y: str, colour: str) -> bool:
    """Draw a point for each seed that has both metrics; return whether there is one."""
    across, up = results.values(row, group, x), results.values(row, group, y)
    seeds = [seed for seed in across if seed in up]
    axes.plot([across[seed] for seed in seeds], [up[seed] for seed in seeds], ".", color=colour, alpha=0.35)
    return bool(seeds)
