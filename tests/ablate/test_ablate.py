"""`fastrm ablate` with real runs: exact, resumable, and honest about what failed."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from fastrm.ablate.command import ablate, dry_run
from fastrm.ablate.grid import load_grid
from fastrm.ablate.results import cell_metrics, flat_report
from fastrm.ablate.runner import FailedCells
from fastrm.ablate.work import (
    cell_task,
    check_unchanged,
    ensemble_task,
    evaluation_commands,
    is_finished,
    with_reused_runs,
)
from fastrm.config import load_config
from fastrm.errors import ConfigError
from fastrm.evaluate.reward_model import RewardModel
from fastrm.train.loop import train
from fastrm.train.metrics import read_rows
from tests.helpers.ablation_grids import AXES, write_grid
from tests.helpers.killed_runs import rows_without_clock
from tests.helpers.runs import fastrm, text_rows, write_rows
from tests.helpers.waiting import PATIENCE, wait_until


def weights(run_dir: Path) -> bytes:
    return (run_dir / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A grid of two settings and an ensemble of them, run by the command; its file and what it printed.

    A process of `fastrm` takes seconds to begin, so these few serve most tests.
    """
    ensembles = {"both": {"members": ["1 layer", "2 layers"]}}
    folder = tmp_path_factory.mktemp("ablate")
    path = write_grid(folder, seeds=[1], num_parallel=2, reference="1 layer", ensembles=ensembles)
    done = fastrm("ablate", path)
    assert done.returncode == 0, done.stderr
    return path, done


def test_grid_leaves_a_run_for_each_cell_and_a_table(finished):
    path, done = finished
    grid = load_grid(path)
    assert all(is_finished(cell.dir) for cell in grid.cells)
    assert {file.name for file in grid.dir.iterdir() if file.is_file()} == {
        ".lock", "results.json", "table.md", "report.png", "report.html",
    }  # fmt: skip
    found = json.loads((grid.dir / "results.json").read_text())
    assert [cell["row"] for cell in found["cells"]] == ["1 layer", "2 layers", "both"]
    for cell, written in zip(grid.cells, found["cells"], strict=False):
        summary = json.loads((cell.dir / "summary.json").read_text())
        assert written["metrics"]["held_out/accuracy"] == summary["eval_accuracy"]
        assert written["seconds"] > 0 and written["state"] == "finished"
    assert (grid.dir / "table.md").read_text().startswith("### A grid\n\n| head | held_out/accuracy |\n")
    assert "cells: 2/2" in done.stderr and "2 layers" in done.stdout


def test_cell_is_bitwise_the_run_of_train(finished, tmp_path):
    cell = load_grid(finished[0]).cells[1]
    alone = [override for override in cell.overrides if not override.startswith("run.dir=")]
    train(load_config(cell.base, [*alone, f"run.dir={tmp_path / 'alone'}"]))
    assert weights(tmp_path / "alone") == weights(cell.dir)
    assert rows_without_clock(tmp_path / "alone") == rows_without_clock(cell.dir) != []


def test_ensemble_is_the_mean_of_its_members_rewards(finished):
    grid = load_grid(finished[0])
    groups = [json.loads(line) for line in Path(grid.cells[0].config.data.eval[0].path).read_text().splitlines()]
    asked = [{"prompt": g["prompt"], "responses": [g["chosen"], g["rejected"]]} for g in groups]
    found = json.loads((grid.dir / "results.json").read_text())["cells"]
    for ensemble in grid.ensembles:
        models = [RewardModel.from_pretrained(member.dir / "model", dtype="fp32") for member in ensemble.members]
        margins = [
            sum(chosen - rejected for chosen, rejected in pairs)
            for pairs in zip(*(m.score(asked) for m in models), strict=True)
        ]
        (written,) = [cell for cell in found if cell["name"] == ensemble.name]
        assert written["metrics"]["held_out/accuracy"] == sum(margin > 0 for margin in margins) / len(margins)


def test_finished_cells_are_not_run_again(finished):
    grid = load_grid(finished[0])
    before = {cell.name: (cell.dir / "summary.json").stat().st_mtime_ns for cell in grid.cells}
    table = (grid.dir / "table.md").read_text()
    ablate(finished[0], [])
    assert before == {cell.name: (cell.dir / "summary.json").stat().st_mtime_ns for cell in grid.cells}
    assert (grid.dir / "table.md").read_text() == table


def test_changed_cells_are_refused_by_name(finished):
    path, _ = finished
    with pytest.raises(ConfigError) as error:
        ablate(path, ["loss.center=0.5"])
    message = str(error.value)
    assert message.startswith(f"{path}: 2 cells hold runs of another configuration:\n  1_layer-seed1 (")
    assert "\n    loss.center: 0.0 there, 0.5 now\n" in message
    assert message.endswith("set it back, remove these folders, or set dir to start another grid")


def test_equal_runs_of_another_grid_are_taken_instead_of_run(finished, tmp_path):
    other = load_grid(finished[0])
    base = yaml.safe_load(finished[0].read_text())["base"]
    axes = {"layers": {"two": {"model.head.layers": 2}, "five": {"model.head.layers": 5}}}
    path = write_grid(tmp_path, "other", base=base, axes=axes, seeds=[1], reuse=[str(other.dir)])
    grid = with_reused_runs(load_grid(path))
    assert [cell.dir for cell in grid.cells] == [other.dir / "2_layers-seed1", tmp_path / "other" / "five-seed1"]
    assert [cell_task(cell, grid.settings.evaluate) is None for cell in grid.cells] == [True, False]
    check_unchanged(grid)


def test_summary_cut_off_by_a_kill_does_not_count(finished, tmp_path):
    (tmp_path / "summary.json").write_text('{"eval_acc')
    assert not is_finished(tmp_path)


def test_failed_cell_is_named_and_ends_no_other(tmp_path):
    axes = {"data": {"gone": {"data.train": [{"path": str(tmp_path / "gone.jsonl")}]}, "here": {}}}
    path = write_grid(tmp_path, axes=axes, num_parallel=2)
    with pytest.raises(FailedCells) as error:
        ablate(path, [])
    assert error.value.exit_code == 71
    assert str(error.value) == (
        f"1 of 2 cells failed: gone-seed0; each one's output.log says why; fastrm ablate {path} runs them again"
    )
    table = (tmp_path / "grid" / "table.md").read_text()
    assert "\n| gone | - |\n" in table and "\n1 cells failed:\n- gone-seed0: " in table
    assert f"{tmp_path / 'gone.jsonl'}" in table.rpartition("gone-seed0: ")[2]
    found = json.loads((tmp_path / "grid" / "results.json").read_text())
    assert [cell["state"] for cell in found["cells"]] == ["failed", "finished"]
    grid = load_grid(path)
    assert [cell_task(cell, grid.settings.evaluate) is None for cell in grid.cells] == [False, True]


@pytest.mark.slow
def test_failed_cell_runs_when_its_data_is_there(tmp_path):
    axes = {"data": {"gone": {"data.train": [{"path": str(tmp_path / "gone.jsonl")}]}}}
    path = write_grid(tmp_path, axes=axes)
    with pytest.raises(FailedCells):
        ablate(path, [])
    write_rows(tmp_path / "gone.jsonl", text_rows(24))
    assert ablate(path, []).failed == {}
    assert "failed" not in (tmp_path / "grid" / "table.md").read_text()


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)], ids=["ctrl-c", "kill"]
)
def test_stopped_grid_goes_on_to_the_bit(number, tmp_path):
    path = write_grid(tmp_path, steps=40, overrides={"run.save_every": 10})
    grid = load_grid(path)
    running = subprocess.Popen(
        [sys.executable, "-m", "fastrm.cli", "ablate", str(path)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    first = grid.cells[0].dir
    wait_until(lambda: len(read_rows(first / "metrics.jsonl")) > 12)
    running.send_signal(number)
    _, stderr = running.communicate(timeout=PATIENCE)
    if number == signal.SIGINT:
        assert running.returncode == 75
        assert f"stopped by SIGINT with 0 of 2 cells done; go on with: fastrm ablate {path}" in stderr
    wait_until(lambda: is_unlocked(first))  # its run saves its state when the grid is gone
    assert not is_finished(first) and not grid.cells[1].dir.exists()
    # The second cell is an ordinary run, which would only cost time.
    ablate(path, [f"axes={json.dumps({'head': {'1 layer': AXES['head']['1 layer']}})}"])
    assert "resumed from" in (first / "output.log").read_text()
    train(load_config(grid.cells[0].base, [*grid.cells[0].overrides, f"run.dir={tmp_path / 'unbroken'}"]))
    assert weights(first) == weights(tmp_path / "unbroken")
    assert rows_without_clock(first) == rows_without_clock(tmp_path / "unbroken")


def is_unlocked(run_dir: Path) -> bool:
    """Has the process left that wrote its id into the run's lock?"""
    with suppress(ProcessLookupError):
        os.kill(int((run_dir / ".lock").read_text().split()[1]), 0)
        return False
    return True


def test_evaluation_of_the_command_agrees_with_the_run(finished, tmp_path):
    other = load_grid(finished[0])
    base, held_out = other.cells[1].base, other.cells[1].config.data.eval[0].path
    path = write_grid(
        tmp_path, base=base, axes={"head": {"2 layers": AXES["head"]["2 layers"]}}, seeds=[1], reuse=[str(other.dir)],
        evaluate=["held_out", {"name": "again", "target": held_out}],
    )  # fmt: skip
    results = ablate(path, [])
    metrics = results.metrics["2_layers-seed1"]
    assert metrics["again/accuracy"] == metrics["held_out/accuracy"]
    grid = results.grid
    assert cell_task(grid.cells[0], grid.settings.evaluate) is None
    # Another way to evaluate is another file: the old figures are not taken for the new.
    changed = [evaluation.model_copy(update={"format": "flat"}) for evaluation in grid.settings.evaluate]
    (command,) = cell_task(grid.cells[0], changed).commands
    assert command.arguments[0] == "eval" and "again/accuracy" not in cell_metrics(grid.cells[0], changed)


def test_ensemble_scores_its_members_together(tmp_path):
    ensembles = {"both": {"members": ["1 layer", "2 layers"], "combine": "margin", "validation": "v.jsonl"}}
    rm_bench = {"name": "rm_bench", "target": "bench:rm_bench", "data": "rm.json", "images": "pictures"}
    grid = load_grid(write_grid(tmp_path, ensembles=ensembles, evaluate=["held_out", rm_bench], seeds=[5]))
    (cell,) = grid.ensembles
    held_out, benchmark = ensemble_task(cell, grid.settings.evaluate).commands
    models = [str(grid.dir / name / "model") for name in ("1_layer-seed5", "2_layers-seed5")]
    assert held_out.arguments[:4] == ("eval", *models, str(tmp_path / "eval.jsonl"))
    assert benchmark.arguments[:4] == ("eval", *models, "bench:rm_bench")
    assert "--data rm.json --images pictures" in " ".join(benchmark.arguments)
    for command in (held_out, benchmark):
        assert "--ensemble margin --validation v.jsonl" in " ".join(command.arguments)
    benchmark.out.parent.mkdir(parents=True)
    benchmark.out.write_text('{"metrics": {"overall": 0.5, "chat/hard": 0.25}, "rows": 4}')
    found = cell_metrics(cell, grid.settings.evaluate)
    assert found == {"rm_bench/overall": 0.5, "rm_bench/chat/hard": 0.25}


def test_held_out_sources_of_an_ensemble_are_pooled_by_their_preferences(tmp_path):
    ensembles = {"both": {"members": ["1 layer", "2 layers"]}}
    sources = [{"path": str(tmp_path / "eval.jsonl")}, {"path": str(tmp_path / "train.jsonl")}]
    grid = load_grid(write_grid(tmp_path, ensembles=ensembles, overrides={"data.eval": sources}))
    (cell,), (evaluation,) = grid.ensembles, grid.settings.evaluate
    first, second = evaluation_commands(cell, evaluation)
    first.out.parent.mkdir(parents=True)
    first.out.write_text('{"accuracy": 1.0, "preferences": 1, "sources": {}}')
    assert cell_metrics(cell, [evaluation]) == {}
    second.out.write_text('{"accuracy": 0.5, "preferences": 3, "sources": {}}')
    assert cell_metrics(cell, [evaluation]) == {"held_out/accuracy": 0.625}


def test_report_of_a_file_is_flat_with_its_sources():
    report = {"accuracy": 0.5, "preferences": 4, "sources": {"a": {"accuracy": 1.0}, "b": {"accuracy": 0.25}}}
    assert flat_report(report) == {"accuracy": 0.5, "preferences": 4, "a/accuracy": 1.0, "b/accuracy": 0.25}


def test_report_of_costs_is_flat_by_what_is_judged():
    pair, group = {"tokens_generated": 0, "flops": 1e6, "how": "packed"}, {"tokens_generated": 0, "flops": 3e6}
    assert flat_report({"model": "m", "costs": {"pair": pair, "group_of_8": group}}) == {
        "pair/tokens_generated": 0, "pair/flops": 1e6, "group_of_8/tokens_generated": 0, "group_of_8/flops": 3e6,
    }  # fmt: skip


def test_dry_run_lists_cells_with_costs_and_writes_nothing(finished, tmp_path, capsys):
    dry_run(write_grid(tmp_path, seeds=[0, 1]), [])
    listed = capsys.readouterr().out
    assert "A grid: 4 runs, 0 ensembles" in listed and "2_layers-seed1" in listed
    assert "4 unknown" in listed and not (tmp_path / "grid").exists()
    dry_run(finished[0], [])
    listed = capsys.readouterr().out
    assert "left to run" in listed and "0 runs" in listed and "evaluation only" in listed
