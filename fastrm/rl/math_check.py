"""Comparison of two answers by math-verify, in a process of its own that is killed when it takes too long.

math-verify bounds its own time by a signal, which works in the main thread only and not inside a long call into C.
Here a program (`math_worker.py`) compares, and its answer is waited for with a limit: no response can hang a trainer.
"""

import json
import logging
import os
import select
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from fastrm.errors import ConfigError

LIMIT = 5.0  # seconds for one comparison, after which the answers count as different
START_LIMIT = 300.0  # seconds for the program to import sympy, on a machine that is busy
_log = logging.getLogger(__name__)


class MathChecker:
    """A process that compares answers one after another, started when it is first needed.

    Threads take turns. A forked process starts its own.

    Attributes:
        num_stopped: comparisons that were stopped at the limit.
    """

    def __init__(self, limit: float = LIMIT):
        self.limit, self.num_stopped = limit, 0
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._owner = 0

    def __call__(self, got: str, wanted: str) -> bool:
        """Compare two answers; those that take longer than the limit count as different.

        Raises:
            ConfigError: if math-verify is not installed.
        """
        with self._lock:
            answer = _ask(self._running(), json.dumps([got, wanted]).encode() + b"\n", self.limit)
            if answer:
                return answer == b"true\n"
            self.num_stopped += 1
            self._stop()
        _log.warning("math-verify took more than %g s, or ended, over %.80r; it counts as wrong", self.limit, got)
        return False

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


def _ask(process: subprocess.Popen, question: bytes, limit: float) -> bytes:
    try:
        process.stdin.write(question)
    except OSError:  # it ended since it was looked at
        return b""
    return _read_line(process, limit)


def _read_line(process: subprocess.Popen, limit: float) -> bytes:
    """Return the next line; nothing if the process has ended, or says nothing within `limit` seconds."""
    ready, _, _ = select.select([process.stdout], [], [], limit)
    return process.stdout.readline() if ready else b""


equal_as_math = MathChecker()
