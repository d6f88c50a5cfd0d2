"""Benchmark of tree_attention against FlashAttention, duplicated sequences and FlexAttention; on a CPU eager only."""

import pytest
import torch

from bench.kernels.results import ATTENTION, pair_ratio
from bench.kernels.shapes import CPU_ATTENTION_SHAPES, attention_shapes

# The goal on a CPU, as a share of stock SDPA's time for as many pairs of a query and a key.
MOST_OF_STOCK = 1.3


@pytest.mark.parametrize("shape", attention_shapes(torch.cuda.is_available()), ids=lambda shape: shape.name)
def test_attention_agrees_with_float64(shape, benchmark, kernels):
    entry = kernels.compare(ATTENTION, shape, benchmark)
    if shape in CPU_ATTENTION_SHAPES and not benchmark.disabled:
        ratio = pair_ratio(entry, "eager")
        assert ratio <= MOST_OF_STOCK, f"a pair takes {ratio:.2f} times as long as in stock SDPA"
