"""Files and folders that appear whole or not at all, and stay when the power fails; one process in a folder or file."""

import fcntl
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

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


def check_output(path: Path) -> None:
    """Refuse a file that cannot be written, before the work that it is for.

    Raises:
        StorageError: its folder does not exist, or it is a folder.
    """
    if not path.parent.is_dir():
        raise StorageError(f"{path}: there is no folder {path.parent}; make it or name another file")
    if path.is_dir():
        raise StorageError(f"{path}: is a folder; name a file")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name what is written in an error of the block, which must hold only operations on it.

    Raises:
        StorageError: in place of an OSError of the block.
    """
    try:
        yield
    except OSError as error:
        text = f"{path}: cannot be written: {error.strerror or error}; free space, or choose another place"
        raise StorageError(text) from error


@contextmanager
def whole_file(path: Path, shared: bool = False) -> Iterator[Callable[[str | bytes], None]]:
    """Yield a function that writes to a file, which has its name once it is complete and on the disk.

    If the block ends with an error, what was written is removed; an older file of the name stays.

    Args:
        shared: several processes may write the file at the same time, and the last one's stays.

    Raises:
        StorageError: at once if the file cannot be made; later if it cannot be written.
    """
    check_output(path)
    writer = f".{os.getpid()}.{threading.get_ident()}" if shared else ""
    partial = path.with_name(f"{path.name}{writer}.part")
    with writing(path):
        file = partial.open("wb")

    def write(content: str | bytes) -> None:
        with writing(path):
            file.write(content.encode() if isinstance(content, str) else content)

    try:
        yield write
        with writing(path):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(partial, path)
            sync_path(path.parent)
    except BaseException:
        # Closing flushes, which fails again on a full disk; the first error is the one to report.
        with suppress(OSError):
            file.close()
        with suppress(OSError):
            partial.unlink()
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that replaces an older one when it is complete and on the disk.

    Raises:
        StorageError: if it cannot be written.
    """
    with whole_file(path) as write:
        write(content)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a folder for files, which has the name `target` once all of them are on the disk; an older folder goes.

    If the block ends with an error, what was written is removed; the older folder is as it was.

    Raises:
        OSError: the disk is full or broken.
    """
    partial = target.with_name(target.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in partial.iterdir():
            sync_path(path)
        sync_path(partial)
        _replace_folder(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace_folder(new: Path, target: Path) -> None:
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    is_there = target.exists()
    try:
        if is_there:
            target.rename(old)
        new.rename(target)
    except BaseException:  # a signal may also come between the two renames
        if is_there and not target.exists():
            old.rename(target)
        raise
    sync_path(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked_folder(folder: Path, what: str = "the folder", way_out: str = "wait for it") -> Iterator[None]:
    """Hold a folder for this process alone; it is made if it is not there.

    Args:
        what: the folder is, in the message of one that cannot be written.
        way_out: what to do while another process holds it.

    Raises:
        StorageError: if another process holds it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise StorageError(f"{folder}: {what} cannot be written: {error.strerror}; choose another one") from None
    with file:
        if not _take_lock(file):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise StorageError(f"{folder}: in use by {holder}; {way_out}")
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def hold_file(file: IO, path: Path, way_out: str = "wait for it") -> None:
    """Hold an open file for this process alone, until the process closes it, or what else it has open of it.

    Args:
        file: open for writing.
        way_out: what to do while another process holds it.

    Raises:
        StorageError: if another process holds it.
    """
    if not _take_lock(file):
        raise StorageError(f"{path}: in use by another process; {way_out}")


def _take_lock(file: IO) -> bool:
    try:
        # A POSIX record lock: unlike flock's it is not inherited by forked workers, which may outlive a killed
        # process by seconds and would keep its folder locked.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
