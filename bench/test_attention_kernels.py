"""tree_attention against FlashAttention, duplicated sequences and FlexAttention; on a CPU the eager paths alone."""

import pytest
import torch

from kernel_results import ATTENTION
from kernel_shapes import attention_shapes


@pytest.mark.parametrize("shape", attention_shapes(torch.cuda.is_available()), ids=lambda shape: shape.name)
def test_attention_agrees_with_float64(shape, benchmark, kernels):
    kernels.compare(ATTENTION, shape, benchmark)
