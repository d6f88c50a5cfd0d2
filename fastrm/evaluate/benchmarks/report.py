"""The report of an evaluation on a benchmark: a table, published figures beside it, JSON, and a picture."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from fastrm.evaluate.benchmarks.benchmark import Benchmark
from fastrm.evaluate.benchmarks.metrics import NUM_RESAMPLES, Mean, Metrics, bootstrap, values_of
from fastrm.evaluate.benchmarks.published import CAPTION, published_rows
from fastrm.tables import Table
from fastrm.ui import new_figure

SEED = 0  # seed of the bootstrap
_COLOURS = ("#d1662a", "#2a9d62", "#8a5bb5", "#b5453c", "#2f9fb5", "#8c6d46", "#6b7280", "#c2a317", "#4d4dbb")


@dataclass(frozen=True)
class Evaluation:
    """The rewards of one model, ensemble, or file of scores on a benchmark.

    Attributes:
        name: of what was evaluated.
        rewards: of each row, by the row's number; rows that could not be scored are missing.
        refused: why, by the row's number.
        members: (name, rewards by row) of each member of an ensemble.
        settings: how the models were combined, for JSON.
    """

    benchmark: Benchmark
    name: str
    rewards: dict[int, list[float]]
    refused: dict[int, str] = field(default_factory=dict)
    members: list[tuple[str, dict[int, list[float]]]] = field(default_factory=list)
    settings: dict = field(default_factory=dict)

    @cached_property
    def metrics(self) -> Metrics:
        return self._measure(self.rewards)

    @cached_property
    def values(self) -> dict[str, float]:
        """The figures over the rows that were scored; NaN where there are none."""
        return values_of(self.metrics)

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float] | None]:
        """The 95 % bootstrap intervals; they cover the sampling of the benchmark's rows alone."""
        return bootstrap(self.metrics, SEED)

    @cached_property
    def member_values(self) -> list[tuple[str, dict[str, float]]]:
        return [(name, values_of(self._measure(rewards))) for name, rewards in self.members]

    def _measure(self, rewards: dict[int, list[float]]) -> Metrics:
        return self.benchmark.metrics([rewards[row] for row in sorted(rewards)], sorted(rewards))

    @property
    def coverage(self) -> str:
        """The number of rows behind the figures, in words."""
        total, scored = len(self.benchmark.rows), len(self.rewards)
        return f"{total:,} rows" if scored == total else f"PARTIAL: {scored:,} of {total:,} rows"

    def to_json(self) -> dict:
        """Return everything as plain values, with null for figures without rows."""
        rows = self.benchmark.rows
        return {
            "benchmark": self.benchmark.name,
            "files": list(self.benchmark.files),
            "rows": len(rows),
            "scored": len(self.rewards),
            "partial": len(self.rewards) < len(rows),
            "metrics": _finite(self.values),
            "intervals": self.intervals,
            "bootstrap": {"resamples": NUM_RESAMPLES, "seed": SEED, "level": 0.95},
            **self.settings,
            "members": [{"model": name, "metrics": _finite(values)} for name, values in self.member_values],
            "published": [vars(row) for row in published_rows(self.benchmark.name) if row.figures],
            "refused": [{"row": row, "id": rows[row].id, "message": text} for row, text in self.refused.items()],
            "scores": [
                {"row": row, "id": labels.id, "category": labels.category, "rewards": self.rewards.get(row)}
                for row, labels in enumerate(rows)
            ],
        }


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def figures_table(evaluation: Evaluation) -> Table:
    """Return the table of all metrics in percent with their intervals, an ensemble's members beside them."""
    caption = "\n".join(f"{number} {name}" for number, (name, _) in enumerate(evaluation.members, 1))
    table = Table(
        "metric", "counted", "ensemble" if evaluation.members else "value", "95 % interval",
        *map(str, range(1, len(evaluation.members) + 1)),
        title=f"{evaluation.benchmark.title} ({evaluation.coverage}), in percent", caption=caption,
    )  # fmt: skip
    for name, metric in _distinct(evaluation.metrics).items():
        counted = f"{int(metric.members.sum()):,} {metric.unit}" if isinstance(metric, Mean) else "mean"
        interval = evaluation.intervals[name]
        bounds = "-" if interval is None else f"{100 * interval[0]:.2f}-{100 * interval[1]:.2f}"
        members = [_percent(values[name]) for _, values in evaluation.member_values]
        table.add_row(name, counted, _percent(evaluation.values[name]), bounds, *members)
    return table


def comparison_table(evaluation: Evaluation) -> Table:
    """Return the headline metrics beside published figures; the caption has the sources."""
    headlines, published = evaluation.benchmark.headlines, published_rows(evaluation.benchmark.name)
    sources = list(dict.fromkeys(row.source for row in published if row.source))
    caption = "\n".join([*(f"{number} {source}" for number, source in enumerate(sources, 1)), CAPTION])
    title = f"{evaluation.benchmark.title} beside published figures, in percent"
    table = Table("model", *headlines, "from", title=title, caption=caption)
    num_rows = len(evaluation.benchmark.rows)
    here = "here" if evaluation.benchmark.is_whole else f"{num_rows:,} rows"
    here = here if len(evaluation.rewards) == num_rows else "PARTIAL"
    for name, values in [(evaluation.name, evaluation.values), *evaluation.member_values]:
        table.add_row(name, *(_percent(values[metric]) for metric in headlines), here)
    table.add_section()
    for row in published:
        figures = [row.figures.get(metric) for metric in headlines]
        cells = ["-" if figure is None else f"{figure:.2f}" for figure in figures]
        table.add_row(row.model, *cells, str(sources.index(row.source) + 1) if row.source else "-")
    return table


def _distinct(metrics: Metrics) -> Metrics:
    """Return the metrics without second names, such as `acc` where it is `overall`."""
    first: dict[int, str] = {}
    for name, metric in metrics.items():
        first.setdefault(id(metric), name)
    return {name: metrics[name] for name in first.values()}


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f}"


def draw(evaluation: Evaluation, path: Path) -> None:
    """Draw every metric with its interval, an ensemble's members as 1, 2, ..., and the published figures."""
    names = [name for name in _distinct(evaluation.metrics) if not math.isnan(evaluation.values[name])]
    figure = new_figure(10, 1.8 + 0.3 * len(names))
    axes = figure.subplots()
    places = {name: len(names) - 1 - number for number, name in enumerate(names)}
    values = [100 * evaluation.values[name] for name in names]
    bounds = [evaluation.intervals[name] for name in names]
    # A percentile interval need not hold the figure itself.
    errors = [
        [max(0.0, value - 100 * low) for value, (low, _) in zip(values, bounds, strict=True)],
        [max(0.0, 100 * high - value) for value, (_, high) in zip(values, bounds, strict=True)],
    ]
    axes.errorbar(
        values, list(places.values()), xerr=errors, fmt="o", color="#1f5fa8", capsize=3, markersize=6,
        label=f"{evaluation.name} (95 % interval)", zorder=3,
    )  # fmt: skip
    for number, (name, member) in enumerate(evaluation.member_values, 1):
        beside = 0.22 if number % 2 else -0.22  # distance from the line, since members often have the same figure
        axes.plot(
            [100 * member[metric] for metric in names], [place + beside for place in places.values()], linestyle="",
            marker=f"${number}$", color="#555555", markersize=6, label=name,
        )  # fmt: skip
    rows = [row for row in published_rows(evaluation.benchmark.name) if row.figures]
    for row, colour in zip(rows, _COLOURS, strict=False):
        points = [(figure, places[name]) for name, figure in row.figures.items() if name in places]
        if points:
            axes.plot(*zip(*points, strict=True), "D", color=colour, markersize=5, label=f"{row.model}, published")
    axes.set_yticks(list(places.values()), names)
    axes.set_ylim(-0.8, len(names) - 0.2)
    axes.set_xlim(-1, 101)
    axes.set_xlabel("percent")
    axes.grid(axis="x", alpha=0.3)
    axes.set_title(f"{evaluation.benchmark.title} ({evaluation.coverage})")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
