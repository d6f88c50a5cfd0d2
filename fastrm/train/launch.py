"""The launcher of `fastrm train` on several GPUs of one machine: a process for each, and a watcher.

The watcher computes nothing. It passes a signal on, once, to processes that a terminal's Ctrl-C or a
scheduler's kill of the group does not reach; it notices a process that has died, of which the others
might learn only by waiting for it; and it says once what all of them would say.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from fastrm.config import Config
from fastrm.errors import RankFailure
from fastrm.stop import PASSED_ON
from fastrm.train.ranks import check_deepspeed, check_gpus, check_not_one_gpu, is_launched

# The variable with the file in which a started process writes the error that stopped it.
FAILURE = "FASTRM_FAILURE"
# The seconds that the others may take to leave after one has. A checkpoint is complete before any rank leaves.
GRACE_SECONDS = 30.0


def num_ranks_to_start(config: Config) -> int:
    """Return the number of processes to start; 1: run in this one, alone or as a rank that a launcher made.

    Raises:
        ConfigError: if DeepSpeed is not installed, or there are too few GPUs.
    """
    if is_launched():
        return 1
    uses_cuda = config.run.device != "cpu" and torch.cuda.is_available()
    wanted = config.run.num_processes or (torch.cuda.device_count() if uses_cuda else 1)
    if ":" in config.run.device:
        check_not_one_gpu(config.run.device, config.run.num_processes or 1)
        return 1
    if wanted > 1:
        check_deepspeed(wanted)
        if uses_cuda:
            check_gpus(wanted)
    return wanted


def launch(num_ranks: int, arguments: Sequence[str]) -> None:
    """Run `fastrm ARGUMENTS` in `num_ranks` processes, to their end.

    Raises:
        RankFailure: if one of them does not end well, when none runs any more.
    """
    with tempfile.TemporaryDirectory() as folder, kept_port() as port:
        watcher = _Watcher(num_ranks, arguments, Path(folder), port)
        handlers = {number: signal.signal(number, watcher.pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            watcher.wait()
        finally:
            watcher.kill()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        watcher.check()


@contextmanager
def kept_port() -> Iterator[int]:
    """Yield a port on which the ranks can meet, and keep it from other processes meanwhile.

    A port that is only looked up may be another's before the first rank listens there. This one stays bound; Linux lets
    a socket with SO_REUSEADDR, as torch's store has it, listen beside one that has it too and does not listen.
    """
    with socket.socket() as kept:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        yield kept.getsockname()[1]


class _Watcher:
    def __init__(self, num_ranks: int, arguments: Sequence[str], folder: Path, port: int):
        self._failures = [folder / f"{rank}.json" for rank in range(num_ranks)]
        self._signalled = False
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "fastrm.cli", *arguments],
                env={**os.environ, **_environment(rank, num_ranks, port), FAILURE: str(self._failures[rank])},
                start_new_session=True,
            )
            for rank in range(num_ranks)
        ]

    def pass_on(self, number: int, frame) -> None:
        """Handle a signal: the first asks all ranks to stop, the second ends them."""
        if self._signalled:
            self.kill()
            os._exit(75)
        self._signalled = True
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(PASSED_ON)

    def wait(self) -> None:
        """Wait until all ranks have ended, or until the time is up that the others have after one's failure."""
        deadline = float("inf")
        while any(process.poll() is None for process in self._processes) and time.monotonic() < deadline:
            if deadline == float("inf") and any(process.returncode for process in self._processes):
                deadline = time.monotonic() + GRACE_SECONDS
            time.sleep(0.05)

    def kill(self) -> None:
        """End the ranks that still run, with their data workers, which leave when their parent is gone."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()
                process.returncode = 0  # we killed it: the code says nothing about the rank

    def check(self) -> None:
        """Raise RankFailure for the rank that probably failed first: the others' errors follow from its."""
        failed = [rank for rank, process in enumerate(self._processes) if process.returncode]
        if not failed:
            return
        first = min(failed, key=lambda rank: _rank_of_cause(self._processes[rank].returncode))
        code = self._processes[first].returncode
        if code < 0:
            name, pid = signal.Signals(-code).name, self._processes[first].pid
            raise RankFailure(
                f"rank {first} (process {pid}) was killed by {name}, and the others were stopped; if memory ran out, "
                "lower optim.tokens_per_pack or run.num_processes; continue with --resume auto"
            )
        try:
            report = json.loads(self._failures[first].read_text())
        except (OSError, ValueError):
            raise RankFailure(f"rank {first} ended with exit code {code} and said nothing") from None
        sys.stderr.write(report["trace"])
        # An error that all ranks report is not one rank's.
        where = "" if len(failed) == len(self._processes) and code != 70 else f"rank {first}: "
        raise RankFailure(where + report["message"], report["error"], code)


def _environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """Return the environment of a rank, as torchrun sets it."""
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }


def _rank_of_cause(code: int) -> int:
    """Return a key that sorts exit codes by likely cause.

    Killed ranks come before those that name an error, and these before those that lost their connection.
    """
    return 0 if code < 0 else 2 if code == 70 else 1
