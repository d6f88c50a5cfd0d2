"""Commands on terminals of any width, and what stands on their screens in the end."""

import fcntl
import os
import pty
import re
import struct
import termios
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.killed_runs import ForkServer

_CONTROL = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|[\r\n]|[^\r\n\x1b]+")


@dataclass(frozen=True)
class Shown:
    """What a command has shown, and how it ended.

    Attributes:
        raw: every character it wrote, in order.
        lines: of the screen at the end, those that have scrolled away included.
        wrapped: lines of which the terminal has moved the end into the next, because they were too long.
        code: the exit code.
    """

    raw: str
    lines: list[str]
    wrapped: list[str]
    code: int

    def __str__(self) -> str:
        return "\n".join(self.lines)


class Terminals:
    """Runs `fastrm` in a forked process whose standard output and error are a terminal, or a file."""

    def __init__(self):
        self._server = ForkServer()

    def show(self, arguments: Sequence, width: int = 80, **environment: str) -> Shown:
        """Run a command on a terminal of that many columns; `environment` is added to the variables."""
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
        written: list[bytes] = []
        reader = threading.Thread(target=_read_all, args=(ours, written))
        reader.start()
        try:
            environment = {"TERM": "xterm-256color", **environment}
            self._server.command(arguments, Path(os.ttyname(theirs)), environment=environment)
            code = self._server.wait()
        finally:
            os.close(theirs)
            reader.join(60)
            os.close(ours)
        raw = b"".join(written).decode()
        return Shown(raw, *screen(raw, width), code)

    def pipe(self, arguments: Sequence, file: Path, **environment: str) -> Shown:
        """Run a command with standard output and error in a file, which is written anew."""
        file.unlink(missing_ok=True)
        self._server.command(arguments, file, environment=environment)
        code = self._server.wait()
        raw = file.read_bytes().decode(errors="strict")
        return Shown(raw, raw.split("\n"), [], code)

    def close(self) -> None:
        """End the server."""
        self._server.close()


def _read_all(terminal: int, written: list[bytes]) -> None:
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # how Linux says that nobody has the other side open
            return
        if not data:
            return
        written.append(data)


def screen(raw: str, width: int) -> tuple[list[str], list[str]]:
    """The lines that a terminal would show, and those that were too long for it.

    Knows what rich and click write: text, line ends, carriage returns, colours, moves of the cursor to lines above,
    and clearing of lines.

    Raises:
        AssertionError: for any other control sequence.
    """
    lines, row, column, wrapped = [""], 0, 0, []
    for found in _CONTROL.finditer(raw):
        text, numbers, letter = found[0], found[1], found[2]
        if text == "\r":
            column = 0
        elif text == "\n":  # the terminal has put a carriage return before it
            row, column = row + 1, 0
            lines += [""] * (row == len(lines))
        elif letter == "A":
            row = max(0, row - int(numbers or 1))
        elif letter == "K":
            assert numbers == "2", f"unknown control sequence {text!r}"
            lines[row] = ""
        elif letter is not None:
            assert letter in "mhl", f"unknown control sequence {text!r}"
        else:
            for character in text:
                if column == width:
                    wrapped.append(lines[row])
                    row, column = row + 1, 0
                    lines += [""] * (row == len(lines))
                line = lines[row].ljust(column)
                lines[row] = line[:column] + character + line[column + 1 :]
                column += 1
    return [line.rstrip() for line in lines], wrapped
