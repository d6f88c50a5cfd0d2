"""The shipped settings of other reward models: they load, are sized, and train on a tiny model."""

import json

import pytest
import yaml
from rich.console import Console

from fastrm.config import load_config
from fastrm.forecast.dry_run import dry_run
from fastrm.prompts.spec import load_spec
from fastrm.yaml_files import differences
from tests.helpers import runs
from tests.helpers.project import PROJECT
from tests.helpers.support import FAMILIES

CONFIGS = PROJECT / "configs"
PRESETS = ["ixc_2_5_reward", "mm_rlhf_reward"]
R1_REWARD = ["mm-rlhf-images", "rlaif-v", "vlfeedback", "povid", "wildvision-battle"]
SETS = {"r1_reward_200k": R1_REWARD, "ixc_2_5_reward": R1_REWARD, "mm_rlhf_reward": ["mm-rlhf"]}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_loads_and_is_sized(name):
    config = load_config(CONFIGS / f"{name}.yaml")
    report = dry_run(config, Console(quiet=True))
    trained = {part: count.trainable > 0 for part, count in report["parameters"].items()}
    assert trained["language model"] and trained["head"] and not trained["vision tower"]
    assert trained["projector"] == (name == "mm_rlhf_reward")
    flops = report["step"]["ways"]["fastrm"]["flops"]["language"].total
    unpruned = report["step"]["ways"]["shared prompts"]["flops"]["language"].total
    # A mean needs the last layer for every token, and so does a critic.
    assert (flops == unpruned) == (config.model.pooling == "mean" or config.paradigm == "critic")


@pytest.mark.parametrize("name", PRESETS)
def test_preset_says_where_every_value_comes_from(name):
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    values = [line for line in lines if ":" in line and not line.lstrip().startswith(("#", "-")) and line[-1] != ":"]
    values = [line for line in values if not line.startswith("extends:")]
    assert len(values) >= 5
    unmarked = [line for line in values if not any(mark in line for mark in ("[P]", "[C]", "[ours]"))]
    assert not unmarked


def test_presets_set_what_their_models_are_known_for():
    ixc, mm_rlhf = (load_config(CONFIGS / f"{name}.yaml").model for name in PRESETS)
    assert (ixc.head.layers, ixc.pooling) == (1, "mean") and set(ixc.freeze) == {"vision", "projector"}
    assert (mm_rlhf.head.layers, mm_rlhf.head.activation, mm_rlhf.pooling) == (2, "tanh", "anchor")
    recipe = load_config(CONFIGS / "mm_rlhf_reward.yaml")
    assert (recipe.critic.lm_weight, recipe.loss.center, recipe.optim.lr) == (1.0, 0.01, 1e-6)
    assert recipe.paradigm == load_spec(recipe.critic.spec).kind == "critic"


COPIES, WEIGHTS = {"data.deduplicate": True}, {"precision.weights": "auto"}
CRITIC = {
    "paradigm": "critic", "critic.spec": "mm_rlhf_reward", "critic.lm_weight": 1.0, "critic.missing": "empty",
    "loss.center": 0.01, "optim.lr": 1e-6,
}  # fmt: skip
CHANGED = {
    "r1_reward_200k": ("full", {}),
    "mm_rlhf_reward": ("full", {"model.head.activation": "tanh", "engine.zero_stage": 3} | CRITIC | COPIES | WEIGHTS),
    "ixc_2_5_reward": (
        "r1_reward_200k",
        {"model.head.layers": 1, "model.head.bias": False, "model.pooling": "mean"}
        | {"model.freeze": ["vision", "projector"]} | COPIES | WEIGHTS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_preset_is_what_it_extends_but_for_what_it_says(name):
    """A change of the file below reaches these settings too, and this list says which it may not."""
    extended, changed = CHANGED[name]
    below, preset = (load_config(CONFIGS / f"{file}.yaml").model_dump(mode="json") for file in (extended, name))
    found = {key: new for key, (_, new) in differences(below, preset).items()}
    assert found.pop("run.dir") == f"runs/{name}"
    assert [source["set"] for source in found.pop("data.train", below["data"]["train"])] == SETS[name]
    assert found == changed


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("name", PRESETS)
def test_preset_trains_a_tiny_model(name, family, tmp_path):
    from fastrm.train.loop import train

    rows = runs.colour_rows(tmp_path, 8)
    if name == "mm_rlhf_reward":
        written = [json.loads(line) for line in rows.read_text().splitlines()]
        critiques = [[f"It says {text}." for text in row["responses"]] for row in written]
        runs.write_rows(rows, [row | {"critiques": said} for row, said in zip(written, critiques, strict=True)])
    changed = {
        "run.dir": str(tmp_path / "run"), "run.max_steps": 2, "run.save_every": 0, "run.device": "cpu",
        "data.train": [{"path": str(rows)}], "data.max_tokens_per_group": 2048, "data.min_pixels": 784,
        "data.max_pixels": 3136, "data.num_workers": 0, "data.max_tiles": 2,
        "model.path": None, "model.init": FAMILIES[family], "model.tokenizer": {"train_vocab_size": 300},
        "optim.batch_pairs": 6, "optim.tokens_per_pack": 2048,
    }  # fmt: skip
    config = load_config(CONFIGS / f"{name}.yaml", [f"{key}={json.dumps(value)}" for key, value in changed.items()])
    train(config)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2
    section = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["fastrm"]
    assert section["pooling"] == config.model.pooling and section["head"] == config.model.head.stored()
    if family == "internvl":
        processor = json.loads((tmp_path / "run" / "model" / "preprocessor_config.json").read_text())
        assert processor["max_patches"] == 2  # data.max_tiles
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["model"]["pooling"] == config.model.pooling
