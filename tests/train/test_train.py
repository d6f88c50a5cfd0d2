"""Training runs end to end: what they leave behind, and what bad input does to them."""

import importlib.metadata
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import fastrm as package
from fastrm.config import load_config
from fastrm.errors import ConfigError, DataError, DivergedError, StorageError
from fastrm.train.metrics import read_rows
from fastrm.train.run import StepGuard
from tests.helpers.image_files import png_header
from tests.helpers.runs import colour_rows, fastrm, run, text_rows, tiny_config, write_rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run on the digits, with evaluation."""
    folder = tmp_path_factory.mktemp("finished")
    path = tiny_config(folder, "digits:train", "digits:eval", run={"max_steps": 4, "eval_every": 2})
    return folder / "run", run(path)


def test_a_run_leaves_everything_behind(finished):
    folder, summary = finished
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "report.png", "checkpoints", "model"} <= names
    assert summary == json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["quarantined"] == 0
    assert 0 <= summary["eval_accuracy"] <= 1
    assert 32 <= summary["preferences"] <= 4 * 10
    assert summary["tokens_unshared"] > 1.5 * summary["tokens_processed"] > 0
    assert summary["preferences_per_second"] > 0 and summary["peak_memory_bytes"] > 2**20
    assert summary["versions"]["torch"] == torch.__version__
    assert Image.open(folder / "report.png").size[0] > 800
    assert load_config(folder / "config.yaml").run.max_steps == 4


def test_a_source_tree_that_was_never_installed_trains_to_its_end(tmp_path, monkeypatch):
    find = importlib.metadata.Distribution.from_name

    def find_others(name):
        if name == "fastrm":
            raise importlib.metadata.PackageNotFoundError(name)
        return find(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", find_others)
    summary = run(tiny_config(tmp_path, "digits:train", "digits:eval", run={"max_steps": 1, "save_every": 1}))
    saved = json.loads((tmp_path / "run" / "checkpoints" / "step-00000001" / "state.json").read_text())
    assert saved["versions"] == summary["versions"]
    assert summary["versions"]["fastrm"] == package.__version__ and summary["versions"]["torch"] == torch.__version__


def test_metrics_have_the_fields_names(finished):
    rows = read_rows(finished[0] / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    wanted = {
        "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "grad_norm", "lr",
        "preferences_per_second", "tokens_per_second", "data_wait_share", "sharing_factor", "epoch",
        "rewards/accuracies/digits/which",
    }  # fmt: skip
    assert wanted <= steps[0].keys()
    for row in steps:
        assert abs(row["rewards/chosen"] - row["rewards/rejected"] - row["rewards/margins"]) < 1e-9
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [2, 4]


def test_the_export_has_stock_names_and_scores_like_the_run(finished):
    folder, summary = finished
    state = load_file(folder / "model" / "model.safetensors")
    assert {"score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias"} <= state.keys()
    assert any(name.startswith("visual.blocks.0.") for name in state)
    assert any(name.startswith("model.layers.0.") for name in state)
    config = json.loads((folder / "model" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLModel"] and "num_labels" not in config
    assert config["fastrm"]["anchor"] == "last_token" and config["fastrm"]["head"]["activation"] == "silu"
    result = fastrm("eval", folder / "model", "digits:eval", "--json", folder / "eval.json")
    assert result.returncode == 0, result.stderr
    report = json.loads((folder / "eval.json").read_text())
    assert report["accuracy"] == summary["eval_accuracy"]
    assert set(report["sources"]) == {"digits/which", "digits/parity", "digits/size"}
    assert "digits/parity" in result.stdout


def test_the_export_loads_in_stock_transformers(finished):
    from transformers import AutoModelForImageTextToText

    model, report = AutoModelForImageTextToText.from_pretrained(finished[0] / "model", output_loading_info=True)
    assert set(report["missing_keys"]) == {"lm_head.weight"}
    heads = {"score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias"}
    assert set(report["unexpected_keys"]) == heads | {"score.weight"}  # the last keeps stock classifiers out
    ours = package.RewardModel.from_pretrained(finished[0] / "model").network.model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in model.model.state_dict().items())


def test_a_text_model_with_a_linear_head_loads_as_a_stock_classifier(tmp_path):
    from transformers import AutoModelForSequenceClassification

    rows = write_rows(tmp_path / "t.jsonl", text_rows(20))
    text = {"model_type": "qwen2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    path = tiny_config(
        tmp_path, rows, model={"init": text, "head": {"layers": 1, "bias": False, "activation": "none"}},
        run={"max_steps": 2},
    )  # fmt: skip
    run(path)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model").eval()
    ours = package.RewardModel.from_pretrained(tmp_path / "run" / "model")
    tokenizer = ours.network.encoder.tokenizer
    messages = [{"role": "user", "content": "Is 4 even?"}, {"role": "assistant", "content": "yes it is"}]
    inputs = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), return_tensors="pt")
    expected = stock(**inputs).logits.item()
    assert abs(ours.score([{"prompt": "Is 4 even?", "responses": ["yes it is"]}])[0][0] - expected) <= 1e-5


def test_training_goes_on_from_an_exported_model_with_its_head(finished, colours, tmp_path):
    folder, _ = finished
    exported = load_file(folder / "model" / "model.safetensors")
    model = {"init": None, "tokenizer": None, "path": str(folder / "model")}
    path = tiny_config(tmp_path, colours, model=model, run={"max_steps": 1}, optim={"lr": 1e-12})
    run(path)
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert after.keys() == exported.keys()
    assert all(torch.allclose(after[name], exported[name], rtol=0, atol=1e-9) for name in exported)


def test_bad_rows_are_named_and_the_run_goes_on(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (60, 60), "red").save(images / "good.png")
    Image.new("RGB", (400, 400)).save(images / "whole.jpg", quality=95)
    (images / "cut.jpg").write_bytes((images / "whole.jpg").read_bytes()[:900])
    (images / "bomb.png").write_bytes(png_header(30_000, 30_000))
    pair = {"prompt": "What?", "chosen": "red", "rejected": "blue"}
    rows = [
        *[{**pair, "id": f"ok{n}", "image": "images/good.png", "prompt": f"What is {n}?"} for n in range(8)],
        {**pair, "id": "missing", "image": "images/none.png"},
        {**pair, "id": "cut", "image": "images/cut.jpg"},
        {**pair, "id": "cut too", "image": "images/cut.jpg", "chosen": "one that merges with it"},
        {**pair, "id": "bomb", "image": "images/bomb.png"},
        '{"id": "broken", "prompt": ',
        {**pair, "id": "empty", "chosen": ""},
        {**pair, "id": "same", "rejected": "red"},
        {**pair, "id": "typed", "image": "images/good.png", "prompt": "<|image_pad|> is typed"},
        {**pair, "id": "long", "prompt": "very long " * 3000},
    ]
    path = tiny_config(tmp_path, write_rows(tmp_path / "rows.jsonl", rows), run={"max_steps": 4})
    summary = run(path)
    quarantine = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    codes = {row["origin"].rpartition(":")[2]: row["code"] for row in quarantine}
    assert codes == {
        "9": "IMAGE_MISSING", "10": "IMAGE_DAMAGED", "11": "IMAGE_DAMAGED", "12": "IMAGE_TOO_LARGE",
        "13": "BAD_JSON", "14": "EMPTY_RESPONSE", "15": "IDENTICAL_RESPONSES", "17": "TOO_LONG",
    }  # fmt: skip
    assert summary["quarantined"] == len(quarantine) == 8
    assert summary["steps"] == 4
    long = next(row for row in quarantine if row["code"] == "TOO_LONG")
    assert "limit 2,048; raise data.max_tokens_per_group" in long["message"]


def test_an_image_that_changes_during_the_run_is_refused_by_name(tmp_path, monkeypatch):
    from fastrm.train import loop

    rows = colour_rows(tmp_path)
    original = loop.set_up

    def set_up_then_change(*arguments):
        job = original(*arguments)
        Image.new("RGB", (56, 140), "red").save(tmp_path / "images" / "5.png")
        return job

    monkeypatch.setattr(loop, "set_up", set_up_then_change)
    summary = run(tiny_config(tmp_path, rows, run={"max_steps": None, "epochs": 1}))
    quarantine = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["id"], row["code"]) for row in quarantine] == [("c5", "IMAGE_CHANGED")]
    assert summary["preferences"] == 70


def test_an_exported_head_goes_on_training_only_as_what_it_was(finished, colours, tmp_path):
    model = {"init": None, "tokenizer": None, "path": str(finished[0] / "model"), "head": {"activation": "tanh"}}
    with pytest.raises(ConfigError, match=r"model.head.activation: got 'tanh', but the reward head in .* has 'silu'"):
        run(tiny_config(tmp_path, colours, model=model))


def test_a_step_of_refused_records_only_is_not_a_divergence(tmp_path):
    rows = colour_rows(tmp_path)
    for path in (tmp_path / "images").glob("*.png"):
        path.write_bytes(path.read_bytes()[:60])  # the header, and hardly any pixels
    summary = run(tiny_config(tmp_path, rows, run={"max_steps": 5}))
    assert summary["steps"] == 5 and summary["preferences"] == 0 and summary["quarantined"] > 20
    assert not (tmp_path / "run" / "incidents.jsonl").exists()


@pytest.mark.parametrize(
    "override",
    ["model.init.text_config.hidden_size=abc", "model.init.vision_config=x", "model.init.text_config.hidden_size=-4",
     "model.init.text_config.num_attention_heads=0", "model.init.model_type=gpt2"],
)  # fmt: skip
def test_a_model_that_cannot_be_made_is_a_configuration_error(colours, tmp_path, override):
    with pytest.raises(ConfigError, match=r"model.init|model type|num_attention_heads 0"):
        run(tiny_config(tmp_path, colours), override)


def test_a_run_folder_in_use_or_used_is_refused(finished, colours, tmp_path):
    path = tiny_config(tmp_path, colours)
    with pytest.raises(ConfigError, match="holds a run already; add --resume auto"):
        run(path, f"run.dir={finished[0]}")
    with pytest.raises(ConfigError, match="--resume required, but there is no checkpoint"):
        run(path, resume="required")


def test_an_unwritable_run_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    path = tiny_config(tmp_path, "digits:train")
    with pytest.raises(StorageError, match="the run folder cannot be written"):
        run(path, f"run.dir={tmp_path / 'file' / 'run'}")


def test_two_runs_in_one_folder_the_second_is_refused(colours, tmp_path):
    code = "import sys, time; from fastrm.storage import locked_folder; from pathlib import Path\n"
    code += "with locked_folder(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    path = tiny_config(tmp_path, colours, run={"max_steps": 1})
    with pytest.raises(StorageError, match=f"in use by pid {holder.pid} on"):
        run(path)
    holder.kill()
    holder.wait()
    assert run(path)["steps"] == 1


def test_missing_data_and_unusable_data_stop_before_training(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl"):
        run(tiny_config(tmp_path, tmp_path / "none.jsonl"))
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}])
    with pytest.raises(DataError, match="no usable group in 0 records"):
        run(tiny_config(tmp_path, rows), f"run.dir={tmp_path / 'other'}")


@pytest.mark.parametrize(("first", "message"), [(1, "no step has changed a weight yet"), (4, "lower optim.lr")])
def test_a_run_that_is_not_finite_from_the_first_step_on_is_told_from_one_that_diverges(first, message):
    guard = StepGuard(None)
    for step in range(1, first):
        guard.after_step(step, True, 0.5, 1.0, [])
    with pytest.raises(DivergedError, match=message):
        for step in range(first, first + 3):
            guard.after_step(step, False, float("nan"), float("nan"), [])


def test_a_diverged_run_stops_names_its_records_and_keeps_its_weights(colours, tmp_path, monkeypatch):
    from fastrm.train.engine import LocalEngine

    original = LocalEngine.loss_and_rewards
    calls = []

    def poisoned(self, pack):
        calls.append(1)
        loss, rewards = original(self, pack)
        return loss * (float("nan") if len(calls) > 2 else 1.0), rewards

    monkeypatch.setattr(LocalEngine, "loss_and_rewards", poisoned)
    path = tiny_config(tmp_path, colours, run={"max_steps": 8, "save_every": 1, "keep_checkpoints": 9})
    with pytest.raises(DivergedError, match="loss nan and gradient norm nan are not finite"):
        run(path)
    incidents = [json.loads(line) for line in (tmp_path / "run" / "incidents.jsonl").read_text().splitlines()]
    assert [row["step"] for row in incidents] == [3, 4, 5]
    assert all("colours.jsonl:" in name for row in incidents for name in row["records"])
    good, skipped = (
        load_file(tmp_path / "run" / "checkpoints" / f"step-{n:08d}" / "model.safetensors") for n in (2, 4)
    )
    assert all(torch.equal(good[name], skipped[name]) for name in good)


@pytest.mark.parametrize(
    "arguments, code, text",
    [
        (["train", "{config}", "optim.lrr=1"], 64, "unknown key optim.lrr; did you mean optim.lr?"),
        (["train", "{folder}/none.yaml"], 64, "cannot read the configuration"),
        (["train"], 64, "Missing argument"),
        (["train", "{config}", "data.train.0.path={folder}/none.jsonl"], 65, "none.jsonl"),
        (["score", "{folder}", "{folder}/x.jsonl", "--out", "{folder}/o"], 65, "x.jsonl"),
    ],
)  # fmt: skip
def test_the_command_line_fails_with_code_message_and_json(tmp_path, arguments, code, text):
    config = tiny_config(tmp_path, "digits:train")
    result = fastrm(*[a.format(config=config, folder=tmp_path) for a in arguments])
    assert result.returncode == code and text in result.stderr
    last = json.loads(result.stderr.strip().splitlines()[-1])
    assert last["exit_code"] == code and text in last["message"]
    assert "Traceback" not in result.stderr


def test_help_is_instant_and_loads_no_torch():
    import time

    started = time.perf_counter()
    assert fastrm("--help").returncode == 0
    assert time.perf_counter() - started < 4  # 0.3 s on an idle machine; torch alone would take as long
    result = fastrm("--help")
    assert "train" in result.stdout and "score" in result.stdout
    code = "import sys, fastrm, fastrm.cli; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
