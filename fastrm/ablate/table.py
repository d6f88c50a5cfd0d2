"""The table of a grid in the layout of the field's papers: rows are settings, columns are metrics."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from fastrm.ablate.grid import ColumnConfig
from fastrm.ablate.results import Results
from fastrm.ablate.statistics import Estimate
from fastrm.tables import Table

MISSING = "-"


@dataclass(frozen=True)
class TextTable:
    """A table, all of whose entries are texts.

    Attributes:
        rows: first the row's name, then its entries; `**` around an entry makes it bold.
        notes: lines below it.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]

    def as_markdown(self) -> str:
        """Return the table in GitHub's Markdown."""
        lines = [f"### {self.title}", "", _line(self.header), _line(["---", *["---:"] * (len(self.header) - 1)])]
        lines += [_line(row) for row in self.rows]
        return "\n".join([*lines, "", *self.notes]) + "\n"

    def as_table(self, styles: bool) -> Table:
        """Return the table for the screen, without its notes.

        Args:
            styles: write in bold what is bold; else it keeps its asterisks.
        """
        table = Table(*self.header, title=self.title)
        for row in self.rows:
            table.add_row(*(_bold(entry) if styles else entry for entry in row))
        return table


def main_table(results: Results) -> TextTable:
    """Return mean and 95 % t-interval over seeds of every column, the best in bold, printed figures beside them."""
    settings = results.grid.settings
    rows, columns = [*settings.rows, *settings.ensembles], settings.measured
    body = [[row] for row in rows]
    header = [next(iter(settings.axes))]
    for heading, group, _, column in columns:
        header.append(heading)
        found = [results.estimate(row, group, column.metric) for row in rows]
        best = _best(found, column)
        for line, entry in zip(body, found, strict=True):
            text = _entry(entry, column, len(settings.seeds))
            line.append(f"**{text}**" if entry is not None and entry.mean == best else text)
    for heading in _published_headings(results):
        header.append(f"paper: {heading}")
        for line in body:
            value = settings.published.rows.get(line[0], {}).get(heading)
            line.append(MISSING if value is None else _printed(value))
    return TextTable(settings.title, header, body, _notes(results))


def difference_table(results: Results) -> TextTable | None:
    """Return the differences of all rows from the reference row, paired by seed; None without one."""
    settings = results.grid.settings
    if settings.reference is None:
        return None
    columns = settings.measured
    rows = [
        [row, *(_difference(results.difference(row, group, column.metric), column) for _, group, _, column in columns)]
        for row in [*settings.rows, *settings.ensembles]
        if row != settings.reference
    ]
    notes = [
        "Mean of the differences seed by seed, ± half of its 95 % t-interval; in bold where that interval excludes 0. "
        f"Of {len(rows) * len(columns)} such intervals one in twenty would exclude 0 by chance alone."
    ]
    header = [next(iter(settings.axes)), *(heading for heading, *_ in columns)]
    return TextTable(f"Difference to {settings.reference}", header, rows, notes)


def _published_headings(results: Results) -> list[str]:
    published = results.grid.settings.published
    rows = published.rows.values() if published else ()
    return list(dict.fromkeys(heading for row in rows for heading in row))


def _best(found: Sequence[Estimate | None], column: ColumnConfig) -> float | None:
    means = [entry.mean for entry in found if entry is not None]
    if len(means) < 2 or column.best == "none":
        return None
    return max(means) if column.best == "highest" else min(means)


def _entry(found: Estimate | None, column: ColumnConfig, num_seeds: int) -> str:
    if found is None:
        return MISSING
    half = "" if found.half is None else f" ± {_number(found.half, column)}"
    return f"{_number(found.mean, column)}{half}" + (f" (n = {found.num})" if found.num != num_seeds else "")


def _difference(found: Estimate | None, column: ColumnConfig) -> str:
    if found is None:
        return MISSING
    half = "" if found.half is None else f" ± {_number(found.half, column)}"
    text = f"{_number(found.mean, column, sign='+')}{half}"
    return f"**{text}**" if found.excludes_zero else text


def _number(value: float, column: ColumnConfig, sign: str = "") -> str:
    digits = column.decimals
    return f"{round(value * column.scale, digits) + 0.0:{sign},.{digits}f}"  # + 0.0 turns -0.0 into 0.0


def _printed(value: float) -> str:
    """Format a value with one decimal or two, as papers print it."""
    return f"{value:.2f}".removesuffix("0")


def _notes(results: Results) -> list[str]:
    settings, num_seeds = results.grid.settings, len(results.grid.settings.seeds)
    spread = f"Mean ± half of the 95 % t-interval over n = {num_seeds} seeds" if num_seeds > 1 else "One seed"
    notes = [f"{spread}; the best mean of a column in bold."]
    if settings.published is not None:
        notes += ["", f"paper: {settings.published.source}."]
    if results.failed:
        notes += ["", f"{len(results.failed)} cells failed:"]
        notes += [f"- {name}: {' '.join(reason.split())}" for name, reason in results.failed.items()]
    return notes


def _bold(entry: str) -> Text:
    return Text(entry.strip("*"), "bold" if entry.startswith("**") else "")


def _line(entries: Sequence[str]) -> str:
    return "| " + " | ".join(entry.replace("|", "\\|") for entry in entries) + " |"
