"""Benchmark of preference_head against eager code, torch.compile and the bandwidth floor; on a CPU eager only."""

import pytest
import torch

from bench.kernels.results import HEAD
from bench.kernels.shapes import head_shapes


@pytest.mark.parametrize("shape", head_shapes(torch.cuda.is_available()), ids=lambda shape: shape.name)
def test_head_agrees_with_float64(shape, benchmark, kernels):
    kernels.compare(HEAD, shape, benchmark)
