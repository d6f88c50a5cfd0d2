"""The pretrained model of the tests: converted once, by the first of the processes that asks for it."""

import fcntl
import importlib.util
import os
from pathlib import Path

import pytest

from bench.pretrained.convert import PACKAGE, convert, find_gguf

_MISSING = [name for name in (PACKAGE.replace("-", "_"), "gguf") if importlib.util.find_spec(name) is None]
needs_smollm2 = pytest.mark.skipif(
    bool(_MISSING), reason=f"needs {' and '.join(_MISSING)}: make pretrained installs them without llama.cpp"
)


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, float32, to be read only: all test processes share it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "smollm2" / "SmolLM2-135M-Instruct"
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            convert(find_gguf(), folder)
    return folder
