"""Stages of a GPU day as processes: each has a limit, and none can end the day.

A stage that hangs, dies, runs out of memory or floods its output ends with a status; the next one begins. What
each has found is in gpu_day.json at any moment, so that a day which is killed itself keeps it. Needs the
standard library alone, so that a broken environment breaks stages only.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from bench.harness.results import write_json

POLL_SECONDS = 0.5
SAVE_SECONDS = 1.0
END_SECONDS = 6  # kept for the tables
KILL_SECONDS = 10  # a killed process is waited for so long; one that waits for a driver may never end
TAIL_CHARACTERS = 3000  # the end of a stage's output that the JSON keeps
LOG_HEAD_BYTES, LOG_TAIL_BYTES = 128 << 10, 768 << 10  # the parts of a stage's output that the log keeps
OUTPUT_BYTES = 256 << 20  # a stage that writes more is stopped before it fills the disk
RESULT_BYTES = 8 << 20  # a larger JSON file of a stage is not taken over
MARK = "FASTRM_GPU_DAY_STAGE"
_LIBC, _PR_SET_PDEATHSIG = ctypes.CDLL(None), 1  # prctl(2)
DONE, RUNNING, LEFT_OUT = "done", "running", "left out"


@dataclass(frozen=True)
class Stage:
    """One question to the device, and the command that answers it.

    Attributes:
        name: letters, digits and hyphens.
        question: what it answers, in words.
        command: run in the project's folder. {out} is a folder for its *.json files (and for a training run named
            run), {budget} the seconds that it may spend, {site} where carried packages are unpacked.
        limit: seconds after which it is killed.
        margin: seconds of the limit that are not in {budget}: imports, and the end.
        least: seconds without which it is not begun.
        environment: on top of that of all stages.
        required: without it the day ends.
    """

    name: str
    question: str
    command: tuple[str, ...]
    limit: float
    margin: float = 15.0
    least: float = 20.0
    environment: dict[str, str] = field(default_factory=dict)
    required: bool = False


class Running:
    """A stage's process group, from its start to its end.

    Attributes:
        entry: of the day's JSON.
        over: has it ended, by itself or not?
    """

    def __init__(self, stage: Stage, entry: dict, folder: Path, environment: dict[str, str], root: Path):
        self.stage, self.entry, self.over = stage, entry, False
        self._start, self._limit = time.monotonic(), entry["limit"]
        self._mark = f"{os.getpid()}.{stage.name}"
        self._results, self._seen = folder / "results", {}
        self._output = folder / "output"
        self._results.mkdir(parents=True)
        places = {"out": str(self._results), "budget": str(max(1, int(self._limit - stage.margin)))}
        command = [_filled(part, {**places, "site": environment.get("FASTRM_GPU_DAY_SITE", "")})
                   for part in stage.command]  # fmt: skip
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                command, cwd=root, env={**environment, **stage.environment, MARK: self._mark},
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=_die_with_parent,
            )  # fmt: skip
        # If the host's memory runs out, the kernel should kill the stage and not the day.
        with contextlib.suppress(OSError):
            Path(f"/proc/{self._process.pid}/oom_score_adj").write_text("1000")

    def look(self) -> None:
        """Note how far the stage is; end it if it has to end."""
        self.entry["seconds"] = round(time.monotonic() - self._start, 1)
        self._take_results()
        self.entry["tail"] = self._tail()
        code = self._process.poll()
        if code is not None:
            self._finish(DONE if code == 0 else f"failed: exit {code}" if code > 0 else f"died: {_signal_name(-code)}")
        elif self.entry["seconds"] >= self._limit:
            self._finish(f"killed: over its limit of {self._limit:.0f} s")
        elif self._output.stat().st_size > OUTPUT_BYTES:
            self._finish(f"killed: wrote more than {OUTPUT_BYTES >> 20} MiB")

    def stop(self, why: str) -> None:
        """End the stage now, for the reason `why`."""
        if not self.over:
            self._finish(f"stopped: {why}")

    def log(self) -> bytes:
        """Return the output of the stage, without the middle of a long one."""
        with self._output.open("rb") as file:
            head = file.read(LOG_HEAD_BYTES)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(len(head), size - LOG_TAIL_BYTES))
            # Not up to the end of the file: a stage may write faster than this reads.
            tail = file.read(LOG_TAIL_BYTES)
        left_out = size - len(head) - len(tail)
        return head + (f"\n... {left_out:,} bytes left out ...\n".encode() if left_out > 0 else b"") + tail

    def _finish(self, status: str) -> None:
        self.over = True
        if not self._kill():
            status += "; a process of it does not die"
        self._take_results()
        self.entry |= {"status": status, "tail": self._tail(), "seconds": round(time.monotonic() - self._start, 1)}

    def _kill(self) -> bool:
        """Kill the group, and every process of the stage that has left it; return whether all are gone."""
        end = time.monotonic() + KILL_SECONDS
        while True:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            others = marked(self._mark)
            for pid in others:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            gone = self._process.poll() is not None
            if gone and not others:
                return True
            if time.monotonic() > end:
                return False
            time.sleep(0.05)

    def _take_results(self) -> None:
        """Take over the JSON files that have changed; a file that cannot be read leaves what was there."""
        for file in sorted([*self._results.glob("[!.]*.json"), *self._results.glob("run/summary.json")]):
            with contextlib.suppress(OSError, ValueError):
                status = file.stat()
                if self._seen.get(file.name) != (status.st_mtime_ns, status.st_size) and status.st_size < RESULT_BYTES:
                    self.entry.setdefault("results", {})[file.name] = json.loads(file.read_text())
                    self._seen[file.name] = status.st_mtime_ns, status.st_size

    def _tail(self) -> str:
        with contextlib.suppress(OSError), self._output.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4 * TAIL_CHARACTERS))
            return printable(file.read(4 * TAIL_CHARACTERS).decode(errors="replace"))[-TAIL_CHARACTERS:]
        return ""


class Day:
    """The stages one after another, within the time of the day.

    Args:
        out: folder of gpu_day.json and gpu_day.log.
        work: empty folder for what stages write.
        seconds: the time for everything, tables included.
        facts: facts that go into the JSON as they are.
        root: the project's folder, where the commands run.
        environment: environment variables of all stages.

    Attributes:
        record: the content of gpu_day.json.
        stopped: name of the signal that ended the day; None without.
    """

    def __init__(self, out: Path, work: Path, seconds: float, facts: dict, root: Path, environment: dict[str, str]):
        self._start, self._seconds = time.monotonic(), seconds
        self._out, self._work, self._root, self._environment = out, work, root, environment
        self._saved = 0.0
        self.stopped: str | None = None
        self.record = {**facts, "seconds": 0.0, "limit": seconds, "stages": []}
        out.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        """Seconds until the tables have to be drawn."""
        return self._seconds - END_SECONDS - (time.monotonic() - self._start)

    def stop_on_signals(self) -> None:
        """End in order when a signal ends this process: kill the running stage, leave out the rest."""

        def stop(number, _):
            self.stopped = _signal_name(number)

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, stop)

    def run(self, groups: list[list[Stage]]) -> None:
        """Run the groups in turn, and the stages of a group side by side."""
        ended = None
        for group in groups:
            if ended is None and self.stopped:
                ended = f"the day was stopped by {self.stopped}"
            running = [begun for stage in group if (begun := self._begin(stage, ended)) is not None]
            while any(not one.over for one in running):
                self._look(running)
            lost = [one.stage.name for one in running if one.stage.required and one.entry["status"] != DONE]
            if lost and ended is None:
                ended = f"nothing can be measured without {lost[0]}"
        self.save()

    def save(self) -> None:
        """Write gpu_day.json. A full disk does not end the day."""
        self._saved = time.monotonic()
        self.record["seconds"] = round(self._saved - self._start, 1)
        try:
            write_json(self._out / "gpu_day.json", self.record)
        except OSError as error:
            say(f"gpu_day.json cannot be written: {error}")

    def _begin(self, stage: Stage, ended: str | None) -> Running | None:
        entry = {"name": stage.name, "question": stage.question, "status": RUNNING, "seconds": 0.0,
                 "limit": round(min(stage.limit, self.left), 1)}  # fmt: skip
        self.record["stages"].append(entry)
        reason = ended
        if reason is None and entry["limit"] < min(stage.least, stage.limit):
            reason = f"out of time, {max(0, self.left):.0f} s are left"
        if reason is None:
            try:
                running = Running(stage, entry, self._work / stage.name, self._environment, self._root)
            except OSError as error:
                entry["status"] = f"failed: cannot be started, {error}"
                say(f"{stage.name}: {entry['status']}")
                return None
            say(f"{stage.name}: begins, at most {entry['limit']:.0f} s")
            self.save()
            return running
        entry["status"] = f"{LEFT_OUT}: {reason}"
        say(f"{stage.name}: {entry['status']}")
        return None

    def _look(self, running: list[Running]) -> None:
        time.sleep(POLL_SECONDS)
        for one in running:
            if not one.over:
                one.stop(self.stopped) if self.stopped else one.look()
                if one.over:
                    self._close(one)
        if time.monotonic() - self._saved >= SAVE_SECONDS:
            self.save()

    def _close(self, one: Running) -> None:
        entry = one.entry
        say(f"{entry['name']}: {entry['status']}, {entry['seconds']:.1f} s")
        if entry["status"] != DONE:
            for line in entry["tail"].splitlines()[-4:]:
                say(f"    {line[:200]}")
        try:
            with (self._out / "gpu_day.log").open("ab") as log:
                log.write(f"\n##### {entry['name']}: {entry['status']}, {entry['seconds']} s\n".encode() + one.log())
        except OSError as error:
            say(f"gpu_day.log cannot be written: {error}")
        self.save()


def _die_with_parent() -> None:
    """Let a stage be killed when the day is killed, although it has a session of its own."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def marked(mark: str) -> list[int]:
    """Return the processes that a stage has started, in whatever session: they inherit its mark."""
    found, wanted = [], f"{MARK}={mark}".encode()
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted in file.read_bytes().split(b"\0"):
                found.append(int(file.parent.name))
    return found


def printable(text: str) -> str:
    """Return the text without characters that would garble a terminal or a table."""
    return "".join(c if c.isprintable() or c == "\n" else "\n" if c == "\r" else "?" for c in text)


def say(text: str) -> None:
    """Print a line of progress; a closed pipe is no error."""
    with contextlib.suppress(OSError, ValueError):
        print(text, flush=True)


def _filled(part: str, places: dict[str, str]) -> str:
    for name, value in places.items():
        part = part.replace("{" + name + "}", value)
    return part


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
