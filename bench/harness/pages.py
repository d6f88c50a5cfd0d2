"""Pages in Markdown with a generated part between two markers."""

from collections.abc import Sequence
from pathlib import Path


def between(page: Path, text: str, marks: tuple[str, str], lines: Sequence[str]) -> str:
    """Replace the lines between the two markers in `text`.

    Args:
        page: whose text it is, for the error.

    Raises:
        ValueError: if a marker is missing, or there twice.
    """
    if any(text.count(mark) != 1 for mark in marks) or text.index(marks[0]) > text.index(marks[1]):
        raise ValueError(f"{page}: the markers {marks[0]!r} and {marks[1]!r} are wanted once each, one a line")
    before, rest = text.split(marks[0])
    return before + "\n".join([marks[0], "", *lines, "", marks[1]]) + rest.split(marks[1])[1]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table for a Markdown page; kernel_tables.table aligns its columns for a terminal."""
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]
