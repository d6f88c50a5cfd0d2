"""The output for people: progress on standard error, tables and lines on standard output, and figures.

Progress is a bar on a terminal and a line every PLAIN_SECONDS elsewhere.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The seconds between plain lines if the output is not a terminal.
PLAIN_SECONDS = 10.0
# Columns of a piped table, wide enough that paths stay in one piece.
PIPE_WIDTH = 140


class RateColumn(ProgressColumn):
    """A column with the recent pace, in pieces per second."""

    def render(self, task: Task) -> Text:
        """Return `1,234/s`, or nothing before the pace is known."""
        return Text(_rate(task.finished_speed or task.speed or 0.0))


def _rate(pieces_per_second: float) -> str:
    if not pieces_per_second:
        return ""
    return f"{pieces_per_second:,.0f}/s" if pieces_per_second >= 10 else f"{pieces_per_second:.2g}/s"


class Display:
    """The progress of a command, on standard error.

    Args:
        silent: show nothing, on a process that others speak for.
    """

    def __init__(self, console: Console | None = None, silent: bool = False):
        self.console = console or Console(stderr=True, quiet=silent)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            RateColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print one line of plain text."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def task(self, description: str) -> Callable[..., None]:
        """Return a function update(done, total, note="") for one piece of work."""
        task = self._progress.add_task(description, total=None, note="")
        started = last = time.monotonic()
        first: tuple[int, float] | None = None  # (done, time) of the first call: earlier work does not count

        def update(done: int, total: int | None, note: str = "") -> None:
            nonlocal last, first
            self._progress.update(task, completed=done, total=total, note=note)
            now = time.monotonic()
            first = first or (done, now)
            if not self.console.is_terminal and (done == total or now - last >= PLAIN_SECONDS):
                last = now
                rate = (done - first[0]) / max(1e-9, now - first[1])
                speed = f", {_rate(rate)}" if rate else ""
                eta = f", ETA {(total - done) / rate:,.0f} s" if rate and total and done < total else ""
                of = f"/{total:,}" if total else ""
                self.say(f"{description}: {done:,}{of} {note} [{now - started:,.0f} s{speed}{eta}]")

        return update

    def count(self, description: str, items: Iterable) -> Iterator:
        """Pass items on while they are counted."""
        update, number = self.task(description), 0
        for number, item in enumerate(items, 1):
            if number % 256 == 0:
                self._progress.update(self._progress.task_ids[-1], completed=number)
            yield item
        update(number, number)


def make_console() -> Console:
    """Return a console on standard output, PIPE_WIDTH columns wide where that is no terminal."""
    console = Console()
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console


def say(console: Console, text: str) -> None:
    """Print one line as it is."""
    console.print(text, markup=False, highlight=False)


def show(console: Console, title: str, table: Table) -> None:
    """Print a table below its title."""
    # The title is a line of its own: a table wraps its title to its own width.
    console.print(title, style="bold", markup=False, highlight=False)
    console.print(table, markup=False)


def make_table(*columns: str) -> Table:
    """Return an empty table whose first column is text and whose others are numbers."""
    table = Table()
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def gib(num_bytes: float) -> str:
    """Write bytes as GiB."""
    return f"{num_bytes / 2**30:,.1f}"


def peta(flops: float) -> str:
    """Write operations in units of 10^15."""
    return f"{flops / 1e15:,.3f}"


def seconds(value: float) -> str:
    """Write seconds with three digits or more."""
    return f"{value:,.1f}" if value >= 100 else f"{value:.2f}" if value >= 10 else f"{value:.3f}"


def gpus(count: int) -> str:
    """Write a number of GPUs."""
    return f"{count:,} GPU{'s' * (count > 1)}"


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of matplotlib for a PNG, its size in inches; no window and no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
