"""Pieces of work in forked processes, or in this one where there is little to do.

Every piece writes its own file, so results do not depend on which process did what, or when.
"""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from typing import Any, TypeVar

from fastrm.errors import StorageError
from fastrm.stop import StopRequest, end_with_parent

Result = TypeVar("Result")
# Pieces that wait for each worker: enough to keep it busy, few enough to stop soon.
_AHEAD = 2
_function: Callable[[Any], Any] | None = None  # the function of a worker process


def run_pieces(function: Callable[[Any], Result], pieces: Sequence[Any], num_workers: int) -> Iterator[Result]:
    """Yield `function(piece)` of every piece, in the order in which they are done.

    Args:
        function: called in the workers, which inherit it and everything that it refers to by forking.
        pieces: pickled to the workers.
        num_workers: 1 or less than 2 pieces: all is done in this process.

    Raises:
        StorageError: if a worker process dies.
        Exception: the first that `function` raises; pieces under way are then waited for, and no other begins.
        StopRequest: when a signal comes; pieces under way are ended, and their files do not appear.
    """
    num_workers = min(num_workers, len(pieces))
    if num_workers < 2:
        yield from map(function, pieces)
        return
    before = set(active_children())
    executor = ProcessPoolExecutor(num_workers, get_context("fork"), _start, (function, os.getpid()))
    try:
        yield from _completed(executor, pieces, _AHEAD * num_workers)
    except BrokenProcessPool as error:
        raise StorageError(
            "a process that prepares data died; it was killed or ran out of memory: use fewer --workers, and start "
            "again: what is done is kept"
        ) from error
    except StopRequest:
        for worker in set(active_children()) - before:
            worker.kill()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _completed(executor: ProcessPoolExecutor, pieces: Sequence[Any], num_ahead: int) -> Iterator[Any]:
    waiting, pending = iter(pieces), set()
    while True:
        while len(pending) < num_ahead and (piece := next(waiting, None)) is not None:
            pending.add(executor.submit(_work, piece))
        if not pending:
            return
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()


def _start(function: Callable[[Any], Any], parent: int) -> None:
    """Prepare a worker: it ignores signals to the process group and ends with its parent.

    Ctrl-C, and a scheduler's SIGTERM, reach the whole process group: the parent decides what they mean. A worker whose
    parent is gone would wait for work for ever.
    """
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent(parent)


def _work(piece: Any) -> Any:
    return _function(piece)
