"""Whole runs at the widths of Qwen2.5-VL-7B, two layers deep: killed, resumed, exported; and configs/full.yaml."""

import math
import shlex
import time

import pytest
from pydantic import BaseModel

from bench.harness.memory import status_bytes
from bench.models import random_model
from bench.models.random_model import write_model
from fastrm import cli
from fastrm.config import load_config
from fastrm.model.export import save_model
from fastrm.train.metrics import read_rows
from tests.helpers.own_process import context, run_alone
from tests.helpers.real_width_cases import FEW_ROWS, FULL, MOST_BYTES, assert_rewards
from tests.helpers.real_width_jobs import rewards_of_export, run_command, run_recipe
from tests.helpers.runs import colour_rows, documented_commands
from tests.helpers.support import make_model


@pytest.fixture
def overrides(tmp_path):
    """Of configs/full.yaml for a whole run of two layers of Qwen2.5-VL-7B, with all settings that a CPU can take.

    Weights, gradients and moments of all 152,064 rows of the embedding would be 9 GB.
    """
    write_model("Qwen2.5-VL-7B-Instruct", tmp_path / "model", layers=2, vocabulary=FEW_ROWS)
    data = colour_rows(tmp_path, 2)
    return [
        f"run.dir={tmp_path / 'run'}", "run.max_steps=3", "run.save_every=2", f"model.path={tmp_path / 'model'}",
        f"data.train=[{{path: {data}}}]", f"data.eval=[{{path: {data}}}]", "data.num_workers=0",
        "model.activation_checkpointing=selective", "compile=layers", "precision.weights=bf16", "precision.fp8=rowwise",
        "optim.states=8bit",
    ]  # fmt: skip


# A CPU takes a minute for the 8-bit update of two layers' matrices, several times in a run: by default their
# gradients are only passed on to the projector.
@pytest.mark.real_widths
@pytest.mark.parametrize("freeze", ["[vision, language]", pytest.param("[vision]", marks=pytest.mark.slow)])
def test_full_recipe_at_the_widths_of_the_7b_resumes_to_the_bit(freeze, overrides, tmp_path):
    """A run is killed after its last step and evaluation; resumed after its second, it computes both anew."""
    overrides.append(f"model.freeze={freeze}")
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = context(run_recipe.__module__).Process(target=run_recipe, args=(overrides,))
    process.start()
    deadline = time.monotonic() + 1200
    while not any("eval/loss" in row for row in read_rows(metrics)):
        assert process.is_alive() and time.monotonic() < deadline, f"exit status {process.exitcode}"
        time.sleep(0.05)
    of_killed = status_bytes("VmHWM", process.pid)
    process.kill()
    process.join()
    assert not (tmp_path / "run" / "model").exists(), "killed too late"
    killed = without_clock(read_rows(metrics))

    # Before its first step the killed run was compared with stock transformers, which takes a tenth of this test.
    second = run_alone(run_recipe, [*overrides, "check_exactness=false"], "required")
    resumed = without_clock(read_rows(metrics))
    assert [row["step"] for row in resumed] == [1, 2, 3, 3]
    assert resumed == killed
    # Decoder layers and vision blocks for training, and both for evaluation; only the first in the resumed process.
    assert second.value["compiled_graphs"] >= 2
    assert second.value["fp8_flip_rate"] is not None

    scoring = run_alone(rewards_of_export, tmp_path / "run" / "model")
    assert_rewards(scoring.value["found"], scoring.value["wanted"])
    print(f"{freeze}: killed {of_killed / 1e9:.2f} GB; resumed {second}; scoring {scoring}")
    assert max(of_killed, second.peak_bytes, scoring.peak_bytes) < MOST_BYTES


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["tiny model", "as written"])
def test_full_yaml_runs_with_the_documented_overrides_alone(whole, tmp_path):
    """By default a tiny model lies where the first command would have made one."""
    make, run = (line for line in documented_commands("lab/real_size.md") if "runs/two-layers" in line)
    (tmp_path / "configs").symlink_to(FULL.parent)
    if whole:
        assert not run_alone(run_command, random_model.main, tmp_path, shlex.split(make)[1:]).value
    else:
        (tmp_path / "runs").mkdir()
        save_model(make_model("qwen2_5_vl"), tmp_path / "runs" / "two-layers")
    training = run_alone(run_command, cli.main, tmp_path, shlex.split(run))
    assert not training.value
    print(f"as documented: {training}")
    written = tmp_path / "runs" / "full"
    rows = read_rows(written / "metrics.jsonl")
    assert len(rows) == 3 and all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert changed_settings(load_config(FULL), load_config(written / "config.yaml")) == {
        "run.max_steps", "data.train", "model.path",
    }  # fmt: skip


def changed_settings(before, after):
    """Names of the settings in which two configurations differ."""
    found = set()
    for section, values in before:
        other = getattr(after, section)
        if isinstance(values, BaseModel):
            found |= {f"{section}.{key}" for key, value in values if getattr(other, key) != value}
        elif values != other:
            found.add(section)
    return found


def without_clock(rows):
    clock = ("preferences_per_second", "tokens_per_second", "data_wait_share")
    return [{key: value for key, value in row.items() if key not in clock} for row in rows]
