"""Without a GPU, Triton's kernels run in its interpreter; it must be chosen before Triton is imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Asserts of helpers show values, as those in test files do.
pytest.register_assert_rewrite("kernel_cases")
