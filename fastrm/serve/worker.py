"""A worker of a server: a process with models of its own, which a pipe asks and answers.

The front (workers.py) sends tuples, and gets tuples back:

    (ASK, number, groups, model, resolver)   -> (SCORED, number, Scored, Counts since its start, whether the scheduler
                                                is ready), or (FAILED, number, what)
    (CANCEL, number)                         -> nothing
    (END,)                                   -> the process ends when all that it was asked has its answer

The first message of a worker is (READY, {name of a model: its reader of rendered text}) or (BROKEN, exit code,
message).
"""

import asyncio
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from fastrm.errors import FastrmError, quiet_libraries
from fastrm.stop import end_with_parent

if TYPE_CHECKING:
    from fastrm.serve.scheduler import Scheduler

ASK, CANCEL, END = "ask", "cancel", "end"
READY, BROKEN, SCORED, FAILED = "ready", "broken", "scored", "failed"

# Returns the scheduler of a worker, whose number counts from 0; runs in the worker's process.
MakeScheduler = Callable[[int], "Scheduler"]


def run_worker(connection: Connection, pickled: bytes, number: int, parent: int) -> None:
    """Run the process of a worker.

    Args:
        connection: to the front.
        pickled: a `MakeScheduler`; to read it imports torch, which is to be quiet.
        parent: the front's process id.
    """
    end_with_parent(parent)
    for stop in (signal.SIGINT, signal.SIGTERM):  # which may go to all processes; the front ends them in order
        signal.signal(stop, signal.SIG_IGN)
    quiet_libraries()
    make: MakeScheduler = pickle.loads(pickled)
    try:
        scheduler = make(number)
    except FastrmError as error:
        connection.send((BROKEN, error.exit_code, str(error)))
        return
    asyncio.run(_serve(connection, scheduler))


async def _serve(connection: Connection, scheduler: "Scheduler") -> None:
    """Answer until the front says that it is the end."""
    ended, tasks, loop = asyncio.Event(), {}, asyncio.get_running_loop()

    def take(message: tuple) -> None:
        kind, *rest = message
        if kind == ASK:
            task = tasks[rest[0]] = asyncio.create_task(_answer(connection, scheduler, *rest))
            task.add_done_callback(lambda _: tasks.pop(rest[0]))
        elif kind == CANCEL and rest[0] in tasks:
            tasks[rest[0]].cancel()
        elif kind == END:
            ended.set()

    async with scheduler:
        threading.Thread(target=_read, args=(connection, loop, take), daemon=True).start()
        connection.send((READY, {name: scorer.reader for name, scorer in scheduler.served.items()}))
        await ended.wait()


def _read(connection: Connection, loop: asyncio.AbstractEventLoop, take: Callable[[tuple], None]) -> None:
    try:
        while True:
            message = connection.recv()
            loop.call_soon_threadsafe(take, message)
            if message[0] == END:
                return
    except (OSError, EOFError):  # the front is gone, and nobody waits for an answer
        os._exit(1)


async def _answer(
    connection: Connection, scheduler: "Scheduler", number: int, groups: list[dict], model: str, resolver: Callable
) -> None:
    try:
        scored = await scheduler.submit(groups, model, resolver)
        reply = (SCORED, number, scored, scheduler.counts, scheduler.is_ready)
    except Exception as error:
        traceback.print_exc()
        reply = (FAILED, number, f"{type(error).__name__}: {error}")
    connection.send(reply)
