"""Writes that survive a crash or a loss of power."""

import os
from pathlib import Path


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
