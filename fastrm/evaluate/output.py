"""Output files and lines of evaluations."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from fastrm.errors import StorageError
from fastrm.ui import make_console, message

# The most refused rows that are named on the screen; files name all.
_NAMED = 10


@contextmanager
def complete_file(path: Path) -> Iterator[Callable[[str], None]]:
    """Yield a function that writes text to a file, which appears under its name at the end or not at all.

    Raises:
        StorageError: at once if the file cannot be made; later if it cannot be written.
    """
    check_output(path)
    partial = path.with_name(path.name + ".part")
    with _named(path):
        file = partial.open("w")

    def write(text: str) -> None:
        with _named(path):
            file.write(text)

    try:
        yield write
        with _named(path):
            file.close()
            os.replace(partial, path)
    except BaseException:
        # Closing flushes, which fails again on a full disk; the first error is the one to report.
        with suppress(OSError):
            file.close()
        with suppress(OSError):
            partial.unlink()
        raise


def check_output(path: Path) -> None:
    """Refuse a file that cannot be written, before the work that it is for.

    Raises:
        StorageError: its folder does not exist, or it is a folder.
    """
    if not path.parent.is_dir():
        raise StorageError(f"{path}: there is no folder {path.parent}; make it or name another file")
    if path.is_dir():
        raise StorageError(f"{path}: is a folder; name a file")


def print_refused(messages: Sequence[str], where: str) -> None:
    """Name the first refused rows on standard error; `where` has all of them."""
    console = make_console(stderr=True)
    for text in messages[:_NAMED]:
        message(console, f"refused: {text}")
    if len(messages) > _NAMED:
        message(console, f"... and {len(messages) - _NAMED} more; {where}")


@contextmanager
def _named(path: Path):
    """Name the output in an error of the block, which must hold only operations on it."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written: {error.strerror or error}; make room or name another file"
        ) from None
