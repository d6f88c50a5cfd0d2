"""A reward that is not a finite number is refused by name, and every JSON file parses with a strict parser."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastrm as package
from fastrm.config import load_config
from fastrm.data.sources.layouts.groups import group_record
from fastrm.data.sources.values import check_number
from fastrm.errors import DataError, RecordError
from fastrm.evaluate.command import evaluate_benchmark
from fastrm.evaluate.ensemble import Ensemble
from fastrm.evaluate.files import evaluate_file, score_file
from fastrm.evaluate.options import ModelChoice, Outputs, ScoringOptions
from fastrm.evaluate.reward_model import RewardModel
from fastrm.json_files import to_json
from fastrm.train.engine import LocalEngine
from fastrm.train.loop import train
from fastrm.train.setup import finite
from tests.helpers.project import PROJECT
from tests.helpers.runs import fastrm, text_rows, tiny_config, write_rows
from tests.helpers.support import make_model

OPTIONS = ScoringOptions(
    tokens_per_pack=2048, num_workers=0, device="cpu", dtype="fp32",
)  # fmt: skip
SCALES = {"a weight that is none": float("nan"), "a head too large": float("inf")}


def strictly(text: str):
    """As parsers of other languages read it."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def assert_strict(folder: Path) -> set[str]:
    """Every JSON file below a folder; returns their names."""
    found = set()
    for path in folder.rglob("*.json*"):
        if path.is_file():
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            for line in lines:
                strictly(line)
            found.add(path.name)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    rows = write_rows(folder / "rows.jsonl", text_rows(12))
    train(load_config(tiny_config(folder, rows, run={"max_steps": 2})))
    weights = load_file(folder / "run" / "model" / "model.safetensors")
    for name, scale in SCALES.items():
        broken = {**weights, "score.0.weight": weights["score.0.weight"] * scale}
        save(folder, name, broken)
    # Only prompts with this token are affected: the others have rewards.
    (embeddings,) = [name for name in weights if name.endswith("embed_tokens.weight")]
    save(folder, "partly", {**weights, embeddings: spoilt(folder, weights[embeddings])})
    return folder


def save(folder, name, weights):
    model = folder / name.replace(" ", "-")
    model.mkdir()
    for file in (folder / "run" / "model").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def spoilt(folder, table):
    tokenizer = RewardModel.from_pretrained(folder / "run" / "model").network.encoder.tokenizer
    table = table.clone()
    table[tokenizer("Z", add_special_tokens=False)["input_ids"]] = float("nan")
    return table


GROUPS = [
    {"id": "fine", "prompt": "Is 1 even?", "responses": ["no", "yes"], "preferences": [[0, 1]]},
    {"id": "odd", "prompt": "Is 2 even?", "responses": ["Z", "yes"], "preferences": [[1, 0]]},
    {"id": "last", "prompt": "Is 3 even?", "responses": ["no", "yes"], "preferences": [[0, 1]]},
]


def test_score_writes_no_such_reward_and_ends_with_65(folder, tmp_path):
    data, out = write_rows(tmp_path / "g.jsonl", GROUPS), tmp_path / "out.jsonl"
    result = fastrm("score", folder / "a-head-too-large", data, "--out", out)
    assert result.returncode == 65, result.stderr
    lines = [strictly(line) for line in out.read_text().splitlines()]
    assert [(line["rewards"], line["error"]["code"]) for line in lines] == [(None, "NON_FINITE_REWARD")] * 3
    assert "3 of 3 groups have a reward that is not finite" in result.stderr and "g.jsonl:1" in result.stderr


def test_score_refuses_the_group_alone(folder, tmp_path):
    data, out = write_rows(tmp_path / "g.jsonl", GROUPS), tmp_path / "out.jsonl"
    with pytest.raises(DataError, match=r"1 of 3 groups .*g.jsonl:2: a reward is nan"):
        score_file(ModelChoice((folder / "partly",)), str(data), out, OPTIONS)
    lines = [strictly(line) for line in out.read_text().splitlines()]
    assert [line["rewards"] is None for line in lines] == [False, True, False]
    model = RewardModel.from_pretrained(folder / "partly")
    groups = [{key: group[key] for key in ("id", "prompt", "responses")} for group in GROUPS]
    first, odd, last = model.score(groups, on_error="return")
    assert [first, last] == [lines[0]["rewards"], lines[2]["rewards"]]
    assert odd.code == "NON_FINITE_REWARD" and "a reward is nan" in odd.message
    with pytest.raises(package.GroupError, match=r'group 1 \("odd"\)'):
        model.score(groups)


@pytest.mark.parametrize("model", ["partly", "a-weight-that-is-none"])
def test_eval_has_no_figures(folder, model, tmp_path, capsys):
    data, out = write_rows(tmp_path / "g.jsonl", GROUPS), tmp_path / "eval.json"
    with pytest.raises(DataError, match=r"g.jsonl:\d: a reward is nan.*NON_FINITE_REWARD"):
        evaluate_file(ModelChoice((folder / model,)), str(data), Outputs(out), OPTIONS)
    assert "accuracy" not in capsys.readouterr().out and not out.exists()


def test_eval_names_the_row_of_every_refusal(folder, tmp_path):
    rows = [GROUPS[0], {**GROUPS[0], "images": ["no.png"]}, '{"torn"']
    data, out = write_rows(tmp_path / "g.jsonl", rows), tmp_path / "eval.json"
    evaluate_file(ModelChoice((folder / "run" / "model",)), str(data), Outputs(out), OPTIONS)
    refused = strictly(out.read_text())["refused"]
    assert [row["code"] for row in refused] == ["IMAGE_MISSING", "BAD_JSON"]
    assert [f"g.jsonl:{number}" in row["message"] for number, row in zip((2, 3), refused, strict=True)] == [True, True]


def test_a_benchmark_names_the_row_and_its_figures_are_partial(folder, tmp_path, capsys):
    three = [["yes"] * 3, ["no"] * 3]
    rows = [{"id": n, "prompt": "p", "chosen": three[0], "rejected": three[1], "domain": "math"} for n in range(2)]
    rows[1] = {**rows[1], "prompt": "Z"}
    data = tmp_path / "total_dataset.json"
    data.write_text(json.dumps(rows))
    choice, outputs = ModelChoice((folder / "partly",)), Outputs(json=tmp_path / "out.json")
    with pytest.raises(DataError, match="partial result over 1 of 2 rows"):
        evaluate_benchmark(choice, "rm_bench", str(data), OPTIONS, outputs)
    said = capsys.readouterr().err
    assert "NON_FINITE_REWARD" in said and "total_dataset.json:2" in said
    found = strictly((tmp_path / "out.json").read_text())
    assert found["partial"] and found["scored"] == 1


def test_an_ensemble_takes_no_such_reward_of_a_member(folder):
    good, broken = (RewardModel.from_pretrained(folder / name) for name in ("run/model", "partly"))
    groups = [{key: group[key] for key in ("prompt", "responses")} for group in GROUPS]
    first, odd, last = Ensemble([good, broken]).score(groups, on_error="return")
    assert len(first) == len(last) == 2 and odd.code == "NON_FINITE_REWARD"


def test_weights_of_an_ensemble_are_not_taken_from_such_rewards(folder, tmp_path):
    data = write_rows(tmp_path / "g.jsonl", GROUPS)
    choice = ModelChoice((folder / "run" / "model", folder / "partly"), combine="margin", validation=str(data))
    with pytest.raises(DataError, match=r"g\.jsonl:2: a reward is nan"):
        evaluate_file(choice, str(data), Outputs(), OPTIONS)


def test_the_check_is_one_look_at_each_pack(monkeypatch):
    looks = []
    original = torch.Tensor.isfinite
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda self: looks.append(1) or original(self))
    RewardModel(make_model("qwen2")).score([{"prompt": f"{n}", "responses": ["a", "b"]} for n in range(9)])
    assert len(looks) == 1


def test_an_evaluation_during_training_stops_the_run_with_a_checkpoint(tmp_path, monkeypatch):
    original = LocalEngine.rewards
    monkeypatch.setattr(LocalEngine, "rewards", lambda self, pack: original(self, pack) * float("nan"))
    rows = write_rows(tmp_path / "rows.jsonl", text_rows(12))
    config = load_config(tiny_config(tmp_path, rows, rows, run={"max_steps": 4, "eval_every": 2}))
    with pytest.raises(DataError, match=r"evaluation, .*rows.jsonl:\d+: a reward is nan.*NON_FINITE_REWARD"):
        train(config)
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()
    assert assert_strict(tmp_path / "run") >= {"metrics.jsonl", "state.json"}
    assert "eval/accuracy" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_run_with_a_skipped_step_leaves_json_and_averages_the_others(tmp_path, monkeypatch):
    original, calls = LocalEngine.loss_and_rewards, []

    def poisoned(self, pack):
        calls.append(1)
        loss, rewards = original(self, pack)
        spoil = float("inf") if len(calls) in (2, 3) else 1.0
        return loss * spoil, rewards * spoil

    monkeypatch.setattr(LocalEngine, "loss_and_rewards", poisoned)
    rows = write_rows(tmp_path / "rows.jsonl", text_rows(48))
    train(load_config(tiny_config(tmp_path, rows, rows, run={"max_steps": 6, "log_every": 2, "save_every": 1})))
    names = assert_strict(tmp_path / "run")
    assert names >= {"metrics.jsonl", "summary.json", "incidents.jsonl", "state.json", "manifest.json", "config.json"}
    logged = [strictly(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in logged if "loss" in row]
    assert len(losses) == 3 and all(0 < loss < 10 for loss in losses)


def test_a_run_logs_no_loss_where_no_step_was_finite(tmp_path, monkeypatch):
    original, calls = LocalEngine.loss_and_rewards, []

    def poisoned(self, pack):
        calls.append(1)
        loss, rewards = original(self, pack)
        return loss * (float("nan") if len(calls) == 2 else 1.0), rewards

    monkeypatch.setattr(LocalEngine, "loss_and_rewards", poisoned)
    rows = write_rows(tmp_path / "rows.jsonl", text_rows(48))
    train(load_config(tiny_config(tmp_path, rows, run={"max_steps": 3})))
    assert_strict(tmp_path / "run")
    logged = [strictly(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] is None for row in logged] == [False, True, False]
    assert (tmp_path / "run" / "report.png").stat().st_size > 0


def test_a_model_that_is_not_finite_is_not_exported(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", text_rows(8))
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    train(load_config(tiny_config(first, rows, run={"max_steps": 1})))
    model = first / "run" / "model"
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if "down_proj" in name)
    weights[name][0, 0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    settings = {"path": str(model), "init": None, "tokenizer": None}
    config = tiny_config(second, rows, run={"max_steps": 1}, model=settings)
    with pytest.raises(DataError, match=r"down_proj\.weight: 1 of [\d,]+ weights are not finite"):
        train(load_config(config))
    assert not (second / "run" / "model").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_found_wherever_it_stands(dtype, value):
    """In any lane of a vector register, and in what is left behind the last whole one."""
    for size in (1, 7, 16, 33, 4099):
        weight = torch.linspace(-2, 2, size).to(dtype)
        assert [name for name, _ in finite([("weight", weight)])] == ["weight"]
        for place in {0, size // 3, size // 2, size - 1}:
            bad = weight.clone()
            bad[place] = value
            with pytest.raises(DataError, match="weight: 1 of"):
                list(finite([("weight", bad)]))


@pytest.mark.parametrize("margin", [1e300, -3.5e38, float("nan"), float("inf"), 10**400])
def test_a_margin_that_float32_cannot_hold_is_refused_when_the_row_is_read(margin):
    group = {"prompt": "a", "responses": ["b", "c"], "preferences": [[0, 1, margin]]}
    with pytest.raises(RecordError, match=r"wanted a finite number of at most 3\.403e\+38") as caught:
        group_record(group, 0, require_preferences=True)
    assert caught.value.code == "BAD_PREFERENCE"


def test_the_largest_margin_is_that_of_float32():
    largest = torch.finfo(torch.float32).max
    assert check_number(largest, "margin") == largest and torch.tensor(largest, dtype=torch.float32).isfinite()


def test_a_number_that_is_not_finite_is_null_in_json():
    value = {"a": float("nan"), "b": [float("inf"), 1.5, (-float("inf"), "NaN")], "c": {"d": None}}
    assert strictly(to_json(value)) == {"a": None, "b": [None, 1.5, [None, "NaN"]], "c": {"d": None}}
    assert to_json({"b": 1, "a": 0.1}, sort_keys=True, separators=(",", ":")) == '{"a":0.1,"b":1}'


def test_json_for_files_is_made_in_one_place():
    """The others make texts that are hashed, rendered, sent or shown, and no file."""
    writes = re.compile(r"json\.dumps?\(")
    found = {path.name for path in (PROJECT / "fastrm").rglob("*.py") if writes.search(path.read_text())}
    sent_or_hashed = {"wire.py", "math_check.py", "samples.py", "dispatch.py", "connections.py"}
    assert found <= {"json_files.py", "rendering.py", "values.py", "keys.py", "clock.py"} | sent_or_hashed
