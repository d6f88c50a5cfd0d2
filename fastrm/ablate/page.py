"""The results of a grid as a page, report.html: its tables, its reward curves and its picture."""

from collections.abc import Sequence
from pathlib import Path

from fastrm.ablate.curves import Draw, curve_charts
from fastrm.ablate.picture import draw_results
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
    picture = chart(draw_results(results), "Each seed, the mean over seeds and its 95 % t-interval, for each column.")
    sections.append(Section("Picture", [Charts([picture])]))
    write_page(path, results.grid.settings.title, f"A grid of fastrm in {results.grid.dir}", sections)


def _section(table: TextTable) -> Section:
    rows = [[entry.strip("*") for entry in row] for row in table.rows]
    notes = [Paragraph(note) for note in table.notes if note]
    return Section(table.title, [SortableTable("Rows are settings, columns are metrics", table.header, rows), *notes])


def _curve(results: Results, draw: Draw, said: str) -> Chart:
    figure = new_figure(5.2, 3.4)
    draw(figure.subplots(), results)
    return chart(figure, said)
