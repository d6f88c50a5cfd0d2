"""Without a GPU, Triton's kernels run in its interpreter; it must be chosen before Triton is imported."""

import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Asserts of helpers show values, as those in test files do.
pytest.register_assert_rewrite("tests.helpers")

from tests.helpers.smollm2 import smollm2_folder  # noqa: E402, F401  (fixture of the pretrained model's tests)

# Files that take about half a minute or more, whatever the number of their tests, the longest first.
LONG = [
    "tests/model/test_real_widths.py", "tests/train/test_real_widths_runs.py", "tests/forecast/test_plan.py",
    "tests/forecast/test_dry_run.py", "tests/train/test_pretrained_rooms.py", "tests/model/test_hf.py",
    "tests/project/test_docs.py", "tests/serve/test_command.py", "tests/ablate/test_ablate.py",
    "tests/bench/training/test_training_bench.py", "tests/serve/test_faults.py", "tests/forecast/test_fake_step.py",
    "tests/train/test_launch.py", "kernels/tests/test_preference_head_triton_values.py",
    "tests/forecast/test_plan_memory.py", "tests/bench/pretrained/test_pretrained_conversion.py",
    "tests/bench/pretrained/test_pretrained_bench.py", "tests/serve/test_real_rows.py", "tests/rl/test_trl.py",
]  # fmt: skip


def pytest_configure(config):
    """Let pytest-xdist give out files in the order below: by its own, a long test that is alone in its file is last."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Begin with the files that take long, then those of many tests, so that no process waits at the end."""
    files = [item.nodeid.partition("::")[0] for item in items]
    num_tests, places = Counter(files), {file: place for place, file in enumerate(LONG)}
    items.sort(key=lambda item: (places.get(f := item.nodeid.partition("::")[0], len(LONG)), -num_tests[f], f))


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
