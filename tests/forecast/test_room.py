"""What a run needs of a machine, and that a run is refused, before it writes anything, where that is not there."""

import itertools
import json
import random
import re
import subprocess
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from fastrm.commands import training
from fastrm.config import load_config
from fastrm.errors import ConfigError, StorageError
from fastrm.evaluate.reward_model import RewardModel
from fastrm.forecast import room
from fastrm.forecast.dry_run import dry_run
from fastrm.forecast.fake_step import FakeSteps
from fastrm.forecast.needs import LIBRARIES, Disk, needs_of, num_checkpoints
from fastrm.forecast.room import check_room, disk_problem
from fastrm.forecast.workload import typical_workload
from fastrm.model import export
from fastrm.model.architectures import find_architecture, meta_network
from fastrm.model.export import save_model
from fastrm.model.weight_files import CHUNK_BYTES
from fastrm.resources import available_memory, free_disk
from fastrm.train.checkpoint import list_checkpoints
from fastrm.train.loop import train
from fastrm.ui import Display
from tests.helpers.epochs import ARCHITECTURES
from tests.helpers.project import PROJECT
from tests.helpers.runs import fastrm, text_rows, tiny_config, write_rows
from tests.helpers.support import make_model

GIB = 2**30


@pytest.fixture
def config_file(tmp_path):
    write_rows(tmp_path / "text.jsonl", text_rows(24))
    return tiny_config(tmp_path, tmp_path / "text.jsonl", run={"max_steps": 4, "save_every": 2})


def needs(config, num_gpus=1, network=None):
    network = network or meta_network(find_architecture(config.model)[0], config.model)
    return needs_of(FakeSteps(network), config, typical_workload(config, network), num_gpus)


def large(config_file, name: str, *overrides: str):
    """The configuration with one of ARCHITECTURES instead of its tiny model."""
    return load_config(config_file, [f"model.init={json.dumps(ARCHITECTURES[name])}", *overrides])


# Host memory and disk.


def control_group(root: Path, line: str, folder: str, **files: str | int) -> None:
    """A control group as the kernel shows it below `root`."""
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    with open(root / "proc/self/cgroup", "a") as file:
        file.write(line + "\n")
    (root / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / "sys/fs/cgroup" / folder / name.replace("__", ".")).write_text(f"{text}\n")


def v2(limit, used=0, cached=0):
    return {"memory__max": limit, "memory__current": used, "memory__stat": f"anon 5\ninactive_file {cached}"}


def v1(limit, used=0, cached=0):
    stat = f"inactive_file 3\ntotal_inactive_file {cached}"
    return {"memory__limit_in_bytes": limit, "memory__usage_in_bytes": used, "memory__stat": stat}


@pytest.fixture
def host(monkeypatch):
    """The machine has 100 GiB available."""
    memory = namedtuple("Memory", "available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(100 * GIB))


def test_available_memory_is_the_machines_where_no_group_has_a_limit(tmp_path, host):
    assert available_memory(tmp_path / "no linux") == 100 * GIB
    control_group(tmp_path, "0::/job", "job", **v2("max", 90 * GIB))
    control_group(tmp_path, "4:memory:/", "memory", **v1(9223372036854771712, 90 * GIB))
    assert available_memory(tmp_path) == 100 * GIB


@pytest.mark.parametrize(
    "line, folder, files, left",
    [
        ("0::/job", "job", v2(16 * GIB, 9 * GIB, 4 * GIB), 11 * GIB),
        ("0::/outer/job", "outer", v2(16 * GIB, 9 * GIB), 7 * GIB),  # of the group around it
        ("0::/not/seen/in/a/container", ".", v2(16 * GIB, 20 * GIB), 0),
        ("7:cpu,memory:/job", "memory/job", v1(16 * GIB, 9 * GIB, 4 * GIB), 11 * GIB),
        ("7:memory:/docker/abc", "memory", v1(16 * GIB, 9 * GIB), 7 * GIB),
        ("7:cpu:/job", "cpu/job", v2(16 * GIB), 100 * GIB),  # no group of memory
        ("0::/job", "job", v2("nonsense"), 100 * GIB),
    ],
    ids=["v2", "around", "container", "v1", "v1-container", "cpu", "damaged"],
)
def test_available_memory_is_what_the_control_group_leaves(tmp_path, host, line, folder, files, left):
    control_group(tmp_path, line, folder, **files)
    assert available_memory(tmp_path) == left


@pytest.mark.skipif(not Path("/proc").is_mount(), reason="needs Linux's /proc")
def test_a_file_system_that_stores_no_files_is_not_a_full_disk(config_file):
    problem = disk_problem(load_config(config_file, ["run.dir=/proc/x"]), Disk(1, 1, 1))
    assert problem == (
        "/proc/x: the disk cannot be asked how much is free: the file system of /proc stores no files; choose another "
        "run.dir"
    )


def test_the_free_disk_of_a_folder_that_is_not_there_is_that_of_the_one_above(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert abs(free_disk(Path("a/b/c")) - free_disk(tmp_path)) < GIB
    assert not Path("a").exists()


@pytest.fixture
def endless_disk(monkeypatch):
    monkeypatch.setattr(room, "free_disk", lambda path: 2**60)


# What a run needs.


def test_checkpoints_and_export_are_as_large_as_predicted(config_file):
    config = load_config(config_file)
    train(config, display=Display(silent=True))
    disk, run_dir = needs(config).disk, Path(config.run.dir)
    checkpoint = list_checkpoints(run_dir / "checkpoints")[0]
    for folder, predicted in ((checkpoint, disk.checkpoint), (run_dir / "model", disk.export)):
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        # Headers name every tensor; the vocabulary that was asked for is an upper bound.
        assert 0.9 * predicted < weights < predicted + 2**16, folder


@pytest.mark.parametrize("seed", range(30))
def test_never_more_checkpoints_than_predicted_are_there_at_a_time(config_file, seed):
    rng = random.Random(seed)
    settings = {name: rng.choice([0, 1, 2, 3, 5]) for name in ("save_every", "eval_every")}
    settings |= {"keep_checkpoints": rng.randint(1, 4), "max_steps": rng.choice([1, 2, 4, 20])}
    settings |= {"eval_at_start": rng.choice([False, True])}
    overrides = [f"run.{name}={value}" for name, value in settings.items()] + ["data.eval=[{path: text.jsonl}]"]
    predicted, most = num_checkpoints(load_config(config_file, overrides)), 0
    for _ in range(50):
        most = max(most, _most_checkpoints(rng, **settings))
        assert most <= predicted
    assert most >= predicted - 1


def _most_checkpoints(
    rng, save_every: int, eval_every: int, keep_checkpoints: int, max_steps: int, eval_at_start: bool
) -> int:
    """Plays a run with random accuracies: saves, the best evaluation's too, and what pruning leaves."""
    there: list[int] = []
    best, best_accuracy, most = None, -1.0, 0
    for step in range(max_steps + 1):
        due = step > 0 and bool(save_every) and step % save_every == 0
        is_evaluated = eval_every and step % eval_every == 0 if step else eval_at_start
        if is_evaluated and (accuracy := rng.random()) > best_accuracy:
            best, best_accuracy, due = step, accuracy, True
        if (due or step == max_steps) and step not in there:
            there.append(step)
            most = max(most, len(there))
            there = [s for s in there if s in there[-keep_checkpoints:] or s == best]
    return most


def test_a_run_without_evaluation_data_keeps_no_best_checkpoint(config_file):
    every = ["run.max_steps=null", "run.save_every=1", "run.eval_every=1", "run.keep_checkpoints=2"]
    assert num_checkpoints(load_config(config_file, every)) == 3
    assert num_checkpoints(load_config(config_file, [*every, "data.eval=[{path: text.jsonl}]"])) == 4
    assert num_checkpoints(load_config(config_file, [*every, "data.train.0.held_out=0.1"])) == 4
    assert num_checkpoints(load_config(config_file, ["run.save_every=0"])) == 1


def test_the_phases_of_the_7b_are_its_weights_and_states(config_file):
    """By hand: P parameters take 4 bytes each as weights, 4 as gradients and 8 as moments."""
    config = large(config_file, "7B")
    network = meta_network(find_architecture(config.model)[0], config.model)
    number, tensors = sum(p.numel() for p in network.parameters()), len(list(network.parameters()))
    assert number > 7 * 10**9
    found = needs(config, network=network)
    assert found.least == 16 * number + 4 * tensors
    assert found.cpu.loading == LIBRARIES + 4 * number + CHUNK_BYTES
    assert found.gpu.loading == 4 * number == found.least_on_gpu
    assert found.gpu.saving == found.gpu.exporting == found.disk.checkpoint == 12 * number + 4 * tensors
    assert found.disk.export == 4 * number
    assert found.gpu.training > found.least < found.cpu.training
    assert found.host.saving == LIBRARIES + 4 * 2**30  # a shard at a time
    divided = needs(large(config_file, "7B", "engine.zero_stage=3"), 16, network)
    # Of a sixteenth of the parameters: weights and DeepSpeed's copy of them, gradients, two moments.
    assert divided.gpu.saving == pytest.approx(20 * number / 16, rel=1e-3)
    assert divided.host.loading == 8 * (LIBRARIES + 4 * number + CHUNK_BYTES)  # each makes its own random weights
    assert divided.disk == found.disk


# Refusals.


def test_a_run_with_too_little_host_memory_is_refused_before_it_begins(config_file, monkeypatch):
    config, least = load_config(config_file), needs(load_config(config_file)).least
    monkeypatch.setattr(room, "available_memory", lambda: least - 1)
    with pytest.raises(ConfigError, match=r"weights, gradients and AdamW's states take [\d.]+ GiB on a CPU"):
        training.train(config_file, [])
    assert not Path(config.run.dir).exists()
    monkeypatch.setattr(room, "available_memory", lambda: least)
    check_room(config)


def test_the_refusal_of_the_7b_names_what_is_needed_and_there_and_what_to_set(config_file, monkeypatch, endless_disk):
    monkeypatch.setattr(room, "available_memory", lambda: 24 * GIB)
    for overrides, ways in (
        (["precision.dtype=bf16"], ["precision.weights: bf16", "optim.states: 8bit", "model.freeze"]),
        (["precision.dtype=bf16", "precision.weights=bf16", "optim.states=8bit"], ["model.freeze"]),
    ):
        with pytest.raises(ConfigError) as caught:
            check_room(large(config_file, "7B", *overrides))
        text = str(caught.value)
        assert "24.0 GiB are available" in text and all(way in text for way in ways)
        assert ("optim.states: 8bit" in text) == ("optim.states: 8bit" in ways)
    config = large(config_file, "7B", "model.freeze=[vision, projector, language]", "precision.weights=fp32")
    with pytest.raises(ConfigError, match=r"take 27\.0 GiB on a CPU"):  # of a vocabulary of 300
        check_room(config)


def test_processes_of_one_machine_need_their_memory_together(config_file, monkeypatch, endless_disk):
    config = large(config_file, "3B")
    alone = needs(config, 2).least
    monkeypatch.setattr(room, "available_memory", lambda: 2 * alone - 1)
    with pytest.raises(ConfigError, match=r"of 2 ranks take .* lower run\.num_processes"):
        check_room(config, 2, 2)
    check_room(config, 2, 1)  # the other is on another machine


def test_random_weights_are_made_on_the_host_of_a_gpu(config_file, monkeypatch, endless_disk):
    config = large(config_file, "3B")
    monkeypatch.setattr(room, "pick_device", lambda requested: type("Device", (), {"type": "cuda"}))
    monkeypatch.setattr(room, "available_memory", lambda: 10 * GIB)
    with pytest.raises(ConfigError, match=r"random weights of model\.init are made there .*\(model\.path\)"):
        check_room(config)
    monkeypatch.setattr(room, "available_memory", lambda: 20 * GIB)
    check_room(config)


def test_a_run_with_too_little_disk_is_refused_before_it_begins(config_file, monkeypatch):
    config = load_config(config_file)
    disk = needs(config).disk
    monkeypatch.setattr(room, "free_disk", lambda path: disk.total - 1)
    with pytest.raises(StorageError) as caught:
        training.train(config_file, [])
    for text in (f"{config.run.dir}: 2 checkpoints of", "GiB are free; free some space", "run.keep_checkpoints (2)"):
        assert text in str(caught.value)
    assert not Path(config.run.dir).exists()
    monkeypatch.setattr(room, "free_disk", lambda path: disk.total)
    train(config, display=Display(silent=True))
    # Resumed, it replaces what it has written itself.
    written = sum(f.stat().st_size for n in ("checkpoints", "model") for f in (Path(config.run.dir) / n).rglob("*"))
    monkeypatch.setattr(room, "free_disk", lambda path: disk.total - written // 2)
    check_room(config)


def test_a_small_file_system_is_refused_by_the_command(config_file, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount: {mounted.stderr.decode().strip()}")
    try:
        ended = fastrm("train", config_file, f"run.dir={small / 'run'}")
        assert ended.returncode == StorageError.exit_code, ended.stderr
        assert "GiB are free; free some space, or choose a run.dir on another disk" in ended.stderr
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_model_that_the_host_has_no_memory_for_is_not_read(tmp_path, monkeypatch):
    network = make_model("qwen2")
    save_model(network, tmp_path / "model")
    needed = 4 * sum(parameter.numel() for parameter in network.model.parameters())
    monkeypatch.setattr(export, "available_memory", lambda: needed - 1)
    with pytest.raises(StorageError, match=r"take 0\.0 GiB in float32, 0\.0 GiB of host memory .*a GPU, dtype bf16$"):
        RewardModel.from_pretrained(tmp_path / "model", device="cpu", dtype="fp32")
    monkeypatch.setattr(export, "available_memory", lambda: needed // 2)
    RewardModel.from_pretrained(tmp_path / "model", device="cpu", dtype="bf16")


# Tables.


@pytest.mark.parametrize("width", [80, 140])
def test_the_dry_run_says_what_a_run_needs_and_what_is_missing_here(config_file, monkeypatch, width):
    monkeypatch.setattr(room, "available_memory", lambda: 24 * GIB)
    monkeypatch.setattr(room, "free_disk", lambda path: 100 * GIB)
    console = Console(record=True, width=width, file=open("/dev/null", "w"))  # noqa: SIM115
    found = dry_run(large(config_file, "7B"), console)["needs"]
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    rows = {"loading the weights": "loading", "training": "training", "writing a checkpoint": "saving",
            "exporting the model": "exporting"}  # fmt: skip
    for label, name in rows.items():
        cells = [f"{getattr(phases, name) / GIB:,.1f}" for phases in (found.cpu, found.host, found.gpu)]
        (line,) = (line for line in lines if label in line)
        assert line.replace("│", " ").split()[-3:] == cells
    assert "Disk below run.dir, at most: 2 checkpoints of" in text
    assert text.count("Not on this machine: ") == 2


def test_the_plan_says_it_of_a_machine_and_of_each_gpu(tmp_path):
    out = tmp_path / "plan.json"
    command = ["plan", PROJECT / "configs/full.yaml", "--gpus", "64", "--json", out]
    ended = fastrm(*command, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    (table,) = re.findall(r"^Memory of a run.*?^  Disk [^\n]*$", ended.stdout, re.MULTILINE | re.DOTALL)
    assert table in (PROJECT / "docs/memory.md").read_text(), f"docs/memory.md shows another table than\n{table}"
    found = json.loads(out.read_text())
    assert found["needs"]["gpu"]["training"] == found["memory"]["total"]
    assert found["needs"]["disk"]["num_checkpoints"] == 3


def test_a_model_that_nothing_here_knows_is_not_refused(config_file, monkeypatch):
    monkeypatch.setattr(room, "available_memory", lambda: 0)
    overrides = ["model.init=null", "model.tokenizer=null", "model.path=somebody/else"]
    check_room(load_config(config_file, overrides))


def test_shards_and_waiting_packs_are_in_the_hosts_memory(config_file):
    few, many = (needs(load_config(config_file, [f"data.num_workers={n}"])) for n in (0, 4))
    packs = many.host.training - few.host.training
    assert packs > 0 and packs % 16 == 0  # four packs ahead of each of four workers
    assert many.cpu.training - few.cpu.training == packs
    for one, other in itertools.pairwise((few.gpu, many.gpu)):
        assert one == other
