"""The rates of a device that figures are held against: of large copies, and of large matrix products."""

import statistics

import torch

from bench.harness.timing import Stopwatch, timed

COPY_BYTES = 2 << 30
COPIES = 20
WARMUPS = 2


def copy_bytes_per_second(device: str) -> float | None:
    """Return the bandwidth of a large device-to-device copy, bytes read plus bytes written; None on a CPU."""
    if device == "cpu":
        return None
    source = torch.randint(0, 1 << 30, (COPY_BYTES // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    seconds = [timed(lambda: target.copy_(source), device) for _ in range(WARMUPS + 1 + COPIES)]
    return 2 * COPY_BYTES / statistics.median(seconds[WARMUPS + 1 :])


def product_seconds(rows: int, inner: int, columns: int, device: str, dtype: torch.dtype) -> list[float]:
    """Return the seconds of each of ten products of a (rows, inner) and an (inner, columns) matrix, after two more."""
    a = torch.randn(rows, inner, device=device, dtype=dtype)
    b = torch.randn(inner, columns, device=device, dtype=dtype)
    seconds = []
    for _ in range(WARMUPS + 10):
        with Stopwatch() as watch:
            a @ b
        seconds.append(watch.wall)
    return seconds[WARMUPS:]
