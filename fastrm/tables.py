"""Tables that fit the width there is.

Numbers stay whole, at the right of their columns. Where a table is too wide, headings and texts go on in further
lines, broken at words, and a text keeps at least _TEXT_WIDTH columns. Where that is not enough, columns that do not
stand beside the others follow below, each part with the first column again.
"""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import zip_longest

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from fastrm.lines import text_width, wrap

_GAP = 2  # columns of the terminal between two columns of a table
_TEXT_WIDTH = 20


@dataclass(frozen=True)
class _Row:
    cells: list[Text]
    style: str


class Table:
    """Rows below headings, in the width that there is.

    Args:
        headings: one for each column; all empty: the table has none.
        title: the line above it.
        caption: the text below it.
        text: numbers of the columns that hold texts, which may go on in further lines; all others hold numbers.
    """

    def __init__(self, *headings: str, title: str = "", caption: str = "", text: Collection[int] = (0,)):
        self.title, self.caption = title, caption
        self._headings, self._text = headings, frozenset(text)
        self._rows: list[_Row | None] = []

    @property
    def is_empty(self) -> bool:
        """True of a table that no row was added to."""
        return not self._rows

    def add_row(self, *cells: str | Text, style: str | None = None, end_section: bool = False) -> None:
        """Add a row; cells that are missing at its end are empty."""
        cells += ("",) * (len(self._headings) - len(cells))
        self._rows.append(_Row([cell if isinstance(cell, Text) else Text(cell) for cell in cells], style or ""))
        if end_section:
            self.add_section()

    def add_section(self) -> None:
        """Add a line between the rows before and the rows that follow."""
        self._rows.append(None)

    @property
    def width(self) -> int:
        """The number of a terminal's columns that show the table with nothing broken."""
        columns = range(len(self._headings))
        return sum(map(self._natural, columns)) + _GAP * (len(columns) - 1)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rule = "-" if options.ascii_only or console.is_dumb_terminal else "─"
        for line in self._layout(options.max_width, rule):
            line.no_wrap, line.overflow = True, "ignore"
            yield line

    def as_lines(self, width: int) -> list[str]:
        """Return the lines of the table, in ASCII but for its cells."""
        return [line.plain for line in self._layout(width, "-")]

    def _layout(self, width: int, rule: str) -> list[Text]:
        lines = [Text(line, "bold") for line in wrap(self.title, width)] if self.title else []
        for place, part in enumerate(self._parts(width)):
            lines += [Text()] * (place > 0)
            lines += self._part(part, self._widths(part, width), rule)
        return lines + ([Text(line) for line in wrap(self.caption, width)] if self.caption else [])

    def _cells(self, column: int) -> list[str]:
        return [row.cells[column].plain for row in self._rows if row is not None]

    def _natural(self, column: int) -> int:
        texts = [self._headings[column], *self._cells(column)]
        return max(text_width(line) for text in texts for line in text.split("\n"))

    def _least(self, column: int) -> int:
        """Return the width in which no number is cut, and a text has _TEXT_WIDTH columns."""
        words = [text_width(word) for word in self._headings[column].split()]
        if column in self._text:
            return max([min(_TEXT_WIDTH, self._natural(column)), *words])
        return max([0, *(text_width(line) for cell in self._cells(column) for line in cell.split("\n")), *words])

    def _parts(self, width: int) -> list[list[int]]:
        """Return which columns stand side by side; each part begins with the first."""
        parts = [[0]]
        for column in range(1, len(self._headings)):
            needed = sum(map(self._least, [*parts[-1], column])) + _GAP * len(parts[-1])
            if needed > width and len(parts[-1]) > 1:
                parts.append([0])
            parts[-1].append(column)
        return parts

    def _widths(self, part: list[int], width: int) -> list[int]:
        """Return the width of each column: with the lowest headings that fit beside whole texts, or the least."""
        texts = [column for column in part if column in self._text]
        gaps = _GAP * (len(part) - 1)
        for height in range(1, max(len(self._headings[column].split()) for column in part) + 1):
            widths = {column: self._at_height(column, height) for column in part}
            if sum(widths.values()) + gaps <= width:
                return list(widths.values())
        widths = {column: self._least(column) for column in part}
        spare = width - sum(widths.values()) - gaps
        for place, column in enumerate(sorted(texts, key=self._natural)):
            given = max(0, min(self._natural(column) - widths[column], spare // (len(texts) - place)))
            widths[column] += given
            spare -= given
        return list(widths.values())

    def _at_height(self, column: int, height: int) -> int:
        """Return the width in which the heading has at most `height` lines, and no text is broken."""
        if column in self._text:
            return self._natural(column)
        width = self._least(column)
        while len(wrap(self._headings[column], width)) > height:
            width += 1
        return width

    def _part(self, part: list[int], widths: list[int], rule: str) -> list[Text]:
        line = Text(rule * (sum(widths) + _GAP * (len(part) - 1)))
        found = []
        if any(self._headings[column] for column in part):
            headings = [wrap(self._headings[column], width) for column, width in zip(part, widths, strict=True)]
            height = max(map(len, headings))
            above = [[Text("")] * (height - len(texts)) + [Text(text, "bold") for text in texts] for texts in headings]
            found += [*self._lines(part, above, widths), line]
        for row in self._rows:
            found += [line] if row is None else self._lines(part, self._broken(row, part, widths), widths, row.style)
        return found

    def _broken(self, row: _Row, part: list[int], widths: list[int]) -> list[list[Text]]:
        """Return the lines of each cell."""
        broken = []
        for column, width in zip(part, widths, strict=True):
            cell = row.cells[column]
            lines = wrap(cell.plain, width, fold=True) if column in self._text else cell.plain.split("\n")
            broken.append([Text(line, cell.style) for line in lines])
        return broken

    def _lines(self, part: list[int], cells: list[list[Text]], widths: list[int], style: str = "") -> list[Text]:
        """Return cells side by side, texts at the left of their columns and numbers at the right."""
        lines = []
        for texts in zip_longest(*cells, fillvalue=Text()):
            line = Text(style=style)
            for place, (column, text, width) in enumerate(zip(part, texts, widths, strict=True)):
                blank = " " * (width - text_width(text.plain))
                line.append(" " * (_GAP * (place > 0)) + ("" if column in self._text else blank))
                line.append_text(text)
                line.append(blank if column in self._text else "")
            line.rstrip()
            lines.append(line)
        return lines
