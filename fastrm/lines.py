"""Text in lines of a terminal, broken at words.

Imports the standard library alone: the end of a process that hangs must not wait for the import of another one.
"""

import os
import re
import unicodedata
from typing import TextIO

# Columns of a terminal that does not say how many it has.
USUAL_COLUMNS = 80


def text_width(text: str) -> int:
    """Return the columns that a terminal needs for a text: two for a wide character, none for a combining one."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))


def wrap(text: str, width: int, fold: bool = False) -> list[str]:
    """Return the lines of a text, broken at spaces.

    Further lines are indented as the first, or as what follows the dash of a list's item.

    Args:
        fold: break a word that is longer than a line, as in a column of a table. Otherwise it stays whole, so that
            a terminal breaks it, and a path can be copied from there in one piece.
    """
    lines = []
    for line in text.split("\n"):
        if text_width(line) <= width:
            lines.append(line)
            continue
        start = re.match(" *(- )?", line)[0]
        indent = " " * len(start)
        words = line[len(start) :].split()
        if fold:
            words = [piece for word in words for piece in _pieces(word, width - len(indent))]
        lines.append(start + "".join(words[:1]))
        for word in words[1:]:
            if text_width(lines[-1]) + 1 + text_width(word) <= width:
                lines[-1] += " " + word
            else:
                lines.append(indent + word)
    return lines


def _pieces(word: str, width: int) -> list[str]:
    pieces = [""]
    for character in word:
        if pieces[-1] and text_width(pieces[-1] + character) > width:
            pieces.append("")
        pieces[-1] += character
    return pieces


def given_columns() -> int | None:
    """Return the width that the variable COLUMNS asks for, on a terminal or in a file; None without one."""
    given = os.environ.get("COLUMNS", "")
    return int(given) or None if given.isdecimal() else None


def terminal_columns(stream: TextIO) -> int | None:
    """Return the columns of the terminal that a stream writes to; None where it writes to none."""
    if not stream.isatty():
        return None
    if columns := given_columns():
        return columns
    try:
        return os.get_terminal_size(stream.fileno()).columns or USUAL_COLUMNS
    except OSError:
        return USUAL_COLUMNS


def fit(text: str, stream: TextIO) -> str:
    """Return a text in lines of the terminal that a stream writes to; as it is where it writes to none."""
    columns = terminal_columns(stream)
    return text if columns is None else "\n".join(wrap(text, columns))
