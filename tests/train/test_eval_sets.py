"""Evaluations while a run trains: named sets with figures of their own, parts of them, and one at the start."""

import shutil
from pathlib import Path

import pytest

from fastrm.config import load_config
from fastrm.data.prepared.stored import PreparedSet, read_manifest
from fastrm.errors import ConfigError, DataError
from fastrm.evaluate.accuracy import is_right
from fastrm.evaluate.reward_model import RewardModel
from fastrm.train.metrics import read_rows
from tests.helpers.killed_runs import assert_same, outcome, rows_without_clock
from tests.helpers.runs import TEXT_MODEL, run, text_rows, tiny_config, write_rows

ROWS = text_rows(60)
# Two files in one set, and a source with another name; all of different sizes.
FILES = {"a": ROWS[20:27], "b": ROWS[27:30], "c": ROWS[30:42]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, rows in {"train": ROWS[:20], **FILES}.items():
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


def named(data: Path) -> dict:
    return {
        "easy": [{"path": str(data / "a.jsonl")}, {"path": str(data / "b.jsonl"), "name": "others"}],
        "hard": [{"path": str(data / "c.jsonl")}],
    }


def config(folder: Path, data: Path, evaluated, **settings) -> Path:
    folder.mkdir(exist_ok=True)
    settings = {"max_steps": 3, "eval_every": 1, **settings}
    path = tiny_config(
        folder, data / "train.jsonl", run=settings, model={"init": TEXT_MODEL}, data={"eval": evaluated},
        optim={"lr": 0.01},
    )  # fmt: skip
    return path


def evaluations(run_dir: Path) -> list[dict]:
    return [row for row in read_rows(run_dir / "metrics.jsonl") if "eval/accuracy" in row]


def numbers(row: dict) -> dict:
    """The figures of a row, without those of sources."""
    return {key: value for key, value in row.items() if isinstance(value, int | float)}


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("named")
    run(config(folder, data, named(data), eval_at_start=True, save_every=1, keep_checkpoints=9))
    return folder / "run"


def accuracy_of(model: RewardModel, rows: list[dict]) -> float:
    groups = [{"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"]]} for row in rows]
    return sum(is_right(*rewards) for rewards in model.score(groups)) / len(rows)


def test_each_set_has_the_figures_of_its_own_rows(finished):
    last = evaluations(finished)[-1]
    model = RewardModel.from_pretrained(finished / "model")
    assert last["eval/easy/accuracy"] == pytest.approx(accuracy_of(model, FILES["a"] + FILES["b"]))
    assert last["eval/hard/accuracy"] == pytest.approx(accuracy_of(model, FILES["c"]))
    assert last["eval/accuracy"] == pytest.approx(accuracy_of(model, [row for rows in FILES.values() for row in rows]))
    for figure in ("loss", "margin"):  # every preference counts 1
        parts = 10 * last[f"eval/easy/{figure}"] + 12 * last[f"eval/hard/{figure}"]
        assert last[f"eval/{figure}"] == pytest.approx(parts / 22, rel=1e-5)
    counts = {name: found["preferences"] for name, found in last["eval/sources"].items()}
    assert counts == {"a": 7, "others": 3, "c": 12}


def test_names_change_no_other_figure(finished, data, tmp_path):
    run(config(tmp_path, data, [source for some in named(data).values() for source in some], eval_at_start=True))
    listed, found = rows_without_clock(tmp_path / "run"), rows_without_clock(finished)
    assert len(listed) == len(found) == 7
    for row, other in zip(listed, found, strict=True):
        assert "eval/easy/loss" not in row
        assert row.get("eval/sources") == other.get("eval/sources")
        assert {key: other[key] for key in numbers(row)} == pytest.approx(numbers(row), rel=1e-6, abs=1e-6)
    manifest = read_manifest(tmp_path / "run" / "prepared")
    assert "sets" not in manifest["splits"]["eval"], "manifests of sets without names are as they were"
    with_names = read_manifest(finished / "prepared")
    assert with_names["splits"]["eval"] == manifest["splits"]["eval"] | {"sets": {"easy": 10, "hard": 12}}
    assert with_names["splits"]["train"] == manifest["splits"]["train"]


def test_the_evaluation_before_the_first_step_is_that_of_the_weights_before_it(finished, data, tmp_path):
    rows = evaluations(finished)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert (finished / "checkpoints" / "step-00000000").is_dir(), "it may be the best one"
    path = config(tmp_path, data, named(data), max_steps=1, eval_every=1)
    run(path, "optim.lr=1e-30")
    unmoved = evaluations(tmp_path / "run")[-1]
    assert unmoved["eval/sources"] == rows[0]["eval/sources"]
    assert numbers(unmoved) | {"step": 0, "preferences": 0} == pytest.approx(numbers(rows[0]))


def test_a_run_that_stopped_after_any_step_goes_on_to_the_bit(finished, data, tmp_path):
    path = config(tmp_path, data, named(data), eval_at_start=True)
    for step in range(3):
        start = finished / "checkpoints" / f"step-{step:08d}"
        copy = Path(shutil.copytree(finished, tmp_path / str(step)))
        run(path, f"run.dir={copy}", resume=str(start))
        assert_same(copy, outcome(finished))


def test_a_part_of_each_set_is_the_same_groups_every_time(finished, data, tmp_path):
    run(config(tmp_path, data, named(data), eval_groups=4))
    manifest = read_manifest(tmp_path / "run" / "prepared")
    whole = PreparedSet(tmp_path / "run" / "prepared", "eval", manifest, load_config(tmp_path / "config.yaml"))
    parts = whole.parts(4)
    assert {name: len(part) for name, part in parts.items()} == {"easy": 4, "hard": 4}
    drawn = {name: [part.members(number) for number in range(4)] for name, part in parts.items()}
    everything = [whole.members(number) for number in range(len(whole))]
    assert all(members in everything[:10] for members in drawn["easy"])
    assert all(members in everything[10:] for members in drawn["hard"])
    assert drawn == {name: [part.members(n) for n in range(4)] for name, part in whole.parts(4).items()}
    assert drawn["hard"] != everything[10:14], "they are drawn, not the first ones"
    assert [len(part) for part in whole.parts(100).values()] == [10, 12]
    rows = {row["id"]: row for row in ROWS}
    model = RewardModel.from_pretrained(tmp_path / "run" / "model")
    picked = [rows[record_id] for ((_, _, record_id),) in drawn["hard"]]
    last = evaluations(tmp_path / "run")[-1]
    assert last["eval/hard/accuracy"] == pytest.approx(accuracy_of(model, picked))
    assert sum(found["preferences"] for found in last["eval/sources"].values()) == 8


def test_what_training_holds_out_is_a_set_of_its_own(data, tmp_path):
    path = config(tmp_path, data, named(data), max_steps=1)
    run(path, "data.train.0.held_out=5", "run.early_stopping={metric: eval/held_out/loss}")
    sets = read_manifest(tmp_path / "run" / "prepared")["splits"]["eval"]["sets"]
    assert sets == {"easy": 10, "hard": 12, "held_out": 5}
    assert "eval/held_out/margin" in evaluations(tmp_path / "run")[-1]


def test_the_best_step_of_one_set_may_be_chosen(finished, data, tmp_path):
    path = config(tmp_path, data, named(data), early_stopping={"metric": "eval/hard/loss", "patience": 9})
    summary = run(path)
    assert summary["best_value"] == min(row["eval/hard/loss"] for row in evaluations(tmp_path / "run"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["run.early_stopping={metric: eval/hrad/loss}"],
            "got 'eval/hrad/loss', which no evaluation makes; there are eval/accuracy, eval/loss, eval/margin, "
            "eval/easy/accuracy, eval/easy/loss",
        ),
        (["data.eval={held_out: [{path: x}]}"], "data.eval.held_out: is the name of what data.train holds out"),
        (["data.eval={a: [{path: x, repeat: 2}]}"], "data.eval.a.0: repeat and held_out are for data.train"),
        (["data.eval={a: [{pth: x}]}"], "unknown key data.eval.a.0.pth; did you mean data.eval.a.0.path?"),
        (["data.eval=[{pth: x}]"], "unknown key data.eval.0.pth; did you mean data.eval.0.path?"),
        (["data.eval={a/b: [{path: x}]}"], "data.eval.a/b: got 'a/b'"),
        (["data.eval={a: []}"], "data.eval.a: got []"),
        (["data.eval={a: {path: x}}"], "data.eval.a: got {'path': 'x'}; input should be a valid list"),
        (["data.eval=x"], "data.eval: got 'x'; input should be a valid list"),
        (["run.eval_groups=0"], "run.eval_groups: got 0"),
        (["run.eval_at_start=true", "data.eval=[]"], "run.eval_at_start needs evaluations, and there is no data.eval"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(data, tmp_path, overrides, message):
    with pytest.raises(ConfigError) as error:
        load_config(config(tmp_path, data, named(data)), overrides)
    assert message in str(error.value)
    assert "<" not in str(error.value)


def test_a_set_without_a_usable_row_is_named(data, tmp_path):
    empty = write_rows(tmp_path / "empty.jsonl", [{"prompt": "x", "responses": ["a"]}])
    with pytest.raises(DataError, match=r"data\.eval\.none: no usable group"):
        run(config(tmp_path, data, {**named(data), "none": [{"path": str(empty)}]}))


def test_other_sets_or_another_part_on_resume_compare_anew(finished, data, tmp_path):
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    path = config(tmp_path, data, named(data), eval_at_start=True)
    start = str(copy / "checkpoints" / "step-00000002")
    summary = run(path, f"run.dir={copy}", "run.eval_groups=3", resume=start)
    assert summary["best_checkpoint"] in ("step-00000002", "step-00000003"), "not one of before"
    found = evaluations(copy)
    assert [row["step"] for row in found][-1] == 3
    assert sum(one["preferences"] for one in found[-1]["eval/sources"].values()) == 6
