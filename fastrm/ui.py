"""The output for people: progress on standard error, tables and lines on standard output, and figures.

The rules, wherever output goes:

- No number is cut or broken, and no row wraps: a table makes itself fit (tables.py). No column is left out, but for
  the list of published sets, which names those that a wider terminal shows.
- Sentences are broken at words. In a file, a message stays in one line, where programs look for it.
- Progress is a line that is rewritten on a terminal and disappears when the work is done. What stays is what a file
  gets: a plain line at the end of the work, and every PLAIN_SECONDS where nothing can be rewritten.
- A dumb terminal gets no colours and no line-drawing characters; a file gets them where its encoding has them.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.progress import Progress, Task
from rich.text import Text

from fastrm.lines import given_columns, terminal_columns, text_width, wrap
from fastrm.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Seconds between plain lines where nothing can be rewritten.
PLAIN_SECONDS = 10.0
# The width of what is written to a file, in columns: wide enough that paths stay in one piece.
PIPE_WIDTH = 140
_BAR_WIDTH = 24


_is_quiet = False


def be_quiet(value: bool) -> None:
    """Let consoles on standard error that are made from now on print nothing, as --quiet asks for, or print again."""
    global _is_quiet
    _is_quiet = value


def make_console(stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console on standard output or error, as wide as its terminal; PIPE_WIDTH where it is none."""
    console = Console(stderr=stderr, quiet=quiet or (stderr and _is_quiet))
    if not console.is_terminal:
        console.width = given_columns() or PIPE_WIDTH
    elif console.is_dumb_terminal:  # rich takes 80 for any
        console.width = terminal_columns(console.file) or console.width
    return console


def say(console: Console, text: str) -> None:
    """Print plain text in lines of the console's width, broken at words."""
    _print(console, "\n".join(wrap(text, console.width)))


def message(console: Console, text: str) -> None:
    """Print plain text: in lines broken at words on a terminal, in one line in a file."""
    if console.is_terminal:
        say(console, text)
    else:
        _print(console, text)


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def is_live(console: Console) -> bool:
    """Return whether lines that stand on the console can be rewritten."""
    return console.is_terminal and not console.is_dumb_terminal


_open: list["Display"] = []  # the innermost last


class Display:
    """The progress of a command, on standard error.

    Args:
        silent: show nothing, on a process that others speak for.
    """

    def __init__(self, console: Console | None = None, silent: bool = False):
        self.console = console or make_console(stderr=True, quiet=silent)
        is_shown = is_live(self.console) and not self.console.quiet
        self._progress = _Progress(console=self.console, transient=True, disable=not is_shown)

    def __enter__(self) -> "Display":
        self._progress.start()
        _open.append(self)
        return self

    def __exit__(self, *_) -> None:
        _open.remove(self)
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print plain text: in lines broken at words on a terminal, in one line in a file."""
        message(self.console, text)

    def task(self, description: str, is_brief: bool = False) -> Callable[..., None]:
        """Return a function update(done, total, note="") for one piece of work.

        Args:
            is_brief: leave no line if the work is done within PLAIN_SECONDS.
        """
        task = self._progress.add_task(description, total=None, note="")
        started = last = time.monotonic()
        first: tuple[int, float] | None = None  # (done, time) of the first call: earlier work does not count

        def update(done: int, total: int | None, note: str = "") -> None:
            nonlocal last, first
            is_done = done == total
            fields = {"note": note, "visible": not is_done, "refresh": is_done}
            self._progress.update(task, completed=done, total=total, **fields)
            now = time.monotonic()
            first = first or (done, now)
            if is_done and is_brief and now - started < PLAIN_SECONDS:
                return
            if is_done or (not is_live(self.console) and now - last >= PLAIN_SECONDS):
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


def counted(description: str, items: Iterable, total: int) -> Iterator:
    """Pass items on, and count them in the display that is open; where none is, nothing is shown.

    For work far below a command, such as the reading of weights.
    """
    update = _open[-1].task(description, is_brief=True) if _open else lambda done, total: None
    for number, item in enumerate(items):
        update(number, total)
        yield item
    update(total, total)


class _Progress(Progress):
    """Work that is not done, a line for each piece and one for its note, in the width that there is."""

    def get_renderable(self) -> Group:
        return Group(*(_TaskLines(task) for task in self.tasks if task.visible))


class _TaskLines:
    """A piece of work as `description bar 12/300 9.7/s 0:00:11 ETA 0:00:21`, and its note below."""

    def __init__(self, task: Task):
        self._task = task

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        task, width = self._task, options.max_width
        done = f"{task.completed:,.0f}" + ("" if task.total is None else f"/{task.total:,.0f}")
        rate, left = _rate(task.finished_speed or task.speed or 0.0), task.time_remaining
        facts = [done, rate, _clock(task.elapsed), f"ETA {_clock(left)}" if left is not None else ""]
        # What is left out first where there is no room: the bar, then the time that has passed, then the pace.
        for kept in (facts, [done, rate, "", facts[3]], [done, "", "", facts[3]]):
            text = " ".join(filter(None, [task.description, *kept]))
            if text_width(text) < width:
                break
        room = min(_BAR_WIDTH, width - text_width(text) - 1)
        if room > 3:
            bar = _bar(task.percentage / 100, room, "-=" if options.ascii_only else "─━")
            text = f"{task.description} {bar}{text[len(task.description) :]}"
        lines = [text, *([f"  {task.fields['note']}"] if task.fields["note"] else [])]
        # One column less than there is: a full line would make some terminals begin a new one.
        yield Text("\n".join(line[: width - 1] for line in lines), no_wrap=True)


def _bar(share: float, width: int, characters: str) -> str:
    filled = round(share * width)
    return characters[1] * filled + characters[0] * (width - filled)


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def _rate(pieces_per_second: float) -> str:
    if not pieces_per_second:
        return ""
    return f"{pieces_per_second:,.0f}/s" if pieces_per_second >= 10 else f"{pieces_per_second:.2g}/s"


def print_table(console: Console, table: Table) -> None:
    """Print a table in the console's width, below an empty line where it has a title."""
    if table.title:
        console.print()
    console.print(table, crop=False)


def show(console: Console, title: str, table: Table) -> None:
    """Print a table below its title."""
    table.title = title
    print_table(console, table)


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
