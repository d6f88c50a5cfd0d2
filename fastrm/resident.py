"""The memory of a process as Linux counts it."""

import ctypes
import gc


def reset_peak() -> None:
    """Reset this process's VmHWM to its present size (Linux)."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def release_freed() -> None:
    """Give pages that the allocator keeps from earlier work back to Linux; they would hide what comes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def status_bytes(field: str, process: int | str = "self") -> int:
    """Return a size of a process's memory, such as VmRSS or its peak VmHWM (Linux); by default this process's."""
    with open(f"/proc/{process}/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))
