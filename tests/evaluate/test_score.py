"""Scoring through Python and through files: the same rewards, whatever is packed with them."""

import dataclasses
import inspect
import json
import shutil

import pytest
import torch
from PIL import Image

import fastrm as package
from fastrm import cli, storage
from fastrm.commands import rewards as commands
from fastrm.config import Config, load_config
from fastrm.data.template import ConversationEncoder
from fastrm.errors import ConfigError, DataError, StorageError
from fastrm.evaluate import files
from fastrm.evaluate.accuracy import PairAccuracy, wilson_interval
from fastrm.evaluate.ensemble import Ensemble
from fastrm.evaluate.options import ModelChoice, Outputs, ScoringOptions
from fastrm.limits import MediaLimits
from fastrm.model.export import save_model
from fastrm.train.loop import train
from tests.helpers.runs import colour_rows, fastrm, tiny_config, write_rows
from tests.helpers.support import make_model, make_record


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    train(load_config(tiny_config(folder, colour_rows(folder), run={"max_steps": 3})))
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return package.RewardModel.from_pretrained(folder / "run" / "model")


def groups_of(folder):
    rows = [json.loads(line) for line in (folder / "colours.jsonl").read_text().splitlines()]
    return [{**row, "images": [str(folder / name) for name in row["images"]]} for row in rows]


def test_alone_and_in_a_batch_give_the_same_rewards(folder, model):
    groups = groups_of(folder)
    together = model.score(groups)
    assert [len(rewards) for rewards in together] == [len(group["responses"]) for group in groups]
    for group, rewards in zip(groups[:6], together, strict=False):
        alone = model.score([group])[0]
        each = [model.score([{**group, "responses": [r], "preferences": None}])[0][0] for r in group["responses"]]
        assert max(abs(a - b) for a, b in zip(alone, rewards, strict=True)) <= 1e-5
        assert max(abs(a - b) for a, b in zip(each, rewards, strict=True)) <= 1e-5


def test_order_of_groups_does_not_matter(folder, model):
    groups = groups_of(folder)
    backwards = model.score(groups[::-1])[::-1]
    assert all(
        abs(a - b) <= 1e-5
        for x, y in zip(model.score(groups), backwards, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_paths_bytes_and_pil_images_are_the_same(folder, model):
    path = folder / "images" / "0.png"
    group = {"prompt": "Which colour?", "responses": ["red", "blue"]}
    scores = [
        model.score([{**group, "images": [image]}])[0] for image in (str(path), path.read_bytes(), Image.open(path))
    ]
    assert scores[0] == scores[1] == scores[2]
    assert model.score([group])[0] != scores[0]


def test_messages_and_a_plain_prompt_are_the_same(model):
    plain = {"prompt": "Which colour?", "responses": ["red"]}
    messages = {"prompt": [{"role": "user", "content": "Which colour?"}], "responses": ["red"]}
    assert model.score([plain]) == model.score([messages])


def test_a_group_that_cannot_be_scored_is_named(model):
    good = {"prompt": "a", "responses": ["b"]}
    with pytest.raises(DataError, match=r"group 1: .*IMAGE_MISSING"):
        model.score([good, {**good, "images": ["/nowhere.png"]}])
    with pytest.raises(DataError, match=r"group 0: the group has .* tokens, limit 8"):
        model.score([good], tokens_per_pack=8)


def test_bf16_rounds_the_backbone_but_not_the_reward_nor_the_rotary_frequencies(folder, model):
    half = package.RewardModel.from_pretrained(folder / "run" / "model", dtype="bf16")
    groups = groups_of(folder)
    exact, rounded = (
        torch.tensor([reward for rewards in m.score(groups) for reward in rewards]) for m in (model, half)
    )
    assert {p.dtype for p in half.network.model.parameters()} == {torch.bfloat16}
    # Of float32 values one in 65,536 happens to be a bf16 value.
    assert (rounded.bfloat16().float() == rounded).float().mean() < 0.1
    error = (rounded - exact).abs().max()
    assert 0 < error < 0.25 * exact.std(), (error, exact)
    frequencies = dict(model.network.named_buffers())
    assert any("inv_freq" in name for name in frequencies)
    assert all(torch.equal(buffer, frequencies[name]) for name, buffer in half.network.named_buffers())


def test_a_replaced_image_file_is_read_anew(folder, model, tmp_path):
    path = tmp_path / "picture.png"
    shutil.copy(folder / "images" / "0.png", path)
    group = {"prompt": "Which colour?", "images": [str(path)], "responses": ["red", "blue"]}
    before = model.score([group])
    Image.new("RGB", (84, 28), "green").save(path)
    assert model.score([group]) != before
    assert model.score([group]) == model.score([{**group, "images": [path.read_bytes()]}])


def test_workers_change_no_reward(folder, model):
    groups = groups_of(folder)[:8]
    budget = 512
    assert model.score(groups, tokens_per_pack=budget, num_workers=2) == model.score(groups, tokens_per_pack=budget)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"dtype": "bf17"}, "dtype: got 'bf17', wanted one of auto, fp32, bf16, fp16"),
        ({"device": "gpu"}, "device: got 'gpu', wanted one of auto, cpu, cuda, cuda:0, cuda:1 ..."),
        ({"device": "cuda:1"}, "device cuda:1: torch finds no CUDA device; use cpu, or install a CUDA build of torch"),
        ({"attention": "fast"}, "attention: got 'fast', wanted one of auto, sdpa, flash, flash_attn, triton"),
    ],
    ids=["dtype", "device", "no GPU", "attention"],
)
def test_a_setting_that_does_not_exist_is_refused(folder, setting, message):
    with pytest.raises(ConfigError) as error:
        package.RewardModel.from_pretrained(folder / "run" / "model", **setting)
    assert str(error.value) == message


@pytest.mark.parametrize("command", ["score", "eval"])
@pytest.mark.parametrize(
    ("option", "choices"), [("--dtype=bf17", "auto fp32 bf16"), ("--device=gpu", "auto cpu cuda")], ids=str
)
def test_a_choice_that_does_not_exist_is_a_usage_error(monkeypatch, capsys, tmp_path, command, option, choices):
    out = ["--out", str(tmp_path / "out")] if command == "score" else []
    monkeypatch.setattr("sys.argv", ["fastrm", command, "model", "data.jsonl", *out, option])
    with pytest.raises(SystemExit) as leave:
        cli.main()
    assert leave.value.code == 64
    message = json.loads(capsys.readouterr().err.splitlines()[-1])["message"]
    assert all(choice in message for choice in choices.split())


@pytest.mark.parametrize("limit", ["max_image_pixels", "max_image_bytes"])
def test_image_limits_can_be_set(folder, limit):
    limits = MediaLimits(**{limit: 50})
    limited = package.RewardModel.from_pretrained(folder / "run" / "model", limits=limits)
    group = {"prompt": "Which colour?", "images": [str(folder / "images" / "0.png")], "responses": ["red"]}
    with pytest.raises(DataError, match=f"limit .*raise data.{limit}.*IMAGE_TOO_LARGE"):
        limited.score([group])
    out = folder / f"{limit}.jsonl"
    with pytest.raises(DataError, match=r"no group has rewards; first: .*colours\.jsonl:1: .*limit"):
        files.score_file(chosen(folder / "run" / "model"), str(folder / "colours.jsonl"), out, options(limits=limits))
    assert all(json.loads(line)["error"]["code"] == "IMAGE_TOO_LARGE" for line in out.read_text().splitlines())


def test_the_commands_defaults_are_those_of_the_api_and_of_training():
    of_training = Config.model_validate({"model": {"path": "m"}, "data": {"train": [{"path": "t"}]}})
    assert inspect.signature(package.RewardModel.score).parameters["tokens_per_pack"].default == 32768
    for command in (commands.score, commands.evaluate):
        defaults = {name: p.default for name, p in inspect.signature(command).parameters.items()}
        assert defaults["tokens_per_pack"] == of_training.data.max_tokens_per_group == 32768
        limits = [field.name for field in dataclasses.fields(MediaLimits)]
        assert MediaLimits(**{name: defaults[name] for name in limits}) == MediaLimits() == of_training.data.limits
        assert defaults["num_workers"] == 1


def evaluate_into(choice, data, out, options):
    """`evaluate_file` with its figures as the one output, called as `score_file` is."""
    files.evaluate_file(choice, data, Outputs(out), options)


def chosen(*models, **settings) -> ModelChoice:
    return ModelChoice(models, **settings)


def options(**changes) -> ScoringOptions:
    usual = {"tokens_per_pack": 2048, "num_workers": 0, "device": "cpu", "dtype": "fp32"}
    return ScoringOptions(**usual | changes)


@pytest.mark.parametrize("run", [files.score_file, evaluate_into], ids=["score", "eval"])
def test_an_output_that_cannot_be_made_fails_before_the_work(tmp_path, run):
    """The model and the data do not exist either: what is named is what was looked at first."""
    with pytest.raises(StorageError, match=f"there is no folder {tmp_path}/none; make it"):
        run(chosen(tmp_path / "model"), "data.jsonl", tmp_path / "none" / "out", options())
    with pytest.raises(StorageError, match="is a folder"):
        run(chosen(tmp_path / "model"), "data.jsonl", tmp_path, options())


@pytest.mark.parametrize("run", [files.score_file, evaluate_into], ids=["score", "eval"])
@pytest.mark.parametrize("error", [OSError(5, "broken disk of images"), KeyboardInterrupt()], ids=["io", "ctrl-c"])
def test_an_error_while_scoring_leaves_no_file_and_keeps_its_name(folder, tmp_path, monkeypatch, run, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(Ensemble, "score_records", fail)
    with pytest.raises(type(error)) as raised:
        run(chosen(folder / "run" / "model"), str(folder / "colours.jsonl"), tmp_path / "out", options())
    assert raised.value is error
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named_and_leaves_no_file(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "replace", full)
    with pytest.raises(StorageError, match=f"{tmp_path}/out: cannot be written: No space left"):
        files.score_file(chosen(folder / "run" / "model"), str(folder / "colours.jsonl"), tmp_path / "out", options())
    assert not list(tmp_path.iterdir())


def test_evaluation_as_json_counts_what_scoring_orders(folder, model):
    data, out = folder / "colours.jsonl", folder / "eval.json"
    evaluate_into(chosen(folder / "run" / "model"), str(data), out, options())
    report = json.loads(out.read_text())
    groups = groups_of(folder)
    pairs = [
        (rewards[winner], rewards[loser])
        for group, rewards in zip(groups, model.score(groups), strict=True)
        for winner, loser in group["preferences"]
    ]
    assert report["preferences"] == len(pairs)
    assert report["accuracy"] == pytest.approx(sum(a > b for a, b in pairs) / len(pairs))
    assert set(report["sources"]) == {"two", "three"}


def test_a_preference_between_equal_tokens_is_named_and_not_counted(tmp_path, capsys):
    """As in training: a template that trims makes one response of both, whose rewards no model can tell apart."""
    network = make_model("qwen2")
    trims = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    network.encoder.tokenizer.chat_template = trims
    network.encoder = ConversationEncoder(network.encoder.tokenizer, None)
    save_model(network, tmp_path / "model")
    rows = [{"prompt": "a", "chosen": "yes", "rejected": rejected} for rejected in ("yes\n", "no", "blue")]
    data, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out.json"
    evaluate_into(chosen(tmp_path / "model"), str(data), out, options())
    report = json.loads(out.read_text())
    assert report["preferences"] == 2
    assert [row["code"] for row in report["refused"]] == ["IDENTICAL_RESPONSES"]
    assert f"{data}:1: response 0 is preferred to response 1" in report["refused"][0]["message"]
    assert "rows not counted: IDENTICAL_RESPONSES 1" in " ".join(capsys.readouterr().out.split())
    files.score_file(chosen(tmp_path / "model"), str(data), tmp_path / "scores", options())
    first, *_ = map(json.loads, (tmp_path / "scores").read_text().splitlines())
    assert first["rewards"][0] == first["rewards"][1]


def test_files_give_one_line_per_row_in_order(folder):
    rows = [json.loads(line) for line in (folder / "colours.jsonl").read_text().splitlines()][:5]
    rows.insert(2, '{"id": "broken"')
    rows.insert(4, {"id": "empty", "prompt": "a", "responses": ["b", ""]})
    rows.insert(5, {"id": "blind", "prompt": "a", "images": ["no.png"], "responses": ["b"]})
    data = write_rows(folder / "score.jsonl", rows)
    result = fastrm("score", folder / "run" / "model", data, "--out", folder / "out.jsonl")
    assert result.returncode == 0, result.stderr
    assert f"8 groups: 6 scored, 2 refused; {folder / 'out.jsonl'}" in result.stderr
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines if "error" not in line] == ["c0", "c1", "c2", "empty", "c3", "c4"]
    assert [n for n, line in enumerate(lines) if line["rewards"] is None] == [2, 5]
    assert [lines[n]["error"]["code"] for n in (2, 5)] == ["BAD_JSON", "IMAGE_MISSING"]
    assert "no.png" in lines[5]["error"]["message"] and len(lines[4]["rewards"]) == 2
    assert not (folder / "out.jsonl.part").exists()


def test_scoring_without_a_reward_is_an_error_that_says_why(folder, tmp_path):
    """The file is still written where there were groups, since it holds the reason of each."""
    model, out = folder / "run" / "model", tmp_path / "out.jsonl"
    blind = write_rows(tmp_path / "blind.jsonl", [{"prompt": "a", "images": ["no.png"], "responses": ["b"]}])
    result = fastrm("score", model, blind, "--out", out)
    assert result.returncode == 65
    assert f"1 group: 0 scored, 1 refused; {out}" in result.stderr
    last = json.loads(result.stderr.splitlines()[-1])["message"]
    assert last.startswith(f"{blind}: no group has rewards; first: {blind}:1: ") and "no.png" in last
    assert json.loads(out.read_text())["error"]["code"] == "IMAGE_MISSING"
    (tmp_path / "empty.jsonl").write_text("")
    for run in (files.score_file, evaluate_into):
        with pytest.raises(DataError, match=r"empty\.jsonl: it has no rows; name a file with a row for each prompt"):
            run(chosen(model), str(tmp_path / "empty.jsonl"), tmp_path / "none.jsonl", options())
    assert not (tmp_path / "none.jsonl").exists()


def test_ids_that_repeat_are_named_once(folder, tmp_path, capsys):
    """A join of rewards by id would take another group's."""
    rows = [{"id": name, "prompt": "a", "responses": ["b"]} for name in (7, 8, "7", 7, 9, 9)]
    data, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    files.score_file(chosen(folder / "run" / "model"), str(data), out, options())
    said = " ".join(capsys.readouterr().err.split())
    assert "out.jsonl: 7, 9; join by the number of the line, or mend the ids" in said
    unnamed = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "responses": ["b"]}] * 2)
    files.score_file(chosen(folder / "run" / "model"), str(unnamed), out, options())
    assert "join by" not in capsys.readouterr().err


def test_a_folder_that_is_no_reward_model_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="wanted the model/ folder of a run"):
        package.RewardModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(StorageError, match=r"the weights cannot be loaded: wanted model.safetensors"):
        package.RewardModel.from_pretrained(tmp_path)


def test_an_export_loads_without_a_warning_about_its_configuration(folder, monkeypatch):
    """One label, and its name: `num_labels` 1 beside transformers' default of two names would warn at every load."""
    from transformers import configuration_utils

    said = []
    monkeypatch.setattr(configuration_utils.logger, "warning", lambda text, *_: said.append(text))
    package.RewardModel.from_pretrained(folder / "run" / "model")
    assert said == []


def test_a_damaged_model_is_refused(folder, tmp_path):
    shutil.copytree(folder / "run" / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(StorageError, match=r"model.safetensors: has [\d,]+ bytes, its header says .* cut off"):
        package.RewardModel.from_pretrained(tmp_path / "model")


def test_equal_rewards_are_wrong_and_ties_are_left_out():
    accuracy = PairAccuracy()
    accuracy.add(make_record(0, num_responses=3), [1.0, 1.0, 0.0])
    report = accuracy.report()
    assert (report["accuracy"], report["preferences"]) == (2 / 3, 3)


def test_the_interval_is_wilsons():
    """Reference values worked out by hand from the formula."""
    low, high = wilson_interval(8, 10)
    assert low == pytest.approx(0.4902, abs=5e-5) and high == pytest.approx(0.9433, abs=5e-5)
    assert wilson_interval(0, 10)[0] == 0.0 and wilson_interval(10, 10)[1] == pytest.approx(1.0)
