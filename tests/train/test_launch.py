"""`fastrm train` starts its own ranks, watches over them, and joins those that a launcher has started."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from fastrm.config import Config
from fastrm.errors import ConfigError
from fastrm.train import launch, ranks
from fastrm.train.checkpoint import list_checkpoints
from fastrm.train.deepspeed_engine import DeepSpeedEngine
from fastrm.train.metrics import read_rows
from tests.helpers.runs import text_rows, tiny_config, write_rows
from tests.helpers.waiting import PATIENCE

pytest.importorskip("deepspeed")
TEXT_MODEL = {
    "init": {
        "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    }
}  # fmt: skip


def text_config(folder: Path, **run) -> Path:
    """A run of a text model, which has no tower, on two ranks."""
    rows = write_rows(folder / "rows.jsonl", text_rows(40))
    run = {"num_processes": 2, "max_steps": 4, **run}
    return tiny_config(folder, rows, run=run, model=TEXT_MODEL, data={"num_workers": 1})


def start(*command) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [str(part) for part in command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def fastrm_train(config: Path, *options) -> subprocess.Popen:
    return start(sys.executable, "-m", "fastrm.cli", "train", config, *options)


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE
    while not (rows := read_rows(run_dir / "metrics.jsonl")) or rows[-1]["step"] < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def ranks_of(process: subprocess.Popen) -> dict[int, psutil.Process]:
    children = psutil.Process(process.pid).children()
    return {int(child.environ()["RANK"]): child for child in children}


def test_a_lost_rank_is_named_and_a_signal_saves(tmp_path):
    config, run_dir = text_config(tmp_path, max_steps=100_000, save_every=5), tmp_path / "run"
    process = fastrm_train(config)
    wait_for_step(run_dir, 6, process)
    found = ranks_of(process)
    assert sorted(found) == [0, 1]
    lost = time.monotonic()
    found[1].send_signal(signal.SIGKILL)
    output, errors = process.communicate(timeout=PATIENCE)
    assert time.monotonic() - lost < 60 and process.returncode == 71, errors
    assert f"error: rank 1 (process {found[1].pid}) was killed by SIGKILL, and the others were stopped" in errors
    assert not output and "Traceback" not in errors and not any(rank.is_running() for rank in found.values())
    assert json.loads(errors.splitlines()[-1])["exit_code"] == 71
    # The run goes on from its last checkpoint.
    before = read_rows(run_dir / "metrics.jsonl")[-1]["step"]
    process = fastrm_train(config, "--resume", "auto")
    wait_for_step(run_dir, before + 2, process)
    # As schedulers do it: to the watcher and to every rank, not quite at the same time.
    found = ranks_of(process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.02)
    for rank in found.values():
        rank.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75 and "Traceback" not in errors, errors
    newest = list_checkpoints(run_dir / "checkpoints")[0]
    assert int(newest.name.removeprefix("step-")) == read_rows(run_dir / "metrics.jsonl")[-1]["step"]
    assert "error: stopped by SIGTERM after step" in errors and errors.count("continue with --resume auto") == 2
    assert json.loads(errors.splitlines()[-1])["error"] == "InterruptedRun"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_launchers_of_others_work(launcher, tmp_path):
    config = text_config(tmp_path, num_processes=None)
    tool = Path(sys.executable).with_name(launcher)
    with launch.kept_port() as port:
        options = {
            "torchrun": ["--standalone", "--nproc-per-node", "2", "-m"],
            "deepspeed": ["--no_local_rank", "--num_gpus", "2", "--master_port", str(port), "--module"],
        }[launcher]
        process = start(tool, *options, "fastrm.cli", "train", config)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and "Traceback" not in errors, errors
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["num_processes"] == 2
    assert "ranks: 2, DeepSpeed ZeRO stage 2" in errors and errors.count("ranks: 2") == 1


@pytest.mark.parametrize("use_libuv", [True, False])
def test_the_port_of_the_ranks_is_theirs_and_nobody_elses(use_libuv):
    """One that was only looked up was another's now and then, before the first rank listened there."""
    with launch.kept_port() as port:
        with socket.socket() as other, pytest.raises(OSError, match="Address already in use"):
            other.bind(("127.0.0.1", port))
        store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, use_libuv=use_libuv)
        assert store.port == port


@pytest.mark.slow
def test_what_all_ranks_refuse_is_said_once(tmp_path):
    config = text_config(tmp_path)
    process = fastrm_train(config, "data.train=[{path: nothing.jsonl}]")
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 65 and "Traceback" not in errors, errors
    assert errors.splitlines()[-2].startswith('error: data source "nothing.jsonl" does not exist')
    assert errors.count("does not exist") == 2  # a line for people, and one of JSON


def make_config(**sections) -> Config:
    return Config.model_validate({"model": {"init": {"model_type": "qwen2"}, "tokenizer": "unused"}, **sections})


def test_one_process_is_the_default_on_a_cpu_and_under_a_launcher(monkeypatch):
    two = make_config(run={"num_processes": 2, "device": "cpu"})
    assert launch.num_ranks_to_start(make_config(run={"device": "cpu"})) == 1
    assert launch.num_ranks_to_start(two) == 2
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch.num_ranks_to_start(two) == 1


def test_every_gpu_gets_a_process_and_no_more(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert launch.num_ranks_to_start(make_config()) == 4
    with pytest.raises(ConfigError, match="num_processes 5: this machine has 4 GPUs"):
        launch.num_ranks_to_start(make_config(run={"num_processes": 5}))


def test_several_processes_need_deepspeed(monkeypatch):
    monkeypatch.setattr(ranks.importlib.util, "find_spec", lambda name: None)
    assert launch.num_ranks_to_start(make_config(run={"device": "cpu"})) == 1
    with pytest.raises(ConfigError, match=r'pip install "fastrm\[deepspeed\]", or set run.num_processes: 1'):
        launch.num_ranks_to_start(make_config(run={"num_processes": 2, "device": "cpu"}))


@pytest.mark.parametrize(
    "sections, text",
    [
        ({"optim": {"states": "8bit"}}, "optim.states: 8bit is not possible on several ranks"),
        ({"precision": {"weights": "bf16"}}, "set precision.weights: fp32"),
        ({"compile": "layers", "engine": {"zero_stage": 3}}, "compile: layers is not possible .* set compile: off"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused_by_name(sections, text):
    with pytest.raises(ConfigError, match=text):
        DeepSpeedEngine(None, make_config(**sections))


def test_nccl_is_told_the_device_of_its_rank(monkeypatch):
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    calls = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(ranks.dist, "init_process_group", lambda *names, **options: calls.append((names, options)))
    monkeypatch.setattr(ranks.dist, "new_group", lambda **options: options["backend"])
    monkeypatch.setattr(ranks.dist, "get_rank", lambda: 3)
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda: 4)
    mine = torch.device("cuda", 1)
    assert ranks.join("cuda") == ranks.Ranks(3, 4, "gloo")
    assert calls == [mine, (("nccl",), {"device_id": mine})]
