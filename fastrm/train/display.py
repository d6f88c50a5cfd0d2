"""What a run shows while it works: progress bars on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterable, Iterator

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
from rich.text import Text

# Seconds between plain lines when the output is not a terminal.
PLAIN_SECONDS = 10.0


class RateColumn(ProgressColumn):
    """Pieces a second, of late."""

    def render(self, task: Task) -> Text:
        """`1,234/s`, or nothing before it is known."""
        return Text(_rate(task.finished_speed or task.speed or 0.0))


def _rate(pieces_per_second: float) -> str:
    if not pieces_per_second:
        return ""
    return f"{pieces_per_second:,.0f}/s" if pieces_per_second >= 10 else f"{pieces_per_second:.2g}/s"


class Display:
    """Progress of preparing and training, on standard error.

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
        """One line of plain text."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def task(self, description: str) -> Callable[..., None]:
        """A function update(done, total, note="") for one piece of work."""
        task = self._progress.add_task(description, total=None, note="")
        started = last = time.monotonic()
        first: tuple[int, float] | None = None  # of the first call: work done before does not count

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
        """Pass items on while counting them."""
        update, number = self.task(description), 0
        for number, item in enumerate(items, 1):
            if number % 256 == 0:
                self._progress.update(self._progress.task_ids[-1], completed=number)
            yield item
        update(number, number)
