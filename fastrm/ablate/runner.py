"""Processes that run cells: each step of a cell is the ordinary `fastrm` command.

A process frees its memory when it ends, and its failure ends no other cell. Each process has a session of its own:
Ctrl-C reaches it once, passed on by the grid's process, and it ends when that process has gone.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastrm.ablate.folders import add_seconds
from fastrm.errors import FastrmError, InterruptedRun
from fastrm.train.launch import FAILURE
from fastrm.ui import Display

POLL_SECONDS = 0.1
LOG = "output.log"


class FailedCells(FastrmError):
    """Some cells of a grid failed; the others are in its table."""

    exit_code = 71


@dataclass(frozen=True)
class Command:
    """One step of a cell, as a `fastrm` command.

    Attributes:
        arguments: the arguments of `fastrm`.
        out: the file that the command writes, whose existence shows that it is done; None if another file shows it.
    """

    arguments: tuple[str, ...]
    out: Path | None = None


@dataclass(frozen=True)
class Task:
    """The steps that are left for one cell, in order.

    Attributes:
        num_steps: optimizer steps of its run, if they are known.
    """

    name: str
    dir: Path
    commands: tuple[Command, ...]
    num_steps: int | None = None


@dataclass
class _Running:
    task: Task
    left: deque[Command]
    started: float
    process: subprocess.Popen = field(init=False)
    is_asked: bool = False  # True once it has been asked to stop

    def start_next(self, threads: int | None) -> None:
        command = self.left.popleft()
        self.task.dir.mkdir(parents=True, exist_ok=True)
        if command.out is not None:
            command.out.parent.mkdir(parents=True, exist_ok=True)
        failure = self.task.dir / "failure.json"
        failure.unlink(missing_ok=True)
        environment = {**os.environ, FAILURE: str(failure.resolve())}
        if threads is not None:
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        with (self.task.dir / LOG).open("a") as log:
            print("$ fastrm", *command.arguments, file=log, flush=True)
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fastrm.cli", *command.arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=environment, start_new_session=True,
            )  # fmt: skip
        self.is_asked = False

    def ask_to_stop(self) -> None:
        """Ask the process to stop, once: a second signal would make it leave without saving its state."""
        if not self.is_asked:
            self.is_asked = True
            self.process.terminate()

    def reason(self) -> str:
        """Return why the process has failed, in one line or more."""
        code, log = self.process.returncode, self.task.dir / LOG
        if code < 0:
            return f"killed by {signal.Signals(-code).name}; see {log}"
        try:
            return json.loads((self.task.dir / "failure.json").read_text())["message"]
        except (OSError, ValueError, KeyError):
            return f"ended with exit code {code} and said nothing; see {log}"

    def note(self) -> str:
        """Return the cell's name and step, for the line of progress."""
        step = _last_step(self.task.dir / "metrics.jsonl")
        of = f"/{self.task.num_steps:,}" if self.task.num_steps else ""
        return self.task.name if step is None else f"{self.task.name} step {step:,}{of}"


def run_tasks(
    tasks: Sequence[Task],
    display: Display,
    *,
    num_parallel: int = 1,
    num_done: int = 0,
    on_finished: Callable[[Task, float], None] = lambda task, seconds: None,
) -> dict[str, str]:
    """Run every task, `num_parallel` at a time; return the reasons of those that failed, by name.

    Args:
        num_done: cells that need no work, for the progress shown.
        on_finished: called after each task that succeeded, with its seconds.

    Raises:
        InterruptedRun: after SIGINT or SIGTERM, when every process has saved its state and left.
    """
    if not tasks:
        return {}
    threads = None if num_parallel == 1 else max(1, (os.cpu_count() or 1) // num_parallel)
    queue, running, failed = deque(tasks), [], {}
    update, done, total = display.task("cells"), num_done, num_done + len(tasks)
    update(done, total)
    with _Stop(running) as stop:
        while running or (queue and not stop.signal):
            while queue and len(running) < num_parallel and not stop.signal:
                task = queue.popleft()
                cell = _Running(task, deque(task.commands), time.monotonic())
                cell.start_next(threads)
                running.append(cell)
            if stop.signal:
                stop.ask_all()  # also processes that were being started when the signal came
            time.sleep(POLL_SECONDS)
            for cell in [cell for cell in running if cell.process.poll() is not None]:
                if cell.process.returncode == 0 and cell.left and not stop.signal:
                    cell.start_next(threads)
                    continue
                running.remove(cell)
                done += _note_end(cell, stop.signal, failed, display, on_finished)
            waiting = "stopping: " if stop.signal else ""
            update(done, total, waiting + ", ".join(cell.note() for cell in running))
    if stop.signal:
        raise InterruptedRun(f"stopped by {stop.signal} with {done} of {total} cells done")
    return failed


def _note_end(cell: _Running, stopped: str | None, failed: dict[str, str], display: Display, on_finished) -> bool:
    """Note the end of a cell's process; return whether the cell is done.

    A cell that was asked to stop is not done, and has not failed either.
    """
    seconds = time.monotonic() - cell.started
    add_seconds(cell.task.dir, seconds)
    if cell.process.returncode == 0:
        if not cell.left:
            on_finished(cell.task, seconds)
        return not cell.left
    if not stopped:
        failed[cell.task.name] = cell.reason()
        display.say(f"{cell.task.name}: FAILED: {failed[cell.task.name]}")
    return not stopped


def _last_step(path: Path) -> int | None:
    """Return the last step of a metrics.jsonl, which may be long and may be written to meanwhile."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 2**14))
            return json.loads(file.read().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError, KeyError):
        return None


class _Stop:
    """A context in which a signal asks all processes to stop; a second signal ends them and this process."""

    def __init__(self, running: list[_Running]):
        self.signal: str | None = None
        self._running = running

    def __enter__(self) -> "_Stop":
        self._before = {number: signal.signal(number, self._on) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        for cell in self._running:  # processes are left only after an error in this process
            if cell.process.poll() is None:
                cell.process.kill()
                cell.process.wait()

    def ask_all(self) -> None:
        for cell in self._running:
            cell.ask_to_stop()

    def _on(self, number, frame) -> None:
        if self.signal:
            for cell in self._running:
                cell.process.kill()
            os._exit(75)
        self.signal = signal.Signals(number).name
        self.ask_all()
