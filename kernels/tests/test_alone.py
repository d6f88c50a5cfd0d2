"""The package needs torch and triton only, and the examples of its README run."""

import ast
import re
import sys
from pathlib import Path

import pytest

import fastrm_kernels

PACKAGE = Path(fastrm_kernels.__file__).parent
README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
INTERPRETER = {"numpy"}  # Triton's interpreter needs it; launch.py asks for its version


def imported(source):
    """The top-level names of all imports, those inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("file", [str(file.relative_to(PACKAGE)) for file in sorted(PACKAGE.rglob("*.py"))])
def test_a_module_imports_torch_and_triton_only(file):
    own = {"fastrm_kernels", "torch", "triton"}
    assert imported((PACKAGE / file).read_text(encoding="utf-8")) - sys.stdlib_module_names - own <= INTERPRETER


@pytest.mark.parametrize("block", BLOCKS, ids=[str(number) for number in range(len(BLOCKS))])
def test_readme_runs_as_written(block, tmp_path, monkeypatch):
    if "transformers" in imported(block):
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, README, "exec"), {})


def test_readme_has_an_example_for_torch_alone():
    assert [block for block in BLOCKS if imported(block) == {"torch", "fastrm_kernels"}]
