"""The treatment of SIGTERM and Ctrl-C: a command leaves within ten seconds, whatever it is doing.

A signal is answered in three ways, each for what the one before it does not reach:

1. Work that can stop at a good place asks `StopFlag.signal` there, and leaves in order.
2. Where the work says that it may be broken off (`StopFlag.breakable`), `StopRequest` is raised in the middle of it:
   in a wait for a data worker that will never answer, in a compilation, between two operations of a long pass.
3. After FORCED_SECONDS the process ends where it stands, as after a second signal: no library, and no lock that a
   library holds, can keep it. Files that appear whole or not at all make that safe. Only `StopFlag.saving` is
   waited for, so that a slow disk does not cost a checkpoint.

Python calls a handler only when the main thread is between two of its instructions. A thread of the flag's own is told
of the signal by the system itself, so that neither a long call into a library nor a signal that comes just before a
wait begins keeps the process. Only a call that holds Python's own lock (the GIL) still does.
"""

import contextlib
import ctypes
import os
import select
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
_LEFT = 0  # written where the numbers of signals are, when a flag is left
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

    def __enter__(self) -> "StopFlag":
        is_main = threading.current_thread() is threading.main_thread()  # only the main thread may, and is asked to
        numbers = (signal.SIGTERM, signal.SIGINT, PASSED_ON, _NUDGE) if is_main else ()
        self._pid, self._main = os.getpid(), threading.get_ident()
        came, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        if is_main:
            self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._on) for number in numbers}
        threading.Thread(target=self._watch, args=(came,), daemon=True).start()
        self._entered.append(self)
        return self

    def __exit__(self, *_) -> None:
        self._entered.remove(self)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            signal.set_wakeup_fd(self._wakeup_before)
        self._tell(_LEFT)  # after which the thread closes the pipe
        if self.signal and self._entered:
            outer = self._entered[-1]
            outer.leave()  # it has been answered
            outer._signalled |= self._signalled
            # A checkpoint, or a step of several ranks, may have taken longer than the time that was left.
            outer._begin(self.signal, max(self._came_at, time.monotonic() + ORDERLY_SECONDS - FORCED_SECONDS))
            outer._tell(signal.Signals[self.signal] if self._signalled else PASSED_ON)

    def bound_exit(self, code: int) -> None:
        """End the process with `code` when the time after a signal is over, if the interpreter's exit is not faster.

        Python waits there for threads and for the processes of pools, which may be stuck. To be called when the flag
        has been left.
        """
        if self.signal:
            left = self._came_at + FORCED_SECONDS - time.monotonic()
            ending = threading.Timer(max(left, 0.0), os._exit, (code,))
            ending.daemon = True
            ending.start()

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

    def _tell(self, number: int) -> None:
        if os.getpid() == self._pid:
            os.write(self._wakeup, bytes([number]))

    def _break_off(self) -> None:
        now = time.monotonic()
        if self.signal and self._patience is not None and now >= max(self._came_at + self._patience, self._next_break):
            self._next_break = now + ORDERLY_SECONDS  # until then the work may leave in order
            raise StopRequest(self.signal)

    def _watch(self, came: int) -> None:
        """Wait for a signal, in a thread; then call the handler again and again, and at last end the process.

        The handler is called again since it may not have run, or a library may have swallowed its exception.

        Args:
            came: end of a pipe, from which a byte is read for every signal that has a handler, with its number.
        """
        began = name = None
        signalled = False
        pipe = select.poll()  # not select, which knows the first 1,024 open files alone
        pipe.register(came, select.POLLIN)
        while True:
            number = None
            if pipe.poll(None if began is None else _NUDGE_SECONDS * 1000):
                number = os.read(came, 1)[0]
            if number == _LEFT:
                break
            if number in (signal.SIGTERM, signal.SIGINT):
                if signalled:
                    os._exit(75)
                signalled = True
            if began is None and number in (signal.SIGTERM, signal.SIGINT, PASSED_ON):
                began, name = time.monotonic(), signal.Signals(number).name
            elif began is not None and number is None:
                self._press(began, name)
        os.close(came)
        os.close(self._wakeup)

    def _press(self, began: float, name: str) -> None:
        """Call the handler of a signal that came some time ago, or end the process."""
        if self.signal is None or self._patience is not None:
            signal.pthread_kill(self._main, _NUDGE)
        since = time.monotonic() - (began if self.signal is None else self._came_at)
        if self.is_forced and not self._is_saving and since > FORCED_SECONDS:
            what = f"stopped by {self.signal or name}, out of order; what was saved before is intact"
            fail(75, InterruptedRun.__name__, what)
            os._exit(75)


def _forget_the_parents_pipe() -> None:
    """Keep the signals of a forked process from its parent, which would take them for its own."""
    if StopFlag._entered:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_the_parents_pipe)


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
