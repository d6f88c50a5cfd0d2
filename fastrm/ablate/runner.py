"""Processes that run cells: each step of a cell is the ordinary `fastrm` command.

A process frees its memory when it ends, and its failure ends no other cell. Each process has a session of its own:
Ctrl-C reaches it once, passed on by the grid's process, and it ends when that process has gone.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from fastrm.ablate.work import Command, Task, add_seconds
from fastrm.errors import FastrmError, InterruptedRun
from fastrm.stop import StopFlag
from fastrm.train.launch import FAILURE
from fastrm.ui import Display

POLL_SECONDS = 0.1
LOG = "output.log"


class FailedCells(FastrmError):
    """Some cells of a grid failed; the others are in its table."""

    exit_code = 71


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
    cells = [_Running(task, threads) for task in tasks]
    failed: dict[str, str] = {}
    update, done, total = display.task("cells"), num_done, num_done + len(tasks)
    update(done, total)
    with StopFlag() as stop, ThreadPoolExecutor(num_parallel) as pool, _ended(cells):
        stop.is_forced = False  # each process sees to its own end; a second signal ends this one, and they follow it
        left = {pool.submit(cell.run): cell for cell in cells}
        while left:
            ended, _ = wait(left, POLL_SECONDS, FIRST_COMPLETED)
            if stop.signal:
                for cell in cells:
                    cell.stop()
            for future in ended:
                cell = left.pop(future)
                seconds, reason = future.result()
                if reason is not None and stop.signal:
                    continue  # it was asked to stop: it is not done, and has not failed either
                done += 1
                if reason is None:
                    on_finished(cell.task, seconds)
                else:
                    failed[cell.task.name] = reason
                    display.say(f"{cell.task.name}: FAILED: {reason}")
            waiting = "stopping: " if stop.signal else ""
            update(done, total, waiting + ", ".join(cell.note() for cell in left.values() if cell.process))
    if stop.signal:
        raise InterruptedRun(f"stopped by {stop.signal} with {done} of {total} cells done")
    return failed


@contextmanager
def _ended(cells: Sequence["_Running"]) -> Iterator[None]:
    """End the processes that still run when the block is left, which is so only after an error in this process."""
    try:
        yield
    finally:
        for cell in cells:
            cell.stop(signal.SIGKILL)


class _Running:
    """A cell whose commands run one after another, in a thread that waits for them.

    Attributes:
        process: the command that runs now, or ran last; None before the first.
    """

    def __init__(self, task: Task, threads: int | None):
        self.task = task
        self.process: subprocess.Popen | None = None
        self._threads = threads
        self._is_stopped = False
        self._starting = threading.Lock()  # a process is either asked to stop or not started

    def run(self) -> tuple[float, str | None]:
        """Run the commands that are left; return the seconds, and why the cell is not done, None if it is."""
        started, reason = time.monotonic(), None
        for command in self.task.commands:
            with self._starting:
                if self._is_stopped:
                    reason = "stopped"
                    break
                self.process = self._start(command)
            if self.process.wait() != 0:
                reason = self._reason()
                break
        seconds = time.monotonic() - started
        if self.process is not None:
            add_seconds(self.task.dir, seconds)
        return seconds, reason

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Ask the process to stop, once: a second signal would make it leave without saving its state."""
        with self._starting:
            if self.process is not None and not self._is_stopped:
                self.process.send_signal(number)
            self._is_stopped = True

    def note(self) -> str:
        """Return the cell's name and step, for the line of progress."""
        step = _last_step(self.task.dir / "metrics.jsonl")
        of = f"/{self.task.num_steps:,}" if self.task.num_steps else ""
        return self.task.name if step is None else f"{self.task.name} step {step:,}{of}"

    def _start(self, command: Command) -> subprocess.Popen:
        self.task.dir.mkdir(parents=True, exist_ok=True)
        if command.out is not None:
            command.out.parent.mkdir(parents=True, exist_ok=True)
        failure = self.task.dir / "failure.json"
        failure.unlink(missing_ok=True)
        environment = {**os.environ, FAILURE: str(failure.resolve())}
        if self._threads is not None:
            environment.setdefault("OMP_NUM_THREADS", str(self._threads))
        with (self.task.dir / LOG).open("a") as log:
            print("$ fastrm", *command.arguments, file=log, flush=True)
            return subprocess.Popen(
                [sys.executable, "-m", "fastrm.cli", *command.arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=environment, start_new_session=True,
            )  # fmt: skip

    def _reason(self) -> str:
        """Return why the process has failed, in one line or more."""
        code, log = self.process.returncode, self.task.dir / LOG
        if code < 0:
            return f"killed by {signal.Signals(-code).name}; see {log}"
        try:
            return json.loads((self.task.dir / "failure.json").read_text())["message"]
        except (OSError, ValueError, KeyError):
            return f"ended with exit code {code} and said nothing; see {log}"


def _last_step(path: Path) -> int | None:
    """Return the last step of a metrics.jsonl, which may be long and may be written to meanwhile."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 2**14))
            return json.loads(file.read().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError, KeyError):
        return None
