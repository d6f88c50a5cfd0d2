"""Whole runs at the widths of Qwen2.5-VL-7B, two layers deep: killed, resumed, exported; and configs/full.yaml."""

import functools
import math
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from pydantic import BaseModel

import random_model
import stock
from fastrm import cli
from fastrm.config import load_config
from fastrm.model.export import save_model
from fastrm.model.network import RewardNetwork
from fastrm.model.reward_model import RewardModel
from fastrm.train.loop import train
from fastrm.train.metrics import read_rows
from random_model import write_model
from real_width_cases import FULL, assert_rewards, record_of
from runs import colour_rows, documented_commands
from support import make_model, pack_of

# Weights, gradients and moments of all 152,064 rows of the embedding would be 9 GB; test_real_widths.py has them all.
VOCABULARY = 16_384
# Whole graphs as inductor gets them, without the minutes that it needs for them.
BACKEND = "aot_eager"
KILLED = f"""
import functools, sys
from fastrm.config import load_config
from fastrm.model.network import RewardNetwork
from fastrm.train.loop import train
RewardNetwork.compile_layers = functools.partialmethod(RewardNetwork.compile_layers, "{BACKEND}")
train(load_config(sys.argv[1], sys.argv[2:]))
"""


@pytest.fixture
def arguments(tmp_path):
    """Of `load_config` for a whole run of two layers of Qwen2.5-VL-7B, with all settings that a CPU can take."""
    write_model("Qwen2.5-VL-7B-Instruct", tmp_path / "model", layers=2, vocabulary=VOCABULARY)
    data = colour_rows(tmp_path, 6)
    return str(FULL), [
        f"run.dir={tmp_path / 'run'}", "run.max_steps=3", "run.save_every=2", f"model.path={tmp_path / 'model'}",
        f"data.train=[{{path: {data}}}]", f"data.eval=[{{path: {data}}}]", "data.num_workers=0",
        "model.activation_checkpointing=selective", "compile=layers", "precision.weights=bf16", "precision.fp8=rowwise",
        "optim.states=8bit",
    ]  # fmt: skip


# A CPU takes a minute for the 8-bit update of two layers' matrices, several times in a run: by default their
# gradients are only passed on to the projector.
@pytest.mark.real_widths
@pytest.mark.parametrize("freeze", ["[vision, language]", pytest.param("[vision]", marks=pytest.mark.slow)])
def test_full_recipe_at_the_widths_of_the_7b_resumes_to_the_bit(freeze, arguments, tmp_path, monkeypatch):
    """A run is killed after its last step and evaluation; resumed after its second, it computes both anew."""
    file, overrides = arguments
    overrides.append(f"model.freeze={freeze}")
    metrics = tmp_path / "run" / "metrics.jsonl"
    log = tmp_path / "log.txt"
    with log.open("w") as output:
        command = [sys.executable, "-c", KILLED, file, *overrides]
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ)
    deadline = time.monotonic() + 1200
    while not any("eval/loss" in row for row in read_rows(metrics)):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run" / "model").exists(), "killed too late"
    killed = without_clock(read_rows(metrics))

    compile_layers = functools.partialmethod(RewardNetwork.compile_layers, BACKEND)
    monkeypatch.setattr(RewardNetwork, "compile_layers", compile_layers)
    summary = train(load_config(file, overrides), "required")
    resumed = without_clock(read_rows(metrics))
    assert [row["step"] for row in resumed] == [1, 2, 3, 3]
    assert resumed == killed
    # Decoder layers and vision blocks for training, and both for evaluation; only the first in the resumed process.
    assert summary["compiled_graphs"] >= 2
    assert summary["fp8_flip_rate"] is not None

    model = RewardModel.from_pretrained(tmp_path / "run" / "model", dtype="fp32")
    record = record_of("Qwen2.5-VL")
    with torch.no_grad():
        wanted = stock.stock_rewards(model.network, [record])
        model.network.use_kernels(torch.float32)
        assert_rewards(model.network(pack_of(model.network, [record])), wanted)


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["tiny model", "as written"])
def test_full_yaml_runs_with_the_documented_overrides_alone(whole, tmp_path, monkeypatch):
    """By default a tiny model lies where the first command would have made one."""
    make, run = (line for line in documented_commands("real_size.md") if "runs/two-layers" in line)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(FULL.parent)
    if whole:
        monkeypatch.setattr("sys.argv", shlex.split(make)[1:])
        random_model.main()
    else:
        (tmp_path / "runs").mkdir()
        save_model(make_model("qwen2_5_vl"), tmp_path / "runs" / "two-layers")
    monkeypatch.setattr("sys.argv", shlex.split(run))
    with pytest.raises(SystemExit) as leave:
        cli.main()
    assert not leave.value.code
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
