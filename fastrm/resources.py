"""The free resources of this machine: memory of the host, and room on a disk."""

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

# Limit, use, and a line of memory.stat that says how much of the use is cached files, which give way. The names are
# those of the kernel's documentation: admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes of host memory that processes can still take without swapping.

    It is the number that Linux calls available, or less where a control group (a container, a job of a scheduler) may
    not use all of it.

    Args:
        root: of the file system in which control groups are looked up.
    """
    import psutil

    return min([psutil.virtual_memory().available, *_left_of_groups(root)])


def _left_of_groups(root: Path) -> Iterator[int]:
    """Yield the bytes left to each control group that this process is in, and to the groups around it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return  # the machine does not run Linux
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            names, top = _V2, root / "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            names, top = _V1, root / "sys/fs/cgroup/memory"
        else:
            continue
        inner = top / group.lstrip("/")
        for folder in (inner, *inner.parents):
            if folder != top and top not in folder.parents:
                break
            # A container sees its own group at the top, and may not see the path that the line names.
            left = _left_of(folder, *names)
            if left is not None:
                yield left


def _left_of(folder: Path, limit: str, usage: str, cached: str) -> int | None:
    """Return the bytes left of a group's limit; None if it has none that can be read."""
    try:
        most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return None if most == "max" else max(0, int(most) - used + int(statistics.get(cached, 0)))
    except (OSError, ValueError):
        return None


def free_disk(path: Path) -> int:
    """Return the bytes that may be written below `path`, which need not exist yet.

    Raises:
        OSError: the disk cannot be asked, or it stores no files, as /proc.
    """
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    usage = shutil.disk_usage(existing)
    if not usage.total:
        raise OSError(errno.EROFS, f"the file system of {existing} stores no files")
    return usage.free
