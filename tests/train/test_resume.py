"""Invariants 4 and 5: a run that was killed, stopped or moved goes on as if nothing had happened."""

import json
import os
import random
import signal
import time

import pytest

from fastrm.config import load_config
from fastrm.errors import ConfigError, InterruptedRun, StorageError
from fastrm.train import checkpoint as checkpoints
from fastrm.train.loop import train
from fastrm.train.metrics import read_rows
from tests.helpers.killed_runs import assert_same, outcome
from tests.helpers.runs import colour_rows, tiny_config
from tests.helpers.waiting import wait_until

STEPS = 24
RUNS, KILLS_PER_RUN = 4, 5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return colour_rows(tmp_path_factory.mktemp("data"))


def make_config(folder, data, **run):
    run = {"max_steps": STEPS, "log_every": 2, "save_every": 3, "keep_checkpoints": 2, "eval_every": 8, **run}
    return tiny_config(folder, data, data, run=run, data={"num_workers": 1})


@pytest.fixture(scope="module")
def unbroken(server, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    server.start(make_config(folder, data), "no")
    assert server.wait() == 0, (folder / "config.yaml.log").read_text()
    return outcome(folder / "run")


def steps_logged(run_dir) -> int:
    rows = read_rows(run_dir / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


@pytest.mark.parametrize("seed", range(RUNS))
def test_killed_runs_resume_to_the_bit(server, data, unbroken, tmp_path, seed):
    """RUNS x KILLS_PER_RUN = 20 kills, each at a random step and a random moment in it."""
    rng = random.Random(seed)
    config = make_config(tmp_path, data)
    log = tmp_path / "config.yaml.log"
    targets = sorted(rng.randint(0, STEPS - 1) for _ in range(KILLS_PER_RUN))
    for life, target in enumerate(targets, 1):
        pid = server.start(config)
        # Only from its announcement on is what metrics.jsonl says of this life.
        wait_until(lambda life=life: log.exists() and log.read_text().count("\nrun: ") == life)
        wait_until(lambda target=target: steps_logged(tmp_path / "run") >= target)
        time.sleep(rng.uniform(0, 0.08))
        os.killpg(pid, signal.SIGKILL)
        status = server.wait()
        assert status == -signal.SIGKILL, (status, log.read_text()[-2000:])
    server.start(config)
    assert server.wait() == 0, (tmp_path / "config.yaml.log").read_text()[-2000:]
    assert_same(tmp_path / "run", unbroken)


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["process", "group"])
def test_sigterm_saves_at_the_last_step_exits_75_and_resumes_to_the_bit(server, data, unbroken, tmp_path, send):
    config = make_config(tmp_path, data)
    pid = server.start(config)
    wait_until(lambda: steps_logged(tmp_path / "run") >= 6)
    send(pid, signal.SIGTERM)
    assert server.wait() == 75
    log = (tmp_path / "config.yaml.log").read_text()
    assert "stopped by SIGTERM after step" in log and "continue with --resume auto" in log
    newest = checkpoints.list_checkpoints(tmp_path / "run" / "checkpoints")[0]
    assert steps_logged(tmp_path / "run") <= int(newest.name.removeprefix("step-")) < STEPS
    server.start(config)
    assert server.wait() == 0
    assert_same(tmp_path / "run", unbroken)


@pytest.fixture
def stopped(data, tmp_path):
    """A run of 6 of its 24 steps with checkpoints at 3 and 6, as (config path, run folder)."""
    path = make_config(tmp_path, data, eval_every=0)
    config = load_config(path, ["data.num_workers=0"])
    original, count = checkpoints.save_checkpoint, []

    class Stop(Exception):
        pass

    def save_and_stop(*arguments):
        count.append(original(*arguments))
        if len(count) == 2:
            raise Stop

    checkpoints.save_checkpoint = save_and_stop
    try:
        with pytest.raises(Stop):
            train(config)
    finally:
        checkpoints.save_checkpoint = original
    return path, tmp_path / "run"


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize(
    "damage", [_flip, lambda p: p.write_bytes(p.read_bytes()[:-1]), lambda p: p.unlink()], ids=["bit", "cut", "gone"]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(stopped, name, damage):
    folder = stopped[1] / "checkpoints"
    said = []
    damage(folder / "step-00000006" / name)
    assert checkpoints.newest_checkpoint(folder, said.append) == folder / "step-00000003"
    assert len(said) == 1 and "step-00000006: damaged" in said[0] and name in said[0]
    damage(folder / "step-00000003" / name)
    with pytest.raises(StorageError, match="none of 2 checkpoints is intact"):
        checkpoints.newest_checkpoint(folder, said.append)


def test_a_checkpoint_without_a_manifest_does_not_exist(stopped):
    folder = stopped[1] / "checkpoints"
    (folder / "step-00000006" / "manifest.json").unlink()
    assert checkpoints.newest_checkpoint(folder, lambda text: None) == folder / "step-00000003"


def test_resuming_under_another_configuration_names_the_fields(stopped):
    with pytest.raises(ConfigError) as caught:
        train(load_config(stopped[0], ["optim.lr=0.5", "loss.center=0.1", "data.num_workers=0"]), "auto")
    assert "loss.center: 0.0 in the checkpoint, 0.1 now" in str(caught.value)
    assert "optim.lr: 0.001 in the checkpoint, 0.5 now" in str(caught.value)


def test_resuming_on_changed_data_is_refused(stopped, data, tmp_path):
    rows = data.read_text().splitlines()
    swapped = json.loads(rows[0])
    swapped["preferences"] = [preference[::-1] for preference in swapped["preferences"]]
    try:
        data.write_text("\n".join([json.dumps(swapped), *rows[1:]]) + "\n")
        with pytest.raises(ConfigError, match="the training data has changed since"):
            train(load_config(stopped[0], ["data.num_workers=0"]), "auto")
    finally:
        data.write_text("\n".join(rows) + "\n")


def test_a_full_disk_leaves_the_old_checkpoint_and_training_goes_on(stopped, monkeypatch, capsys):
    calls = []
    original = checkpoints.save_file

    def full(tensors, path):
        calls.append(path)
        if len(calls) <= 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    config = load_config(stopped[0], ["data.num_workers=0", "run.max_steps=15"])
    assert train(config, "auto")["steps"] == 15
    assert "failure 2 of 3 in a row" in capsys.readouterr().err
    # The saves at 9 and 12 failed, that at 15 did not.
    assert sorted(os.listdir(stopped[1] / "checkpoints")) == ["step-00000006", "step-00000015"]


def test_a_stop_inside_an_evaluation_loses_nothing(server, data, unbroken, tmp_path, monkeypatch):
    from fastrm.train import evaluation

    config = load_config(make_config(tmp_path, data), ["data.num_workers=0"])
    original, packs = evaluation.run_packs, []

    def stop_at_the_second_evaluation(*arguments, **options):
        for pack in original(*arguments, **options):
            packs.append(pack)
            if len(packs) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield pack

    monkeypatch.setattr(evaluation, "run_packs", stop_at_the_second_evaluation)
    with pytest.raises(InterruptedRun, match="stopped by SIGTERM after step"):
        train(config)
    monkeypatch.undo()
    train(config, "auto")
    assert_same(tmp_path / "run", unbroken)


def test_a_killed_data_worker_is_named(data, tmp_path, monkeypatch):
    from fastrm.data import loader

    config = load_config(make_config(tmp_path, data))
    monkeypatch.setattr(loader, "build_pack", lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(StorageError, match=r"a data worker died .* use fewer workers"):
        train(config)


def test_resuming_from_an_older_checkpoint_sets_the_newer_aside(stopped):
    folder = stopped[1] / "checkpoints"
    config = load_config(stopped[0], ["data.num_workers=0", "run.max_steps=4", "run.save_every=0"])
    assert train(config, str(folder / "step-00000003"))["steps"] == 4
    assert sorted(os.listdir(folder)) == ["abandoned-step-00000006", "step-00000003", "step-00000004"]


def test_three_failed_saves_in_a_row_stop_the_run(stopped, monkeypatch):
    def full(tensors, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(StorageError, match="free some space, then resume"):
        train(load_config(stopped[0], ["data.num_workers=0"]), "auto")
    assert checkpoints.newest_checkpoint(stopped[1] / "checkpoints", print).name == "step-00000006"
