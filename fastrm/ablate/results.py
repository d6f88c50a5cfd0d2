"""The figures of finished cells by name, their estimates over seeds, and results.json."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fastrm.ablate.grid import HELD_OUT, Cell, EnsembleCell, EvaluationConfig, Grid
from fastrm.ablate.statistics import Estimate, estimate, paired_difference
from fastrm.ablate.work import (
    SUMMARY,
    config_differences,
    evaluation_commands,
    is_finished,
    read_json,
    seconds_taken,
)
from fastrm.config import load_config
from fastrm.json_files import to_json
from fastrm.storage import write_whole
from fastrm.train.metrics import read_rows


@dataclass(frozen=True)
class Results:
    """The results of a grid.

    Attributes:
        metrics: by cell name; empty for a cell without figures.
        failed: reasons by cell name.
        seconds: wall clock by cell name.
    """

    grid: Grid
    metrics: dict[str, dict[str, float]]
    failed: dict[str, str]
    seconds: dict[str, float]

    def values(self, row: str, group: str, metric: str) -> dict[int, float]:
        """Return the values of one table entry, by seed."""
        cells = [*self.grid.cells, *self.grid.ensembles]
        found = [(cell.seed, self.metrics[cell.name]) for cell in cells if (cell.row, cell.group) == (row, group)]
        return {seed: metrics[metric] for seed, metrics in found if metric in metrics}

    def estimate(self, row: str, group: str, metric: str) -> Estimate | None:
        """Return the estimate over the seeds that have the metric; None if none has."""
        values = self.values(row, group, metric)
        return estimate(list(values.values())) if values else None

    def difference(self, row: str, group: str, metric: str) -> Estimate | None:
        """Return the difference from the reference row, paired by seed; None without a row or shared seeds."""
        reference = self.grid.settings.reference
        if reference is None:
            return None
        return paired_difference(self.values(row, group, metric), self.values(reference, group, metric))


def collect(grid: Grid, failed: dict[str, str]) -> Results:
    """Read the figures in the cells' folders."""
    cells = [*grid.cells, *grid.ensembles]
    metrics = {}
    for cell in cells:
        has_figures = isinstance(cell, EnsembleCell) or is_finished(cell.dir)
        metrics[cell.name] = cell_metrics(cell, grid.settings.evaluate) if has_figures else {}
    return Results(grid, metrics, failed, {cell.name: seconds_taken(cell.dir) for cell in cells})


def cell_metrics(cell: Cell | EnsembleCell, evaluations: Sequence[EvaluationConfig]) -> dict[str, float]:
    """Return a cell's figures: NAME/metric of every evaluation, and for a run also run/train_seconds and the like.

    An ensemble's held-out accuracy is pooled over the sources by their preferences.
    """
    metrics = {}
    if isinstance(cell, Cell):
        summary = read_json(cell.dir / SUMMARY) or {}
        metrics |= {f"run/{key}": value for key, value in summary.items() if _is_number(value)}
    for evaluation in evaluations:
        metrics |= {f"{evaluation.name}/{key}": value for key, value in _evaluated(cell, evaluation).items()}
    return metrics


def _evaluated(cell: Cell | EnsembleCell, evaluation: EvaluationConfig) -> dict[str, float]:
    if evaluation.target == HELD_OUT and isinstance(cell, Cell):
        return _held_out(cell.dir)
    reports = [read_json(command.out) for command in evaluation_commands(cell, evaluation)]
    if not reports or None in reports:
        return {}
    return flat_report(reports[0]) if len(reports) == 1 else {"accuracy": _pooled(reports)}


_COUNTS = ("preferences", "ratings", "texts")


def _held_out(run_dir: Path) -> dict[str, float]:
    """Return the figures of the run's last evaluation."""
    rows = [row for row in read_rows(run_dir / "metrics.jsonl") if "eval/loss" in row]
    if not rows:
        return {}
    found = {key.removeprefix("eval/"): value for key, value in rows[-1].items() if key.startswith("eval/")}
    for source, figures in found["sources"].items():
        found |= {f"{source}/{name}": value for name, value in figures.items() if name not in _COUNTS}
    return {name: value for name, value in found.items() if _is_number(value)}


def flat_report(report: dict) -> dict[str, float]:
    """Return metric -> value of a report of `fastrm eval --json`: for a benchmark, a file of preferences, or costs.

    A benchmark's own metrics have the same names for all paradigms; critics and judges have others beside them.
    """
    metrics = {key: value for key, value in report.get("metrics", {}).items() if _is_number(value)}
    if "metrics" in report and "judge" not in report:
        return metrics
    parts = report.get("costs", {}) | {
        source: {"accuracy": found["accuracy"]} for source, found in report.get("sources", {}).items()
    }
    found = report | {f"{part}/{name}": value for part, figures in parts.items() for name, value in figures.items()}
    return {name: value for name, value in found.items() if _is_number(value)} | metrics


def _pooled(reports: Sequence[dict]) -> float:
    """Return the accuracy over the preferences of several reports together."""
    counts = [report["preferences"] for report in reports]
    return sum(report["accuracy"] * count for report, count in zip(reports, counts, strict=True)) / sum(counts)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def write_json(results: Results, path: Path) -> None:
    """Write results.json, which appears complete or not at all."""
    write_whole(path, to_json(_as_json(results), indent=1) + "\n")


def _as_json(results: Results) -> dict:
    grid, settings = results.grid, results.grid.settings
    base = load_config(settings.base)
    entries = defaultdict(dict)
    for row in [*settings.rows, *settings.ensembles]:
        for place, group, _, column in settings.measured:
            entries[row][place] = {
                "values": results.values(row, group, column.metric),
                "estimate": _plain(results.estimate(row, group, column.metric)),
                "difference": _plain(results.difference(row, group, column.metric)),
            }
    return {
        "title": settings.title,
        "grid": str(grid.path),
        "settings": settings.model_dump(mode="json"),
        "table": entries,
        "cells": [_cell_json(cell, results, base) for cell in [*grid.cells, *grid.ensembles]],
    }


def _cell_json(cell: Cell | EnsembleCell, results: Results, base) -> dict:
    reason, metrics = results.failed.get(cell.name), results.metrics[cell.name]
    own = {"members": [member.name for member in cell.members]} if isinstance(cell, EnsembleCell) else {}
    if isinstance(cell, Cell):
        own["config"] = {key: new for key, (_, new) in config_differences(base, cell.config).items()}
        own["command"] = ["fastrm", "train", cell.base, *cell.overrides]
    return {
        "name": cell.name, "row": cell.row, "group": cell.group, "seed": cell.seed, "dir": str(cell.dir),
        "state": "failed" if reason else "finished" if metrics else "missing", "reason": reason,
        "seconds": results.seconds[cell.name], **own, "metrics": metrics,
    }  # fmt: skip


def _plain(found: Estimate | None) -> dict | None:
    return None if found is None else asdict(found)
