"""The dry run: what it finds, what it prints, and that it follows the configuration."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import save_file

from fastrm.config import load_config
from fastrm.errors import ConfigError, StorageError
from fastrm.forecast.dry_run import dry_run
from fastrm.forecast.hardware import find_gpu
from fastrm.forecast.plan import Assumptions, make_plan, steps_of
from tests.helpers import support
from tests.helpers.project import PROJECT
from tests.helpers.waiting import PATIENCE


def quiet():
    return Console(file=io.StringIO())


@pytest.fixture
def small_config(tmp_path):
    """A configuration of a tiny random model, and a function that changes it."""
    tree = {
        "run": {"dir": str(tmp_path / "run")},
        "data": {"train": [{"path": "digits:train"}], "max_tokens_per_group": 1024, "max_pixels": 28 * 28 * 10},
        "model": {"init": support.FAMILIES["qwen2_5_vl"], "tokenizer": {"train_vocab_size": 300}},
        "optim": {"batch_pairs": 8, "tokens_per_pack": 1024},
    }

    def make(*overrides):
        file = tmp_path / "small.yaml"
        file.write_text(yaml.safe_dump(tree))
        return load_config(file, overrides)

    return make


def test_dry_run_prints_full_recipe_and_ends_well(tmp_path):
    command = [sys.executable, "-m", "fastrm.cli", "train", str(PROJECT / "configs/full.yaml"), "--dry-run"]
    # Elsewhere than in the repository, where a data folder could exist.
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=PATIENCE)
    assert run.returncode == 0, run.stderr
    for expected in ("data/rlaif-v", "is not a folder", "7,760,021,505", "13 of 13 inputs are missing", "estimate"):
        assert expected in run.stdout
    assert list(tmp_path.iterdir()) == []


def test_dry_run_tells_found_from_missing(small_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here.jsonl").write_text("{}\n")
    Path("empty").mkdir()
    config = small_config(
        "data.eval=[{path: here.jsonl}, {path: empty}, {path: here.jsonl, images: pictures.tar}, {path: digits:none}]"
    )
    inputs = dry_run(config, quiet())["inputs"]
    assert [(name, state) for name, state, _ in inputs] == [
        ("data.train.0", "found"),
        ("data.eval.0", "found"),
        ("data.eval.1", "missing"),
        ("data.eval.2", "missing"),
        ("data.eval.3", "missing"),
    ]
    details = [detail for _, _, detail in inputs]
    assert "here.jsonl: 1 file, 0.0 MiB" in details[1]
    assert "a folder without data files" in details[2]
    assert 'images "pictures.tar" does not exist in ' in details[3]
    assert "digits:none" in details[4]


@pytest.mark.parametrize(
    "override",
    ["model.init.text_config.hidden_size=abc", "model.init.vision_config=x", "model.init.text_config.hidden_size=-4",
     "model.init.text_config.num_attention_heads=0", "model.init.model_type=gpt2"],
)  # fmt: skip
def test_a_model_that_cannot_be_made_is_a_configuration_error(small_config, override):
    with pytest.raises(ConfigError, match=r"model.init|model type|num_attention_heads 0"):
        dry_run(small_config(override), quiet())


def test_dry_run_checks_model_folder(small_config, tmp_path):
    folder = tmp_path / "model"
    network = support.make_model("qwen2")
    network.model.config.save_pretrained(folder)
    overrides = ("model.init=null", "model.tokenizer=null", f"model.path={folder}")
    report = dry_run(small_config(*overrides), quiet())
    assert report["inputs"][-1] == ("model.path", "missing", f"{folder}: has no *.safetensors")
    (folder / "model.safetensors").touch()
    with pytest.raises(StorageError, match=r"model.safetensors: no safetensors header in its 0 bytes"):
        dry_run(small_config(*overrides), quiet())
    save_file({"embed_tokens.weight": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(StorageError, match=r"38 of 38 weights are missing or have another shape"):
        dry_run(small_config(*overrides), quiet())
    network.model.save_pretrained(folder)
    network.encoder.tokenizer.save_pretrained(folder)
    report = dry_run(small_config(*overrides), quiet())
    assert report["inputs"][-1][:2] == ("model.path", "found")
    assert report["step"]["workload"].image_tokens == 0
    assert all(way["images"] == 0 for way in report["step"]["ways"].values())


def test_dry_run_of_unknown_model_still_checks_inputs(small_config, capsys):
    config = small_config("model.init=null", "model.tokenizer=null", "model.path=someone/some-model")
    report = dry_run(config)
    assert set(report) == {"inputs", "rows"} and "not tokenised" in report["rows"][0][2]
    output = capsys.readouterr().out
    assert "Model not sized: no config.json in 'someone/some-model'" in output
    assert "1 of 2 inputs are missing here" in output


def test_dry_run_refuses_freeze_that_cannot_work(small_config):
    text = json.dumps(support.FAMILIES["qwen2"])
    with pytest.raises(ConfigError, match="qwen2 has no vision tower"):
        dry_run(small_config(f"model.init={text}", "model.freeze=[vision]"), quiet())


def test_dry_run_sizes_follow_the_configuration(small_config):
    shared, alone = (dry_run(small_config(f"data.share_prefixes={x}"), quiet()) for x in ("true", "false"))
    load = shared["step"]["workload"]
    assert (load.num_pairs, load.image_tokens) == (8, 10)
    ways = shared["step"]["ways"]
    assert list(ways) == ["stock pairwise", "shared prompts", "fastrm"]
    assert [way["tokens"] for way in ways.values()] == [load.num_tokens(s) for s in (False, True, True)]
    assert [way["images"] for way in ways.values()] == [16, 8, 8]
    totals = [sum(part.total for part in way["flops"].values()) for way in ways.values()]
    assert totals[0] > totals[1] > totals[2]
    assert alone["step"]["ways"]["fastrm"]["tokens"] == load.num_tokens(False)
    memory, plain = shared["memory"], dry_run(small_config("precision.dtype=fp32"), quiet())["memory"]
    assert {label.split(",")[0] for label in memory} == {"1 GPU", "8 GPUs", "64 GPUs"}
    assert all(set(by_mode) == {"none", "selective", "full"} for by_mode in memory.values())
    name = "1 GPU, precision.weights: auto, optim.states: fp32"
    assert plain[name]["none"].copies == 0 < memory[name]["none"].copies
    assert plain[name]["none"].activations > memory[name]["none"].activations > memory[name]["full"].activations


def test_dry_run_marks_the_configured_activations(small_config, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")  # at 80 the heading is broken
    dry_run(small_config("model.activation_checkpointing=full"))
    assert "full (as configured)" in capsys.readouterr().out
    dry_run(small_config())
    assert "none (as configured)" in capsys.readouterr().out


def test_memory_of_8_bit_states_is_known_where_torchao_is_not_installed(small_config, monkeypatch):
    settings = small_config("optim.states=8bit")
    wanted = dry_run(settings, quiet())["memory"]
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert dry_run(settings, quiet())["memory"] == wanted


def test_dry_run_prints_brackets_in_paths_as_they_are(small_config, capsys):
    dry_run(small_config("data.train=[{path: 'odd[red]name.jsonl'}]"))
    assert "odd[red]name.jsonl" in capsys.readouterr().out


def test_dry_run_asks_no_hub(small_config, tmp_path, monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **options: pytest.fail("the network was used"))
    config = small_config("data.eval=[{set: rlaif-v}, {path: hub:owner/name}, {set: ultra-hard, path: absent}]")
    rows = {name: (state, detail) for name, state, detail in dry_run(config, quiet())["inputs"]}
    asked = "not looked for; a run downloads it from the hub"
    assert rows["data.eval.0"] == ("missing", f"rlaif-v (openbmb/RLAIF-V-Dataset): {asked}")
    assert rows["data.eval.1"] == ("missing", f"hub:owner/name: {asked}")
    lost = f'"absent" is not a folder in {Path.cwd()}; wanted a copy of openbmb/UltraFeedback'
    assert rows["data.eval.2"][1].endswith(lost)


@pytest.mark.parametrize("overrides", [[], ["engine.zero_stage=1"], ["optim.batch_pairs=8"]], ids=str)
def test_dry_run_and_plan_agree_about_memory(overrides):
    config = load_config(PROJECT / "configs/full.yaml", overrides)
    ours = dry_run(config, quiet())["memory"]
    compared, steps = set(), steps_of(config)
    for count in (1, 8, 64):
        assumed = Assumptions(count, find_gpu("h100"), 1000, "--pairs", results=PROJECT)
        for fit in make_plan(config, assumed, steps).fits:
            if fit.way.num_gpus == count:
                assert ours[fit.way.label][fit.checkpointing].total == fit.peak.total, fit
                compared.add(fit.way.label)
    assert compared == set(ours)
