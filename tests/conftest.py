"""Without a GPU, Triton's kernels run in its interpreter; it must be chosen before Triton is imported."""

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Asserts of helpers show values, as those in test files do.
pytest.register_assert_rewrite("tests.helpers")

from tests.helpers.smollm2 import smollm2_folder  # noqa: E402, F401  (fixture of the pretrained model's tests)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Results of checks against transformers go where no other session finds them; caches of others stay."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in (("MPLCONFIGDIR", "matplotlib"), ("HF_HOME", "huggingface")):
            patch.setenv(name, os.environ.get(name, str(usual / folder)))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def stock_auto_classes():
    """`import fastrm.hf` changes transformers' Auto classes for the rest of its test, and for no other."""
    yield
    if (hf := sys.modules.pop("fastrm.hf", None)) is not None:
        from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as classes

        for config in hf.CLASSES:
            classes._extra_content.pop(config, None)
