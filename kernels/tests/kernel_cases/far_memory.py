"""Tensors whose elements lie more than 2^31 apart, for tests of offsets."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


@contextmanager
def untouched(numel: int, dtype: torch.dtype, device: str) -> Iterator[torch.Tensor]:
    """A flat tensor of which a test touches a few elements.

    On a CPU the rest is never allocated. On a GPU all of it is: the test is skipped where less than twice as much is
    free, since other tests may run beside it, and the memory is given back afterwards.
    """
    size = numel * dtype.itemsize
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 2 * size:
        pytest.skip(f"needs {2 * size / 2**30:.0f} GiB of free GPU memory")
    try:
        yield torch.empty(numel, dtype=dtype, device=device)
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def spread_out(rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """`rows` (N, ...) with its rows so far apart that the last but one begins at element 2^31; dense within a row."""
    dense = rows.contiguous()
    stride = 2**31 // (len(dense) - 2) // 16 * 16 + 16
    with untouched((len(dense) - 1) * stride + dense[0].numel(), dense.dtype, dense.device.type) as far:
        yield far.as_strided(dense.shape, (stride, *dense.stride()[1:])).copy_(dense)
