"""Comparison of two answers by math-verify, in a process of its own that is killed when it takes too long.

math-verify bounds its own time by a signal, which works in the main thread only and not inside a long call into C.
Here a program (`math_worker.py`) compares, each time for a limited time of the processor: no response can hang a
trainer. What comparisons that were stopped take together is limited too: no batch of them can.
"""

import json
import logging
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from fastrm.errors import ConfigError

LIMIT = 5.0  # seconds of the processor for one comparison, after which the answers count as different
SHORT_LIMIT = 0.25  # what remains of it when stopped comparisons have used up their allowance; most take 0.01 s
ALLOWANCE = 60.0  # seconds for stopped comparisons together
REGAINED = 0.1  # seconds of the allowance that come back in each second
MAX_KNOWN = 4096  # results that are kept
WAIT_LIMIT = 600.0  # seconds by the clock for an answer of the program, which says "stopped" itself: for one that hangs
START_LIMIT = 300.0  # seconds for the program to import sympy, on a machine that is busy
_log = logging.getLogger(__name__)


class MathChecker:
    """A process that compares answers one after another, started when it is first needed.

    Threads take turns. A forked process starts its own. Results are kept: the rollouts of a prompt repeat answers.

    Args:
        limit: seconds of the processor for one comparison. Those that are stopped there use up an allowance, of which a
            tenth of the time that passes is regained; with none left, the limit is `SHORT_LIMIT`.

    Attributes:
        num_stopped: comparisons that were stopped at the limit.
    """

    def __init__(self, limit: float = LIMIT):
        self.limit, self.num_stopped = limit, 0
        self._known: dict[tuple[str, str], bool] = {}
        self._allowance, self._seen = ALLOWANCE, time.monotonic()
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._owner = 0

    def __call__(self, got: str, wanted: str) -> bool:
        """Compare two answers; those that take longer than the limit count as different.

        Raises:
            ConfigError: if math-verify is not installed.
        """
        with self._lock:
            if (got, wanted) not in self._known:
                limit = self._limit_now()
                answer = _ask(self._running(), json.dumps([got, wanted, limit]).encode() + b"\n")
                if answer not in (b"true\n", b"false\n"):
                    self._note_stopped(got, limit, has_ended=not answer)
                    if not answer or limit < self.limit:  # no verdict: asked again, it may be found equal
                        return False
                if len(self._known) >= MAX_KNOWN:
                    self._known.clear()
                self._known[got, wanted] = answer == b"true\n"
            return self._known[got, wanted]

    def _limit_now(self) -> float:
        now = time.monotonic()
        self._allowance = min(ALLOWANCE, self._allowance + REGAINED * (now - self._seen))
        self._seen = now
        return min(self.limit, max(SHORT_LIMIT, self._allowance))

    def _note_stopped(self, got: str, limit: float, has_ended: bool) -> None:
        self.num_stopped += 1
        self._allowance = max(0.0, self._allowance - limit)
        if has_ended:
            self._stop()
        _log.warning("math-verify took more than %g s, or ended, over %.80r; it counts as wrong", limit, got)

    def close(self) -> None:
        """End the process; the next comparison starts another."""
        with self._lock:
            self._stop()

    def _running(self) -> subprocess.Popen:
        if self._owner == os.getpid() and self._process is not None and self._process.poll() is None:
            return self._process
        # An inherited process is the parent's: it is left alone.
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        command = [sys.executable, "-P", "-m", "fastrm.rl.math_worker"]
        with tempfile.TemporaryFile() as errors:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            self._process = subprocess.Popen(command, bufsize=0, env=environment, **pipes)
            self._owner = os.getpid()
            if _read_line(self._process, START_LIMIT) != b"ready\n":
                self._stop()
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip().splitlines()
                raise ConfigError(
                    f"answers: math-verify cannot be used: {said[-1] if said else 'its process did not start'}; "
                    'install it (pip install "fastrm[rl]") or choose answers="text" or "choice"'
                )
        return self._process

    def _stop(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
        self._process = None


def _ask(process: subprocess.Popen, question: bytes) -> bytes:
    try:
        process.stdin.write(question)
    except OSError:  # it ended since it was looked at
        return b""
    return _read_line(process, WAIT_LIMIT)


def _read_line(process: subprocess.Popen, limit: float) -> bytes:
    """Return the next line; nothing if the process has ended, or says nothing within `limit` seconds."""
    ready, _, _ = select.select([process.stdout], [], [], limit)
    return process.stdout.readline() if ready else b""


equal_as_math = MathChecker()
