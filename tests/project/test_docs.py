"""The documentation as its readers use it: commands run, examples parse, names exist.

Lines `$ ...` of ```console blocks run in order, page by page, in a copy of the project, which takes what the
commands write; models of one training step lie where the quick start and the readers' own runs leave theirs.
`fastrm ...` runs through the command's own entry in this process, as starting torch anew for every line would
take most of the time; other lines run in bash. Lines of ```sh blocks need a GPU, the hub or hours: of them the
subcommand, options, configuration, script or target must exist.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import tomllib
from functools import partial
from pathlib import Path

import pytest
import typer
import yaml
from PIL import Image

from fastrm import cli
from fastrm.ablate.grid import load_grid
from fastrm.config import load_config, load_run
from fastrm.evaluate.ensemble import EnsembleFile
from fastrm.grpo.config import GrpoConfig
from fastrm.prompts.spec import load_spec
from fastrm.train.loop import train
from fastrm.yaml_files import read_yaml, validate
from tests.helpers.documents import PAGES, blocks, commands_to_read, commands_to_run, text_of, words_of
from tests.helpers.project import PROJECT, copy_project
from tests.helpers.runs import tiny_config
from tests.helpers.waiting import PATIENCE

# Console lines that another test runs, or compares with what it computes.
RUN_ELSEWHERE = {
    "fastrm plan configs/full.yaml": "tests/forecast/test_room.py makes the table that docs/memory.md shows",
    "fastrm plan configs/lora.yaml": "tests/forecast/test_plan_lora.py makes the table that docs/lora.md shows",
    "fastrm serve runs/quickstart/model": "tests/serve/test_command.py runs the page's commands",
    "curl -s http://127.0.0.1:8000/v1/rewards": "tests/serve/test_command.py runs the page's commands",
    "python bench/models/random_model.py": "tests/train/test_real_widths_runs.py, whole with -m slow",
    "fastrm train configs/full.yaml model.path=runs/two-layers": "tests/train/test_real_widths_runs.py",
}
# Words in place of what a reader has, in commands that are only read.
READERS = {"MODEL", "FOLDER", "FILE", "my.yaml", "folder-or-file", "folder-or-archive"}
# Pages whose Python blocks do not run as they stand.
PYTHON_PAGES = [
    "docs/evaluation.md", "docs/exports.md", "docs/python.md", "docs/serving_engines.md", "kernels/README.md"
]  # fmt: skip


def is_run_elsewhere(line):
    return line.startswith(tuple(RUN_ELSEWHERE))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model after one step, as a run leaves it."""
    folder = tmp_path_factory.mktemp("trained")
    train(load_config(tiny_config(folder, "digits:eval", run={"max_steps": 1})))
    return folder / "run" / "model"


@pytest.fixture
def project(tmp_path, model, monkeypatch):
    """A copy of the project with models in it, as the working directory."""
    folder = copy_project(tmp_path / "project")
    for run in ("quickstart", "second", "my"):
        shutil.copytree(model, folder / "runs" / run / "model")
    monkeypatch.chdir(folder)
    return folder


def run_command(line, monkeypatch, capsys, page):
    if not line.startswith("fastrm "):
        subprocess.run(["bash", "-c", line], check=True, timeout=PATIENCE)
        return
    monkeypatch.setattr("sys.argv", words_of(line))
    with pytest.raises(SystemExit) as leave:
        cli.main()
    said = capsys.readouterr()
    assert not leave.value.code, f"{page}: $ {line}\n{said.out}\n{said.err}"


RUN_PAGES = [page for page in PAGES if not all(map(is_run_elsewhere, commands_to_run(page)))]


@pytest.mark.parametrize("page", [page for page in RUN_PAGES if page != "README.md"])
def test_commands_run_as_written(page, project, monkeypatch, capsys):
    for line in commands_to_run(page):
        if not is_run_elsewhere(line):
            run_command(line, monkeypatch, capsys, page)


def test_own_data_in_ten_lines_works(project, monkeypatch, capsys):
    """README's files as they stand, on a small local model in place of the hub's."""
    rows = blocks("README.md", "json")[0]
    config = yaml.safe_load(blocks("README.md", "yaml")[0])
    assert config["model"]["path"].startswith("Qwen/")
    config["model"]["path"] = "runs/quickstart/model"
    shutil.rmtree("runs/my")
    Path("my.yaml").write_text(yaml.safe_dump(config))
    for name in ("train.jsonl", "eval.jsonl"):
        Path(name).write_text(rows)
    Path("groups.jsonl").write_text(rows.splitlines()[1] + "\n")
    Path("photos").mkdir()
    for number, colour in ((1, "red"), (2, "blue")):
        Image.new("RGB", (60, 40), colour).save(f"photos/{number}.jpg")
    for line in commands_to_run("README.md"):
        run_command(line, monkeypatch, capsys, "README.md")
    (line,) = Path("rewards.jsonl").read_text().splitlines()
    assert len(json.loads(line)["rewards"]) == 3


@pytest.mark.parametrize("page", PAGES)
def test_examples_parse(page):
    for line in [*commands_to_read(page), *filter(is_run_elsewhere, commands_to_run(page))]:
        check(line, page)


def test_run_elsewhere_names_lines_that_are_there():
    lines = [line for page in PAGES for line in commands_to_run(page)]
    assert [start for start in RUN_ELSEWHERE if not any(line.startswith(start) for line in lines)] == []


@pytest.mark.parametrize("page", PAGES)
def test_blocks_name_their_language(page):
    """One without a language would be neither run nor read."""
    assert blocks(page, "") == []
    assert not re.search(r"^ {4}(\$ |fastrm |make |python|pytest)", text_of(page), re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")])
def test_settings_exist(page, tmp_path):
    for block in blocks(page, "yaml"):
        file = tmp_path / "block.yaml"
        file.write_text(block)
        tree, places = read_yaml(file)
        if "members" in tree:
            validate(EnsembleFile, tree, places, page)
        elif "axes" in tree:
            load_grid(file)
        elif {"generator", "kind"} & tree.keys():
            load_spec(str(file))
        elif "rewards" in tree:
            load_run(GrpoConfig, file)
        else:
            if not {"path", "init"} & tree.setdefault("model", {}).keys():
                file.write_text(yaml.safe_dump({**tree, "model": {**tree["model"], "path": "somewhere"}}))
            load_config(file)


@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_python_runs_as_written(page, project):
    Image.new("RGB", (60, 60), "white").save("seven.png")
    names = {"groups": [{"prompt": "2 + 2?", "responses": ["4", "5"]}]}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), names)


def test_every_page_with_python_is_run():
    assert [page for page in PAGES if blocks(page, "python")] == PYTHON_PAGES


# ---- what a line of an sh block must have


def check(line, page):
    """Fail with the line unless what it names is there."""
    where = f"{page}: {line}"
    program, *rest = words_of(line)
    if program in ("torchrun", "deepspeed"):
        program, rest = "fastrm", rest[rest.index("fastrm.cli") + 1 :]
    if program == "fastrm":
        check_fastrm(rest, where)
    elif program == "make":
        targets = re.search(r"^\.PHONY: (.*)$", (PROJECT / "Makefile").read_text(), re.MULTILINE)[1].split()
        assert set(rest) <= set(targets), where
    elif program in ("python", "python3"):
        check_script(rest, where)
    elif program == "pytest":
        paths = [word for word in rest if "/" in word]
        assert paths and all(list(PROJECT.glob(path)) for path in paths), where
    elif program == "pip":
        check_packages(rest[1:], where)
    elif program == "curl":
        assert is_run_elsewhere(line), where
    elif program == "serve":  # Ray's; tests/serve/test_ray_app.py starts it with this configuration
        assert rest == ["run", "configs/serve/ray.yaml"] and (PROJECT / rest[1]).is_file(), where
    elif program == "vllm":  # tests/kernels/test_vllm_serving.py starts it with these options
        helper = (PROJECT / "tests" / "kernels" / "test_vllm_serving.py").read_text()
        assert rest[0] == "serve" and all(word in helper for word in rest[4:]), where
    else:
        pytest.fail(f"{where}: how is {program} to be tested?")


def check_fastrm(words, where):
    """Parse the line with the command's own parser; read the configuration or the grid, if the project has it."""
    command = typer.main.get_command(cli.app)
    while hasattr(command, "commands"):
        name, *words = words
        assert name in command.commands, where
        command = command.commands[name]
    context = command.make_context(command.name, list(words))
    for key, load in (("config", load_config), ("grid", load_grid), ("experiment", partial(load_run, GrpoConfig))):
        file = context.params.get(key)
        if file is not None and str(file) not in READERS and not str(file).startswith("runs/"):
            load(PROJECT / file, context.params["overrides"] or [])


def check_script(words, where):
    """Find the script, and each of its options in its source."""
    if words[0] == "-m":
        file = Path(importlib.util.find_spec(words[1]).origin)
        words = words[1:]
    else:
        file = PROJECT / words[0]
    assert file.exists(), where
    source = file.read_text()
    assert [word for word in words[1:] if word.startswith("--") and f'"{word}"' not in source] == [], where


def check_packages(words, where):
    """Extras are those of pyproject.toml, other packages those of the Makefile."""
    known = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        if extras := re.search(r"\[(.*)\]", word):
            assert set(extras[1].split(",")) <= set(known), where
        elif not word.startswith("-") and word != ".":
            assert word in (PROJECT / "Makefile").read_text(), where
