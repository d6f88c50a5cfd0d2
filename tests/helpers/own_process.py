"""Processes of a test's own: Python that imports what this one does, and jobs whose peaks of memory are known.

The memory of a job goes back to the system when it ends. A server that has imported the jobs' module, and computes
nothing, forks them: libraries are loaded once.
"""

import functools
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import forkserver
from typing import Any
from unittest import mock

from bench.harness.memory import status_bytes


def environment(**changes: str) -> dict[str, str]:
    """Return the environment of a Python process that finds the modules that this one finds."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **changes}


@functools.cache
def context(module: str):
    """The context of `multiprocessing` whose server has imported `module`."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload([module])
    # The server of Python 3.11 looks for the module before it has our sys.path.
    with mock.patch.dict(os.environ, environment()):
        forkserver.ensure_running()
    return found


@dataclass(frozen=True)
class Done:
    """What a job has returned, and what its process has needed.

    Attributes:
        peak_bytes: of resident memory, libraries included.
        cpu_seconds: of all its threads.
    """

    value: Any
    peak_bytes: int
    cpu_seconds: float

    def __str__(self) -> str:
        return f"{self.peak_bytes / 1e9:.2f} GB, {self.cpu_seconds:.1f} s"


def run_alone(job: Callable, *arguments) -> Done:
    """Call a function of a module in a new process.

    Raises:
        whatever the function raises; BrokenProcessPool if the process was killed.
    """
    with ProcessPoolExecutor(1, mp_context=context(job.__module__)) as pool:
        return pool.submit(_measured, job, *arguments).result()


def _measured(job: Callable, *arguments) -> Done:
    value = job(*arguments)
    return Done(value, status_bytes("VmHWM"), time.process_time())


class JobServer:
    """A process that takes jobs as lines of JSON, and answers in such lines.

    Args:
        module: that it runs.
    """

    def __init__(self, module: str):
        self._process = subprocess.Popen(
            [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=environment(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false"),
        )  # fmt: skip

    def send(self, request: dict):
        """Send a job; returns the first answer."""
        self._process.stdin.write(json.dumps(request, default=str) + "\n")
        self._process.stdin.flush()
        return self.wait()

    def wait(self):
        """The next answer."""
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
