"""Imports go one way: no package uses one that stands above it, and no modules import one another in a circle.

The sources are parsed, so that an import inside a function counts like one at the top.
"""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers.project import PROJECT
from tests.helpers.waiting import PATIENCE

# From below to above; `__init__` is what `import fastrm` offers.
FOUNDATION = {"errors", "limits", "lines", "names", "yaml_files", "json_files", "storage", "resources", "tables", "ui"}
FOUNDATION |= {"stop", "sections", "data_config", "loss_config", "stopping_config", "lora_config", "config"}
FOUNDATION |= {"paradigm_config", "hub_errors", "resident"}
TOP = {"cli_options", "commands", "cli", "api", "__init__"}
LOWER = [FOUNDATION, {"report"}, {"prompts"}, {"data"}, {"model"}, {"hf"}, {"evaluate"}, {"rl"}, {"serve"}]
ORDER = [*LOWER, {"train"}, {"share"}, {"ablate"}, {"forecast"}, {"grpo"}, {"judge"}, TOP]


def _module(file: Path, parent: Path) -> str:
    parts = file.relative_to(parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(parent: Path, package: str, of: str = "") -> dict[str, set[str]]:
    """Return what each module below `parent / package` imports of `of` (default: of that package), by dotted names."""
    files = {_module(file, parent): file for file in sorted((parent / package).rglob("*.py"))}
    found: dict[str, set[str]] = {}
    for module, file in files.items():
        names = found[module] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{file}:{node.lineno}: a relative import; write the whole name"
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= {name if name in files else node.module for name in whole}
    of = of or package
    return {module: {name for name in names if name.split(".")[0] == of} for module, names in found.items()}


def _layer(module: str) -> int:
    name = f"{module}.__init__".split(".")[1]
    places = [number for number, names in enumerate(ORDER) if name in names]
    assert places, f"{module}: has no place in ORDER; put it where it belongs"
    return places[0]


def backward(found: dict[str, set[str]]) -> list[str]:
    """Return the imports of packages that stand above the importing one."""
    return [
        f"{module} imports {name}"
        for module, names in found.items()
        for name in sorted(names)
        if _layer(name) > _layer(module)
    ]


def circle(found: dict[str, set[str]]) -> list[str]:
    """Return the modules of one circle of imports, the first repeated at the end; none if there is none."""
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_packages_import_only_what_stands_below_them():
    found = imports(PROJECT, "fastrm")
    assert "fastrm.train.loop" in found["fastrm.commands.training"], "an import inside a function was not seen"
    assert not backward(found)


@pytest.mark.parametrize("folder, package", [(".", "fastrm"), ("kernels", "fastrm_kernels")])
def test_no_modules_import_one_another_in_a_circle(folder, package):
    found = imports(PROJECT / folder, package)
    assert len(found) > 10 and not circle(found)


def test_kernels_import_nothing_of_fastrm():
    for module, names in imports(PROJECT / "kernels", "fastrm_kernels", of="fastrm").items():
        assert not names, module


@pytest.mark.parametrize("statement", ["from fastrm.train.loop import train", "import fastrm.train.loop"])
@pytest.mark.parametrize("place", ["{}", "def work():\n    {}"], ids=["at the top", "in a function"])
def test_a_backward_import_and_a_circle_are_found(tmp_path, statement, place):
    for name, text in (("data/group.py", place.format(statement)), ("train/loop.py", "from fastrm.data import group")):
        file = tmp_path / "fastrm" / name
        file.parent.mkdir(parents=True)
        file.write_text(text + "\n")
    found = imports(tmp_path, "fastrm")
    assert backward(found) == ["fastrm.data.group imports fastrm.train.loop"]
    assert set(circle(found)) == {"fastrm.data.group", "fastrm.train.loop"}


def test_importing_fastrm_and_its_commands_loads_no_torch():
    program = "import sys, fastrm, fastrm.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=PATIENCE).returncode == 0
