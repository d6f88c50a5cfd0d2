"""The commands of the documentation, run as they stand there.

Lines `$ ...` of ```console blocks run in order, page by page, in a folder that shows the project's files
and takes what the commands write. `runs/quickstart/model` and `runs/second/model` are trained for a step.
`fastrm ...` runs through the command's own entry in this process, as starting torch anew for every line
would take most of the time; other lines run in bash.
"""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from fastrm import cli
from fastrm.config import load_config
from fastrm.train.loop import train
from runs import documented_commands, tiny_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("data.md", "evaluation.md")
WRITTEN = {"runs", ".git", "build"}  # not shown: commands write there, or nothing reads it


@pytest.fixture
def project(tmp_path):
    """A folder with the project's entries as links, and two quick models."""
    folder = tmp_path / "project"
    (folder / "runs" / "quickstart").mkdir(parents=True)
    for entry in ROOT.iterdir():
        if entry.name not in WRITTEN:
            (folder / entry.name).symlink_to(entry)
    train(load_config(tiny_config(tmp_path, "digits:eval", run={"max_steps": 1})))
    shutil.copytree(tmp_path / "run" / "model", folder / "runs" / "second" / "model")
    (tmp_path / "run" / "model").rename(folder / "runs" / "quickstart" / "model")
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_docs_commands_run_as_written(page, project, monkeypatch, capsys):
    lines = documented_commands(page)
    assert lines, f"docs/{page} has no commands"
    monkeypatch.chdir(project)
    before = sorted(path.name for path in ROOT.iterdir())
    for line in lines:
        if line.startswith("fastrm "):
            monkeypatch.setattr("sys.argv", shlex.split(line))
            with pytest.raises(SystemExit) as leave:
                cli.main()
            code, said = leave.value.code, capsys.readouterr()
            assert not code, f"docs/{page}: $ {line}\n{said.out}\n{said.err}"
        else:
            subprocess.run(["bash", "-c", line], check=True, timeout=60)
    assert sorted(path.name for path in ROOT.iterdir()) == before, "a command wrote into the project itself"


def test_docs_commands_are_found():
    assert any("bench:rm_bench" in line for line in documented_commands("evaluation.md"))
