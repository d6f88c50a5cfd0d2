"""The results of a grid as a page, report.html: its tables and its reward curves."""

from collections.abc import Sequence
from pathlib import Path

from fastrm.ablate.curves import Draw, curve_charts
from fastrm.ablate.results import Results
from fastrm.ablate.table import TextTable
from fastrm.report.page import Chart, Charts, Paragraph, Section, SortableTable, chart, write_page
from fastrm.train.reward_curves import NAME
from fastrm.ui import new_figure


def write_grid_page(results: Results, tables: Sequence[TextTable], path: Path) -> None:
    """Write the page.

    Raises:
        StorageError: if it cannot be written.
    """
    sections = [_section(table) for table in tables]
    if curves := [_curve(results, draw, said) for draw, said in curve_charts(results)]:
        sections.append(Section(NAME, [Charts(curves)], NAME))
    write_page(path, results.grid.settings.title, f"A grid of fastrm in {results.grid.dir}", sections)


def _section(table: TextTable) -> Section:
    """Return a table with its notes; what is bold elsewhere stands between asterisks, as in table.md."""
    notes = [Paragraph(note) for note in table.notes if note]
    caption = "Rows are settings, columns are metrics; bold is between asterisks; report.png draws each column"
    return Section(table.title, [SortableTable(caption, table.header, table.rows), *notes])


def _curve(results: Results, draw: Draw, said: str) -> Chart:
    figure = new_figure(5.2, 3.4)
    draw(figure.subplots(), results)
    return chart(figure, said)
