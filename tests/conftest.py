"""Without a GPU, Triton's kernels run in its interpreter; it must be chosen before Triton is imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Their asserts show values, as those in test files do.
pytest.register_assert_rewrite("drop_in_models", "head_cases", "precision", "runs", "source_rows", "stock", "support")

from smollm2 import smollm2_folder  # noqa: E402, F401  (fixture of the pretrained model's tests)
from source_rows import read_json_rows, read_one, refusal  # noqa: E402, F401  (fixtures of the readers' tests)
