"""A configuration that extends another: what it takes, what it changes, and which file a complaint names."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastrm import cli
from fastrm.config import load_config, load_run
from fastrm.errors import ConfigError
from fastrm.grpo.config import GrpoConfig
from tests.helpers.runs import colour_rows, run, tiny_config

BASE = """
run:
  dir: runs/base
  seed: 7
data:
  train:
    - {path: a.jsonl, weight: 2.0}
    - {path: b.jsonl}
model:
  path: some/model
  head:
    layers: 3
    bias: false
optim:
  lr: 1e-4
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Write files by their names into a folder of the test's own, which is the working folder."""
    monkeypatch.chdir(tmp_path)

    def write(**texts):
        for name, text in texts.items():
            Path(f"{name}.yaml").write_text(text)

    return write


def complaint(*arguments):
    with pytest.raises(ConfigError) as error:
        load_config(*arguments)
    return str(error.value)


def test_sections_are_merged_and_lists_replaced(files):
    files(base=BASE, own="extends: base.yaml\ndata:\n  train: [{path: c.jsonl}]\nmodel:\n  head: {layers: 1}\n")
    config = load_config("own.yaml")
    assert [(source.path, source.weight) for source in config.data.train] == [("c.jsonl", 1.0)]
    assert (config.model.path, config.model.head.layers, config.model.head.bias) == ("some/model", 1, False)
    assert (config.run.seed, config.optim.lr) == (7, 1e-4)


def test_an_architecture_is_replaced_as_a_whole(files):
    """Else half of one model would stand in another."""
    init = "model:\n  tokenizer: some/folder\n  init: {model_type: llama, hidden_size: 8}\n"
    files(base=init, own="extends: base.yaml\nmodel:\n  init: {model_type: qwen2}\n")
    assert load_config("own.yaml").model.init == {"model_type": "qwen2"}


def test_the_folder_of_a_run_is_each_files_own(files):
    files(base=BASE, own="extends: base.yaml\n", named="extends: base.yaml\nrun: {dir: runs/mine}\n")
    folders = [load_config(f"{name}.yaml").run.dir for name in ("base", "own", "named")]
    assert folders == ["runs/base", "runs/own", "runs/mine"]


def test_files_are_found_from_the_one_that_names_them_and_overrides_come_last(files, tmp_path, monkeypatch):
    files(base=BASE, middle="extends: base.yaml\noptim: {lr: 1e-5, batch_pairs: 4}\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "own.yaml").write_text("extends: ../middle.yaml\noptim: {lr: 1e-6}\n")
    monkeypatch.chdir("/")
    optim = load_config(tmp_path / "folder" / "own.yaml", ["optim.batch_pairs=8"]).optim
    assert (optim.lr, optim.batch_pairs) == (1e-6, 8)


def test_nothing_is_left_of_extends_in_what_a_run_keeps(files):
    files(base=BASE, own="extends: base.yaml\noptim: {lr: 1e-6}\n")
    config = load_config("own.yaml")
    Path("kept.yaml").write_text(config.to_yaml())
    files(base="model: {path: other/model}\n")
    assert load_config("kept.yaml") == config


def test_a_run_goes_on_only_with_the_settings_that_it_resolved(tmp_path, monkeypatch):
    """A change of the file below is a change of the run's settings, as one of its own file is."""
    monkeypatch.chdir(tmp_path)
    base = tiny_config(tmp_path, colour_rows(tmp_path), run={"max_steps": 2})
    own = tmp_path / "own.yaml"
    own.write_text(f"extends: {base.name}\nrun: {{max_steps: 1, device: cpu}}\n")
    run(own)
    assert load_config(tmp_path / "runs/own/config.yaml") == load_config(own)
    run(own, "run.max_steps=2", resume="auto")
    base.write_text(base.read_text() + "loss: {center: 0.5}\n")
    with pytest.raises(ConfigError, match=r"loss\.center"):
        run(own, "run.max_steps=3", resume="auto")


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("optim: {lr: 1e-6}\n", "base.yaml:5: unknown key optim.batch_pears; did you mean optim.batch_pairs?"),
        ("optim: {lr: fast}\n", "own.yaml:2: optim.lr: got 'fast'"),
        ("precision: {fp8: rowwise}\n", "own.yaml:2: precision.fp8 rowwise with precision.dtype fp32"),
    ],
    ids=["a key below", "a value here", "a combination that this file makes"],
)
def test_a_complaint_names_the_file_and_line_of_the_mistake(files, own, expected):
    below = "model: {path: some/model}\nprecision: {dtype: fp32}\n\noptim:\n  batch_pears: 3\n"
    files(base=below, own=f"extends: base.yaml\n{own}")
    assert expected in complaint("own.yaml")


def test_a_replaced_list_is_not_blamed_on_the_file_below(files):
    files(base=BASE, own="extends: base.yaml\ndata:\n  train:\n    - {path: c.jsonl, wheight: 1.0}\n")
    wanted = "own.yaml:4: unknown key data.train.0.wheight; did you mean data.train.0.weight?"
    assert complaint("own.yaml") == wanted


def test_a_circle_names_its_files(files):
    files(a="extends: b.yaml\n", b="model: {path: m}\nextends: c.yaml\n", c="extends: a.yaml\n")
    files(own="extends: own.yaml\n")
    ends = "take one `extends` out"
    expected = f"c.yaml:1: extends: files extend one another in a circle: a.yaml -> b.yaml -> c.yaml -> a.yaml; {ends}"
    assert complaint("a.yaml") == expected
    assert "circle: own.yaml -> own.yaml" in complaint("own.yaml")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("gone.yaml", "own.yaml:1: extends: gone.yaml: cannot read the configuration: No such file or directory"),
        ("3", "own.yaml:1: extends: got 3, wanted the path of a file, relative to this one"),
        ("broken.yaml", "own.yaml:1: extends: broken.yaml:3: not valid YAML"),
        ("[base.yaml, other.yaml]", "own.yaml:1: extends: got ['base.yaml', 'other.yaml'], wanted the path of a file"),
    ],
)
def test_a_file_that_cannot_be_extended_is_named_with_the_line_that_asks_for_it(files, value, expected):
    files(own=f"extends: {value}\n", broken="model:\n  - a\n  b: 1\n")
    assert complaint("own.yaml").startswith(expected)


def test_dry_run_names_the_files_and_what_is_this_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = tiny_config(tmp_path, colour_rows(tmp_path))
    Path("own.yaml").write_text(f"extends: {base.name}\noptim: {{lr: 1e-6}}\nrun: {{seed: 3}}\n")
    done = CliRunner().invoke(cli.app, ["train", "own.yaml", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert f"own.yaml extends {base.name}; its own are optim.lr, run.seed.\n" in done.output


def test_a_grpo_run_extends_too(files):
    base = {
        "run": {"dir": "runs/base"}, "policy": {"path": "some/model"}, "rewards": [{"scheme": "rule"}],
        "data": {"train": {"path": "a.jsonl"}, "eval": {"path": "b.jsonl"}},
    }  # fmt: skip
    files(base=json.dumps(base), own="extends: base.yaml\noptim: {lr: 2e-5}\n")
    config = load_run(GrpoConfig, "own.yaml")
    assert (config.run.dir, config.policy.path, config.optim.lr) == ("runs/own", "some/model", 2e-5)
