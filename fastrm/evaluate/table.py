"""The figures of an evaluation as `fastrm.evaluate` returns them: a table with a row for each figure."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastrm.evaluate.benchmarks.report import Evaluation

if TYPE_CHECKING:
    import pandas

ALL = "all"


@dataclass(frozen=True, repr=False)
class EvaluationTable:
    """The figures of an evaluation, the overall one first.

    Attributes:
        rows: of preferences {"source", "accuracy", "low", "high", "preferences"}, the source "all" first; of a
            benchmark {"metric", "value", "low", "high"}, "overall" first. low and high bound the 95 % interval; figures
            are shares of 1, or None where nothing was scored.
        refused: the reason of each row of the data that was not scored. A benchmark's figures are not comparable with
            published ones while there is one.
        details: everything that `fastrm eval --json` would write.
    """

    rows: list[dict[str, Any]]
    refused: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """The overall figure: pair accuracy, or a benchmark's `overall`."""
        return self.rows[0].get("accuracy", self.rows[0].get("value"))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.rows[place]

    def to_pandas(self) -> "pandas.DataFrame":
        """Return the rows as a DataFrame."""
        import pandas

        return pandas.DataFrame(self.rows)

    def __repr__(self) -> str:
        return self.to_pandas().to_string(index=False)

    def _repr_html_(self) -> str:
        return self.to_pandas().to_html(index=False)


def preference_table(report: dict[str, Any]) -> EvaluationTable:
    """Return the table of a report on preferences."""
    rows = [_row(ALL, report)]
    if len(report["sources"]) > 1:
        rows += [_row(source, figures) for source, figures in report["sources"].items()]
    return EvaluationTable(rows, [f"{row['message']} ({row['code']})" for row in report["refused"]], report)


def _row(source: str, figures: dict[str, Any]) -> dict[str, Any]:
    low, high = figures["interval"]
    return {
        "source": source, "accuracy": figures["accuracy"], "low": low, "high": high,
        "preferences": figures["preferences"],
    }  # fmt: skip


def benchmark_table(evaluation: Evaluation) -> EvaluationTable:
    """Return the table of an evaluation on a benchmark."""
    details = evaluation.to_json()
    names = sorted(details["metrics"], key=lambda name: name != "overall")
    rows = [
        {"metric": name, "value": details["metrics"][name], "low": low, "high": high}
        for name in names
        for low, high in [details["intervals"].get(name) or (None, None)]
    ]
    return EvaluationTable(rows, list(evaluation.refused.values()), details)
