"""Work that does not come to an end, for tests of signals; each function here changes the process that calls it.

Where the work has begun is told by a line "stuck" on standard output.
"""

import ctypes
import os
import threading
import time

from fastrm import stop
from fastrm.data import loader
from fastrm.data.prepared import workers
from fastrm.data.prepared.units import UnitReader
from fastrm.model import weight_writer
from fastrm.train import engine, loop

stop.ORDERLY_SECONDS = 0.5


def _say() -> None:
    os.write(1, b"\nstuck\n")


def _sleep(*_, **__) -> None:
    _say()
    time.sleep(3600)


def _deadlock(*_, **__) -> None:
    """As a lock that another thread held when the process was forked: nothing in this process will release it."""
    lock = threading.Lock()
    lock.acquire()
    _say()
    lock.acquire()


def reading() -> None:
    """A process that prepares data."""
    UnitReader.__call__ = _sleep


def reading_deaf() -> None:
    """The process itself, in a library that no signal interrupts, so that Python does not call a handler."""
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)

    def lock_twice(*_, **__) -> None:
        libc.pthread_mutex_lock(mutex)
        _say()
        libc.pthread_mutex_lock(mutex)

    UnitReader.__call__ = lock_twice
    stop.FORCED_SECONDS = 2.0


def reading_for_ever() -> None:
    """The same, where a second break comes before the first has ended the processes: the interpreter waits for them."""
    workers.active_children = list
    reading()
    stop.FORCED_SECONDS = 2.0


def loading() -> None:
    """The training process, before its first step."""
    loop.make_engine = _sleep


def passing() -> None:
    """A forward and backward pass, as long as a compilation."""
    engine.LocalEngine.accumulate = _sleep


def evaluating() -> None:
    """The data worker of an evaluation, which holds back the packs that the run waits for."""
    evaluate = loop.evaluate

    def stuck(run) -> bool:
        loader.build_pack = _deadlock
        return evaluate(run)

    loop.evaluate = stuck


def scoring() -> None:
    """The data worker of `fastrm score` and `fastrm eval`."""
    loader.build_pack = _deadlock


def exporting() -> None:
    """The writing of a tensor."""
    weight_writer.WeightWriter.write = _sleep


def swallowing() -> None:
    """A library that catches whatever is raised, in less time than a user would see."""

    def swallow(*_, **__) -> None:
        _say()
        while True:
            try:
                time.sleep(3600)
            except BaseException:
                continue

    engine.LocalEngine.accumulate = swallow
    stop.FORCED_SECONDS = 2.0


def unsent() -> None:
    """A pack that its worker cannot send, as when shared memory is full."""
    loader.PackBuilder.__getitem__ = lambda builder, plan: lambda: None  # a function of this module's cannot be sent
