"""Memory: of this process as Linux counts it, and of a GPU as torch's allocator does."""

import gc
import sys
from collections.abc import Callable

import torch

from fastrm.resident import release_freed, reset_peak, status_bytes

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
    release_freed()
    reset_peak()
    resting = status_bytes("VmRSS")
    run()
    return (status_bytes("VmHWM") - resting) / MIB


def clean_memory() -> None:
    """Free the memory of the last shape, whose blocks would not fit the next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
