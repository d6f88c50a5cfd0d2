"""Memory: of this process as Linux counts it, and of a GPU as torch's allocator does."""

import ctypes
import gc
import sys
from collections.abc import Callable

import torch

MIB = 1 << 20


def peak_mib(run: Callable[[], object], device: str) -> float | None:
    """Return how many MiB memory rises above rest while `run` runs: the GPU's, or else this process's."""
    if device == "cpu":
        return resident_peak_mib(run)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    resting = torch.cuda.memory_allocated()
    kept = run()
    torch.cuda.synchronize()
    del kept
    return (torch.cuda.max_memory_allocated() - resting) / MIB


def resident_peak_mib(run: Callable[[], object]) -> float | None:
    """Return how many MiB this process's resident memory rises while `run` runs; None without Linux's /proc."""
    if sys.platform != "linux":
        return None
    gc.collect()
    # Pages that the allocator keeps from earlier steps would hide this step's rise.
    ctypes.CDLL(None).malloc_trim(0)
    reset_peak()
    resting = status_bytes("VmRSS")
    run()
    return (status_bytes("VmHWM") - resting) / MIB


def reset_peak() -> None:
    """Reset this process's VmHWM to its present size (Linux)."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def status_bytes(field: str, process: int | str = "self") -> int:
    """Return a size of a process's memory, such as VmRSS or its peak VmHWM (Linux); by default this process's."""
    with open(f"/proc/{process}/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))


def clean_memory() -> None:
    """Free the memory of the last shape, whose blocks would not fit the next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
