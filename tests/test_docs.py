"""The commands of the documentation, run as they stand there.

Lines `$ ...` of ```console blocks run in order, page by page, in a copy of the project, which takes what the
commands write. `runs/quickstart/model` and `runs/second/model` are trained for a step.
`fastrm ...` runs through the command's own entry in this process, as starting torch anew for every line
would take most of the time; other lines run in bash.
"""

import shlex
import shutil
import subprocess

import pytest

from fastrm import cli
from fastrm.config import load_config
from fastrm.train.loop import train
from project_copy import copy_project
from runs import documented_commands, tiny_config

PAGES = ("data.md", "evaluation.md")


@pytest.fixture
def project(tmp_path):
    """A copy of the project, with two quick models."""
    folder = copy_project(tmp_path / "project")
    (folder / "runs" / "quickstart").mkdir(parents=True)
    train(load_config(tiny_config(tmp_path, "digits:eval", run={"max_steps": 1})))
    shutil.copytree(tmp_path / "run" / "model", folder / "runs" / "second" / "model")
    (tmp_path / "run" / "model").rename(folder / "runs" / "quickstart" / "model")
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_docs_commands_run_as_written(page, project, monkeypatch, capsys):
    lines = documented_commands(page)
    assert lines, f"docs/{page} has no commands"
    monkeypatch.chdir(project)
    for line in lines:
        if line.startswith("fastrm "):
            monkeypatch.setattr("sys.argv", shlex.split(line))
            with pytest.raises(SystemExit) as leave:
                cli.main()
            code, said = leave.value.code, capsys.readouterr()
            assert not code, f"docs/{page}: $ {line}\n{said.out}\n{said.err}"
        else:
            subprocess.run(["bash", "-c", line], check=True, timeout=60)


def test_docs_commands_are_found():
    assert any("bench:rm_bench" in line for line in documented_commands("evaluation.md"))
