"""The treatment of SIGTERM and Ctrl-C: a command leaves within ten seconds, whatever it is doing.

A signal is answered in three ways, each for what the one before it does not reach:

1. Work that can stop at a good place asks `StopFlag.signal` there, and leaves in order.
2. Where the work says that it may be broken off (`StopFlag.breakable`), `StopRequest` is raised in the middle of it:
   in a wait for a data worker that will never answer, in a compilation, between two operations of a long pass.
3. After FORCED_SECONDS the process ends where it stands, as after a second signal: no library, and no lock that a
   library holds, can keep it. Files that appear whole or not at all make that safe. Only `StopFlag.saving` is
   waited for, so that a slow disk does not cost a checkpoint.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from fastrm.errors import InterruptedRun
from fastrm.json_files import to_json
from fastrm.lines import fit

# The signal by which the watcher of several ranks passes one on. A scheduler may have sent that to all of them itself,
# so that passing on the same one would look like a second signal.
PASSED_ON = signal.SIGUSR1
# After a signal, how long work may take to reach a good place before it is broken off, and all of it before the end.
ORDERLY_SECONDS = 3.0
FORCED_SECONDS = 9.0
_NUDGE_SECONDS = 0.5
_NUDGE = signal.SIGURG  # ignored by default, so that a late one does no harm
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class StopRequest(KeyboardInterrupt):
    """A signal's end of the work in progress.

    It is not an Exception, so that no code takes it for an error of the work.

    Args:
        name: of the signal, as SIGTERM.
    """

    def __init__(self, name: str = signal.SIGINT.name):
        super().__init__(name)
        self.name = name


class StopFlag:
    """A context that handles SIGTERM and SIGINT, in the main thread alone.

    A second signal ends the process at once. A flag inside another replaces it; when it is left, the outer one goes on
    with the time that is left, but at least ORDERLY_SECONDS.

    Args:
        breaks: break work off at once, wherever it is: for a command that keeps nothing, or keeps it in whole files.

    Attributes:
        signal: name of the signal that has come, or None. Poll it.
        is_forced: end the process after FORCED_SECONDS. Several ranks are not: they leave together, at a step's end.
    """

    _entered: ClassVar[list["StopFlag"]] = []

    def __init__(self, breaks: bool = False):
        self.signal: str | None = None
        self.is_forced = True
        self._patience = 0.0 if breaks else None  # None: work must not be broken off now
        self._came_at = self._next_break = 0.0
        self._is_saving = self._signalled = False
        self._left = threading.Event()

    def __enter__(self) -> "StopFlag":
        is_main = threading.current_thread() is threading.main_thread()  # only the main thread may, and is asked to
        numbers = (signal.SIGTERM, signal.SIGINT, PASSED_ON, _NUDGE) if is_main else ()
        self._pid, self._main = os.getpid(), threading.get_ident()
        self._before = {number: signal.signal(number, self._on) for number in numbers}
        self._entered.append(self)
        return self

    def __exit__(self, *_) -> None:
        self._left.set()
        self._entered.remove(self)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.signal and self._entered:
            outer = self._entered[-1]
            outer.leave()  # it has been answered
            outer._signalled |= self._signalled
            # A checkpoint, or a step of several ranks, may have taken longer than the time that was left.
            outer._begin(self.signal, max(self._came_at, time.monotonic() + ORDERLY_SECONDS - FORCED_SECONDS))

    def leave(self) -> None:
        """Stop breaking work off: the signal has been answered, and the rest is quick."""
        self._patience = None

    @contextlib.contextmanager
    def breakable(self, patience: float | None = None) -> Iterator[None]:
        """Let the block be broken off, `patience` seconds after the signal; default: ORDERLY_SECONDS.

        Raises:
            StopRequest: inside the block; and in place of an error that the block raises after a signal: a worker that
                the same signal has killed, say, makes the block fail.
        """
        before, self._patience = self._patience, ORDERLY_SECONDS if patience is None else patience
        try:
            self._break_off()
            yield
        except InterruptedRun:
            raise
        except Exception as error:
            if self.signal is None:
                raise
            raise StopRequest(self.signal) from error
        finally:
            self._patience = before

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Protect the block, which writes what is kept: only a second signal breaks it off or ends it."""
        before, self._patience, self._is_saving = self._patience, None, True
        try:
            yield
        finally:
            self._patience, self._is_saving = before, False

    def _on(self, number: int, frame) -> None:
        if os.getpid() != self._pid:  # a forked child that has not yet set its own handlers
            return
        if number == PASSED_ON:
            self._begin(signal.SIGTERM.name)
        elif number != _NUDGE and self._signalled:
            os._exit(75)
        elif number != _NUDGE:
            self._signalled = True
            self._begin(signal.Signals(number).name)
        self._break_off()

    def _begin(self, name: str, came_at: float | None = None) -> None:
        if self.signal is None:
            self.signal, self._came_at = name, came_at or time.monotonic()
            threading.Thread(target=self._watch, daemon=True).start()

    def _break_off(self) -> None:
        now = time.monotonic()
        if self.signal and self._patience is not None and now >= max(self._came_at + self._patience, self._next_break):
            self._next_break = now + ORDERLY_SECONDS  # until then the work may leave in order
            raise StopRequest(self.signal)

    def _watch(self) -> None:
        """Call the handler again and again, in a thread, since a library may swallow its exception; then end."""
        while not self._left.wait(_NUDGE_SECONDS):
            if self._patience is not None:
                signal.pthread_kill(self._main, _NUDGE)
            if self.is_forced and not self._is_saving and time.monotonic() - self._came_at > FORCED_SECONDS:
                fail(75, "InterruptedRun", f"stopped by {self.signal}, out of order; what was saved before is intact")
                os._exit(75)


def end_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Let this process get a signal when its parent ends, however it ends (Linux).

    Args:
        parent: its process id.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # the parent ended before the line above
        os._exit(1)


def fail(code: int, kind: str, message: str, trace: str = "") -> int:
    """Say why the process ends, in a readable line and a last line of JSON; return the exit code.

    One of several processes writes it to a file instead: the process that watches over them reports for all.
    """
    if report := os.environ.get("FASTRM_FAILURE"):
        Path(report).write_text(to_json({"error": kind, "message": message, "trace": trace}))
        return code
    sys.stderr.write(trace)
    print(fit(f"error: {message}", sys.stderr), file=sys.stderr)
    print(to_json({"exit_code": code, "error": kind, "message": message}), file=sys.stderr, flush=True)
    return code
