"""Several workers behind one port: each request goes to the worker of its prompt, so that a prompt's rollouts meet.

    app --> Workers.submit --> by prompt and images --> pipe --> worker 0: Scheduler --> GPU 0
                                                    --> pipe --> worker 1: Scheduler --> GPU 1

Workers share nothing. The worker of a prompt is the one for which the hash of prompt, images and worker is largest
(rendezvous hashing, Thaler and Ravishankar 1998), so that the loss of one moves only its own prompts, and they come
back to it. What a worker that dies had been asked is answered with 503; it is started again.
"""

import asyncio
import contextlib
import hashlib
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

from fastrm.errors import ConfigError, DataError, FastrmError, StorageError
from fastrm.serve.dispatch import Dispatcher, MakeResolve, Served, summed
from fastrm.serve.problems import Unavailable
from fastrm.serve.scheduler import Counts, Scored
from fastrm.serve.worker import ASK, BROKEN, CANCEL, END, READY, SCORED, MakeScheduler, run_worker

# Seconds before a worker is started again that has died so often without an answer.
_DELAYS = (0.0, 1.0, 5.0, 30.0)
_SECONDS_TO_END = 1.0  # an idle worker ends in less; `fastrm serve` has a second after what was accepted
_ERRORS = {error.exit_code: error for error in (ConfigError, DataError, StorageError)}


class WorkerError(Exception):
    """An error inside a worker that no request should cause; its own log has the trace."""


class Workers(Dispatcher):
    """Processes that score groups, with the interface of one `Scheduler`.

    Args:
        make: returns the scheduler of a worker; a function of a module, as it is called in another process.
        count: the number of workers, from 1 on.
        max_queue: of `Dispatcher`.
        say: told in words when a worker is lost.
    """

    def __init__(self, make: MakeScheduler, count: int, *, max_queue: int = 1024, say: Callable[[str], None] = print):
        super().__init__(max_queue)
        self._workers = [_Worker(make, number) for number in range(count)]
        self._say = say
        self._keepers: list[asyncio.Task] = []

    async def __aenter__(self) -> "Workers":
        """Start the workers, unless `start` has done so."""
        if not self._keepers:
            await self.start()
        return self

    async def start(self) -> None:
        """Start all workers and wait until they are ready.

        Raises:
            FastrmError: of the kind that a worker meets when it loads its models.
        """
        try:
            for worker in self._workers:
                worker.start()
            readers, *_ = await asyncio.gather(*(asyncio.shield(worker.ready) for worker in self._workers))
        except BaseException:
            await self._end()
            raise
        self.served = {name: Served(name, reader) for name, reader in readers.items()}
        self._keepers = [asyncio.create_task(self._keep(worker)) for worker in self._workers]

    async def __aexit__(self, *_) -> None:
        """Wait until all that was accepted has its answer, and end the workers."""
        await self.drain()
        await self._end()

    @property
    def counts(self) -> Counts:
        """The sums over all workers since the start, those that were lost included."""
        return summed(counts for worker in self._workers for counts in worker.counts.values())

    @property
    def is_ready(self) -> bool:
        """True while requests are accepted, and each prompt has a worker whose latest groups did not all fail.

        The prompts of a worker that is lost go to others; those of one whose packs fail do not.
        """
        ready = [worker for worker in self._workers if worker.is_ready]
        return not self.is_closing and bool(ready) and all(worker.computes for worker in ready)

    def place_of(self, prompt: bytes) -> "_Worker":
        """Return the worker of the groups of a prompt.

        Raises:
            Unavailable: if none is ready.
        """
        ready = [worker for worker in self._workers if worker.is_ready]
        if not ready:
            raise Unavailable("NO_WORKER", "no worker is ready; they are being started, ask again", retry_after=5)
        return max(ready, key=lambda worker: hashlib.blake2b(prompt + worker.number.to_bytes(4)).digest())

    async def ask(self, place: "_Worker", groups: list[dict], model: str, resolver: MakeResolve) -> Scored:
        """Return the answer of a worker.

        Raises:
            Unavailable: if it dies before.
            WorkerError: if it fails.
        """
        return await place.ask(groups, model, resolver)

    async def _keep(self, worker: "_Worker") -> None:
        """Start a worker again whenever it is lost."""
        failures = 0
        while True:
            failures = 1 if worker.is_ready else failures + 1
            await asyncio.wait((worker.lost,))  # unlike `await`, leaves it as it is when this task is cancelled
            delay = _DELAYS[min(failures, len(_DELAYS)) - 1]
            self._say(f"{worker.lost.result()}; it is started again" + (f" in {delay:.0f} s" if delay else ""))
            await asyncio.sleep(delay)
            worker.start()
            await asyncio.wait((worker.ready, worker.lost), return_when=asyncio.FIRST_COMPLETED)

    async def _end(self) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await asyncio.gather(*(worker.end() for worker in self._workers))


class _Worker:
    """The front's side of a worker: its process, and who waits for its answers.

    Attributes:
        number: of the worker, from 0 on.
        ready: has the readers of the models once they are loaded, or the reason why they cannot be.
        lost: has, in words, how the process ended.
        counts: by process id, those that the process sent last.
        computes: True unless the scheduler of the process has said that its latest groups all failed.
    """

    def __init__(self, make: MakeScheduler, number: int):
        self.number, self._make = number, make
        self._asked: dict[int, asyncio.Future] = {}
        self._numbers = itertools.count()
        self.counts: dict[int, Counts] = {}
        self.computes = True
        self._process: multiprocessing.Process | None = None

    def start(self) -> None:
        """Start the process anew."""
        loop = asyncio.get_running_loop()
        context = multiprocessing.get_context("spawn")  # no state of this process, and CUDA bears no fork
        self._connection, theirs = context.Pipe()
        self.computes = True
        arguments = (theirs, pickle.dumps(self._make), self.number, os.getpid())
        self._process = context.Process(target=run_worker, args=arguments, name=f"fastrm-worker-{self.number}")
        self._process.start()
        theirs.close()
        self._sending = ThreadPoolExecutor(1, "fastrm-send")
        self.ready, self.lost = loop.create_future(), loop.create_future()
        self.ready.add_done_callback(lambda ready: ready.exception())  # else asyncio would complain where none asks
        threading.Thread(target=self._read, args=(loop, self._connection, self._process), daemon=True).start()

    @property
    def is_ready(self) -> bool:
        """True while the worker answers."""
        return self.ready.done() and self.ready.exception() is None and not self.lost.done()

    async def ask(self, groups: list[dict], model: str, resolver: MakeResolve) -> Scored:
        """Return the worker's answer. Raises what `Workers.ask` does."""
        if not self.is_ready:
            raise Unavailable("WORKER_LOST", f"worker {self.number} has just died; ask again")
        loop = asyncio.get_running_loop()
        number, answer = next(self._numbers), loop.create_future()
        self._asked[number] = answer
        self._send((ASK, number, groups, model, resolver))
        try:
            return await answer
        except asyncio.CancelledError:
            self._send((CANCEL, number))
            raise
        finally:
            self._asked.pop(number, None)

    async def end(self) -> None:
        """End the process: in order if it is ready, and at once if it loads or does not listen."""
        if self._process is None:
            return
        if self.is_ready:
            self._send((END,))
            await asyncio.wait((self.lost,), timeout=_SECONDS_TO_END)
        self._process.kill()
        await asyncio.wait((self.lost,))

    def _send(self, message: tuple) -> None:
        """Put a message into the pipe, in a thread, as the pipe may be full; one at a time, in order."""
        if not self.lost.done():
            self._sending.submit(_send, self._connection, message)

    def _read(self, loop: asyncio.AbstractEventLoop, connection: Connection, process: multiprocessing.Process) -> None:
        """Pass messages on until the process ends; runs in a thread."""
        with contextlib.suppress(OSError, EOFError):
            while True:
                loop.call_soon_threadsafe(self._take, connection.recv())
        process.join()
        with contextlib.suppress(RuntimeError):  # the loop has ended before
            loop.call_soon_threadsafe(self._lose, process.pid, process.exitcode)

    def _take(self, message: tuple) -> None:
        kind, *rest = message
        if kind == READY:
            self.ready.set_result(rest[0])
        elif kind == BROKEN:
            self.ready.set_exception(_ERRORS.get(rest[0], FastrmError)(rest[1]))
        else:
            self._answer(*message)

    def _answer(
        self, kind: str, number: int, result: Scored | str, counts: Counts | None = None, is_ready: bool = True
    ) -> None:
        if counts is not None:
            self.counts[self._process.pid], self.computes = counts, is_ready
        answer = self._asked.pop(number, None)
        if answer is None or answer.done():  # the client has left
            return
        if kind == SCORED:
            answer.set_result(result)
        else:
            answer.set_exception(WorkerError(result))

    def _lose(self, pid: int, code: int) -> None:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        waiting = [answer for answer in self._asked.values() if not answer.done()]
        lost = f"worker {self.number} (process {pid}) {how}"
        for answer in waiting:
            answer.set_exception(Unavailable("WORKER_LOST", f"{lost} before it had an answer; ask again"))
        if not self.ready.done():
            self.ready.set_exception(FastrmError(f"{lost} while it loaded its models"))
        elif self.ready.exception() is not None:
            lost += f": {self.ready.exception()}"
        self._sending.submit(self._connection.close)  # after what is being sent
        self._sending.shutdown(wait=False)
        self.lost.set_result(f"{lost}; {len(waiting)} of its requests were answered with 503" if waiting else lost)


def _send(connection: Connection, message: tuple) -> None:
    with contextlib.suppress(OSError):  # the worker is gone, and its requests are told
        connection.send(message)
