"""The pretrained model of the tests: converted once for each module that asks for it."""

import importlib.util
from pathlib import Path

import pytest

from pretrained.convert import PACKAGE, convert, find_gguf

_MISSING = [name for name in (PACKAGE.replace("-", "_"), "gguf") if importlib.util.find_spec(name) is None]
needs_smollm2 = pytest.mark.skipif(
    bool(_MISSING), reason=f"needs {' and '.join(_MISSING)}: make pretrained installs them without llama.cpp"
)


@pytest.fixture(scope="module")
def smollm2_folder(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, float32."""
    folder = tmp_path_factory.mktemp("smollm2") / "SmolLM2-135M-Instruct"
    convert(find_gguf(), folder)
    return folder
