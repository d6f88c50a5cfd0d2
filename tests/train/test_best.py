"""The best model of a run, a run that stops early, and one that takes the place of another."""

import json
import random
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fastrm.config import RunConfig, load_config
from fastrm.errors import ConfigError, StorageError
from fastrm.train.checkpoint import list_checkpoints, step_of
from fastrm.train.metrics import read_rows
from fastrm.train.progress import Progress
from tests.helpers.killed_runs import assert_same, outcome
from tests.helpers.runs import TEXT_MODEL, run, text_rows, tiny_config, write_rows

# ---- the rule, by itself


def first_stop(values: list[float], lower: bool, patience: int, min_delta: float) -> int | None:
    """The number of evaluations after which a run stops: the rule as Keras's EarlyStopping has it, read backwards.

    An evaluation improves if it is better than every earlier improvement by more than min_delta.
    """
    signed = [-value if lower else value for value in values]
    improvements = [0]
    for number, value in enumerate(signed[1:], 1):
        if value - max(signed[i] for i in improvements) > min_delta:
            improvements.append(number)
        if number - improvements[-1] >= patience:
            return number + 1
    return None


@pytest.mark.parametrize("seed", range(40))
def test_stopping_follows_the_written_rule(seed):
    rng = random.Random(seed)
    metric = rng.choice(["eval/accuracy", "eval/loss", "eval/margin"])
    patience, min_delta = rng.randint(1, 4), rng.choice([0.0, 0.1, 0.3])
    values = [rng.choice([0.1, 0.2, 0.3, 0.35, 0.5, 0.9]) for _ in range(20)]
    settings = RunConfig(early_stopping={"metric": metric, "patience": patience, "min_delta": min_delta})
    progress, stopped, bests = Progress(), None, []
    for number, value in enumerate(values, 1):
        progress.step = number
        row = {"step": number, "eval/accuracy": 0.5, "eval/loss": 0.5, "eval/margin": 0.5} | {metric: value}
        if progress.note_evaluation(row, settings):
            bests.append(number)
        progress = Progress.from_state(json.loads(json.dumps(progress.state())))  # as after a resume
        if stopped is None and progress.is_stopped_early(settings):
            stopped = number
    assert stopped == first_stop(values, metric == "eval/loss", patience, min_delta)
    wanted = min(values) if metric == "eval/loss" else max(values)
    assert progress.best_value == wanted and progress.best_step == values.index(wanted) + 1 == bests[-1]


# ---- runs


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "t.jsonl", text_rows(24))


def config(folder: Path, rows: Path, **settings) -> Path:
    """Twelve steps, so fast that the held-out loss goes up again."""
    folder.mkdir(exist_ok=True)
    settings = {"max_steps": 12, "eval_every": 1, "keep_checkpoints": 1, **settings}
    held_out = write_rows(folder / "held_out.jsonl", text_rows(31)[24:])
    optim = {"lr": 0.03, "schedule": "constant", "warmup_ratio": 0.0}
    return tiny_config(folder, rows, held_out, run=settings, model={"init": TEXT_MODEL}, optim=optim)


LOSS = {"metric": "eval/loss", "patience": 2}


@pytest.fixture(scope="module")
def whole(rows, tmp_path_factory):
    """A run to its last step, with every checkpoint; the evaluations of all others are those of its beginning."""
    folder = tmp_path_factory.mktemp("whole")
    run(config(folder, rows, save_every=1, keep_checkpoints=20))
    return folder / "run"


@pytest.fixture(scope="module")
def stopped(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    path = config(folder, rows, early_stopping=LOSS, export="best")
    return path, run(path)


def losses(run_dir: Path) -> list[float]:
    return [row["eval/loss"] for row in read_rows(run_dir / "metrics.jsonl") if "eval/loss" in row]


def weights(folder: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(folder / "model.safetensors").items()}


def test_a_run_stops_where_the_rule_says_and_leaves_its_best_model(whole, stopped):
    path, summary = stopped
    folder, values = path.parent / "run", losses(whole)
    last = first_stop(values, True, 2, 0.0)
    assert last is not None and 3 <= last < 12, "the data of this test no longer overfit"
    assert losses(folder) == values[:last]
    best = min(range(last), key=values.__getitem__) + 1
    assert (summary["steps"], summary["stopped_early"]) == (last, True)
    assert (summary["best_metric"], summary["best_value"]) == ("eval/loss", values[best - 1])
    assert summary["exported_step"] == best == last - 2
    assert [step_of(kept) for kept in list_checkpoints(folder / "checkpoints")] == [last, best], "the best is kept"
    exported = weights(folder / "model")
    kept = weights(folder / "checkpoints" / f"step-{best:08d}")
    assert {name: exported[name] for name in kept} == kept
    of_the_end = weights(folder / "checkpoints" / f"step-{last:08d}")
    assert {name: exported[name] for name in of_the_end} != of_the_end


def test_the_end_names_the_best_step_its_metric_and_why_the_run_stopped(stopped, capsys):
    path, summary = stopped
    run(path, resume="auto")
    said = " ".join(capsys.readouterr().err.split())
    best, last = summary["exported_step"], summary["steps"]
    assert f"stopped early after step {last} of 12: eval/loss has not improved in 2 evaluations" in said
    assert f"best at an evaluation, by eval/loss {summary['best_value']:.4f} (step {best})" in said
    assert f"model/ has the weights of step {best}" in said and f"steps {last}, stopped early" in said


def test_a_stopped_run_that_is_resumed_stays_stopped(stopped, tmp_path):
    path, summary = stopped
    copy = Path(shutil.copytree(path.parent / "run", tmp_path / "run"))
    again = run(path, f"run.dir={copy}", resume="auto")
    assert again["steps"] == summary["steps"] and again["stopped_early"]
    assert_same(copy, outcome(path.parent / "run"))
    more = run(path, f"run.dir={copy}", "run.early_stopping.patience=4", resume="auto")
    assert more["steps"] > summary["steps"], "with more patience it goes on"


@pytest.mark.parametrize("step", range(1, 5))
def test_patience_is_counted_on_after_a_resume(whole, stopped, rows, tmp_path, step):
    path, _ = stopped
    middle = config(tmp_path, rows, early_stopping=LOSS, export="best", save_every=1, keep_checkpoints=9)
    run(middle, f"run.max_steps={step}")
    run(middle, resume=str(tmp_path / "run" / "checkpoints" / f"step-{step:08d}"))
    assert_same(tmp_path / "run", outcome(path.parent / "run"))


def test_a_run_without_early_stopping_chooses_by_accuracy_and_exports_the_last(whole):
    summary = json.loads((whole / "summary.json").read_text())
    accuracies = [row["eval/accuracy"] for row in read_rows(whole / "metrics.jsonl") if "eval/accuracy" in row]
    assert summary["best_value"] == summary["best_accuracy"] == max(accuracies)
    assert (summary["exported_step"], summary["stopped_early"]) == (12, False)
    exported, kept = weights(whole / "model"), weights(whole / "checkpoints" / "step-00000012")
    assert {name: exported[name] for name in kept} == kept


def test_another_metric_on_resume_compares_anew(whole, tmp_path):
    copy = Path(shutil.copytree(whole, tmp_path / "run"))
    overrides = f"run.dir={copy}", "run.early_stopping={metric: eval/margin, patience: 9}"
    summary = run(whole.parent / "config.yaml", *overrides, resume=str(copy / "checkpoints" / "step-00000010"))
    margins = {row["step"]: row["eval/margin"] for row in read_rows(copy / "metrics.jsonl") if "eval/margin" in row}
    assert summary["best_value"] == max(margins[11], margins[12])


def test_a_best_checkpoint_that_is_missing_or_damaged_is_named(stopped, tmp_path):
    path, summary = stopped
    copy = Path(shutil.copytree(path.parent / "run", tmp_path / "run"))
    shutil.rmtree(copy / "checkpoints" / f"step-{summary['exported_step']:08d}")
    with pytest.raises(ConfigError, match=r"run\.export: best: the best step so far, .* is not there or not intact"):
        run(path, f"run.dir={copy}", resume="auto")
    run(path, f"run.dir={copy}", "run.export=last", resume="auto")
    # A run that goes on in another folder has not the checkpoint there that it starts from.
    best = path.parent / "run" / "checkpoints" / f"step-{summary['exported_step']:08d}"
    with pytest.raises(ConfigError, match=f"copy it there from {best.parent}"):
        run(path, f"run.dir={tmp_path / 'new'}", resume=str(best))


def test_a_best_checkpoint_that_is_damaged_at_the_end_costs_no_step(rows, tmp_path, monkeypatch):
    path = config(tmp_path, rows, early_stopping=LOSS, export="best")
    monkeypatch.setattr("fastrm.train.report.verify", lambda path: "state.json is missing")
    with pytest.raises(StorageError, match=r"the best checkpoint, which run\.export: best exports, is not intact"):
        run(path)
    monkeypatch.undo()
    assert run(path, resume="auto")["stopped_early"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.export=best", "data.eval=[]"], "run.export: best needs evaluations, and there is no data.eval"),
        (["run.early_stopping={}", "data.eval=[]"], "run.early_stopping needs evaluations, and there is no data.eval"),
        (["run.early_stopping={}", "run.eval_every=0"], "run.early_stopping needs evaluations while the run trains"),
        (
            ["run.early_stopping={metric: eval/f1}"],
            "run.early_stopping.metric: got 'eval/f1', which no evaluation makes; there are eval/accuracy, eval/loss, ",
        ),
        (["run.early_stopping={patience: 0}"], "run.early_stopping.patience: got 0"),
    ],
)
def test_what_waits_for_an_evaluation_that_is_never_made_is_refused(rows, tmp_path, overrides, message):
    with pytest.raises(ConfigError) as error:
        load_config(config(tmp_path, rows), overrides)
    assert message in str(error.value)


# ---- run.overwrite


def test_a_run_is_refused_by_default_and_the_way_to_start_over_is_named(whole):
    with pytest.raises(ConfigError, match=r"add --resume auto to continue it.* run\.overwrite=true to delete this one"):
        run(whole.parent / "config.yaml")


def test_starting_over_deletes_the_run_and_nothing_else(stopped, rows, tmp_path, capsys):
    path, _ = stopped
    copy = Path(shutil.copytree(path.parent / "run", tmp_path / "run"))
    (copy / "notes.txt").write_text("mine")
    (copy / "checkpoints" / "notes.txt").write_text("mine too")
    (copy / "exports").mkdir()
    (copy / "trackers.json").write_text('{"tensorboard": "of the old run"}')
    overrides = f"run.dir={copy}", "run.overwrite=true", "run.max_steps=1", "run.eval_every=0"
    run(path, *overrides, "run.early_stopping=null", "run.export=last")
    said = capsys.readouterr().err
    assert f"run.overwrite: deleted the run in {copy}, with 2 checkpoints" in said
    assert "prepared set found" in said, "prepared data are used again"
    assert [step_of(kept) for kept in list_checkpoints(copy / "checkpoints")] == [1]
    assert max(row["step"] for row in read_rows(copy / "metrics.jsonl")) == 1
    assert (copy / "notes.txt").read_text() == "mine" and (copy / "checkpoints" / "notes.txt").exists()
    assert (copy / "exports").is_dir() and not (copy / "trackers.json").exists()
    # A resumed run goes on.
    assert run(path, *overrides[:2], "run.max_steps=2", resume="auto")["steps"] == 2


def test_a_run_is_deleted_only_when_the_next_one_can_begin(stopped, tmp_path):
    path, _ = stopped
    copy = Path(shutil.copytree(path.parent / "run", tmp_path / "run"))
    before = sorted(copy.rglob("*"))
    for wrong in ("model.init.hidden_act=nosuch", "data.train=[{path: missing.jsonl}]"):
        with pytest.raises(Exception, match=r"missing\.jsonl|nosuch"):
            run(path, f"run.dir={copy}", "run.overwrite=true", wrong, "data.prepared=" + str(tmp_path / "new"))
    assert sorted(copy.rglob("*")) == before


def test_what_is_no_run_or_is_needed_is_not_deleted(stopped, tmp_path):
    path, _ = stopped
    copy = Path(shutil.copytree(path.parent / "run", tmp_path / "run"))
    (copy / "config.yaml").unlink()
    before = sorted(copy.rglob("*"))
    with pytest.raises(ConfigError, match=r"holds metrics or checkpoints but no config\.yaml of a run, and is not del"):
        run(path, f"run.dir={copy}", "run.overwrite=true")
    (copy / "config.yaml").write_text("model: {}\n")  # somebody else's
    with pytest.raises(ConfigError, match=r"no config\.yaml of a run"):
        run(path, f"run.dir={copy}", "run.overwrite=true")
    shutil.copy(path.parent / "run" / "config.yaml", copy)
    before.append(copy / "config.yaml")
    for part in (copy, copy / "model"):
        overrides = f"run.dir={copy}", "run.overwrite=true", "model={path: " + str(part) + "}"
        with pytest.raises(ConfigError, match=r"run\.overwrite: .*, which the model is made of, is a part of the run"):
            run(path, *overrides)
    assert sorted(copy.rglob("*")) == sorted(before)
