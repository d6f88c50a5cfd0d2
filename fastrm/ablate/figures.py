"""The figures of finished cells, by name: results.json lists them, and the table's columns choose among them."""

from collections.abc import Sequence
from pathlib import Path

from fastrm.ablate.folders import SUMMARY, read_json
from fastrm.ablate.grid import HELD_OUT, Cell, EnsembleCell, EvaluationConfig
from fastrm.ablate.work import evaluation_commands
from fastrm.train.metrics import read_rows


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


def _held_out(run_dir: Path) -> dict[str, float]:
    """Return the figures of the run's last evaluation."""
    rows = [row for row in read_rows(run_dir / "metrics.jsonl") if "eval/accuracy" in row]
    if not rows:
        return {}
    by_source = {f"{source}/accuracy": found["accuracy"] for source, found in rows[-1]["eval/sources"].items()}
    return {name: rows[-1][f"eval/{name}"] for name in ("accuracy", "loss", "margin")} | by_source


def flat_report(report: dict) -> dict[str, float]:
    """Return metric -> value of a report of `fastrm eval --json`, for a benchmark or a file of preferences."""
    if "metrics" in report:
        return {key: value for key, value in report["metrics"].items() if _is_number(value)}
    sources = {f"{source}/accuracy": found["accuracy"] for source, found in report.get("sources", {}).items()}
    return {"accuracy": report["accuracy"], **sources}


def _pooled(reports: Sequence[dict]) -> float:
    """Return the accuracy over the preferences of several reports together."""
    counts = [report["preferences"] for report in reports]
    return sum(report["accuracy"] * count for report, count in zip(reports, counts, strict=True)) / sum(counts)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
