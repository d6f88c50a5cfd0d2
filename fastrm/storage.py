"""Files and folders that appear whole or not at all, and stay when the power fails; one process in a folder."""

import fcntl
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastrm.errors import StorageError


def sync_path(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk.

    Raises:
        OSError: it cannot be opened or written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replaced(path: Path) -> Iterator[io.BufferedWriter]:
    """Yield a file that replaces `path` when it is complete and on the disk.

    Raises:
        StorageError: if it cannot be written.
    """
    partial = path.with_name(path.name + ".part")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_path(path.parent)
    except OSError as error:
        raise StorageError(f"{partial}: {error.strerror}; free space, or choose another folder") from error


def put_folder(partial: Path, done: Path) -> None:
    """Give a complete folder of files its final name once all of them are on the disk.

    Raises:
        OSError: the disk is full or broken.
    """
    for file in partial.iterdir():
        sync_path(file)
    sync_path(partial)
    partial.rename(done)
    sync_path(done.parent)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone while a set is made in it.

    Raises:
        StorageError: if another process holds it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error.strerror}; choose another folder") from None
    with file:
        try:
            # A record lock is not inherited by forked workers, which may outlive a killed process by moments.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StorageError(f"{folder}: another process is preparing data there; wait for it") from None
        yield
