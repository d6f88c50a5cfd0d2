"""What a user is told: the key that was meant, the flag or the argument, the first refused rows, the best step."""

import io
import json

import pytest
import torch
from rich.console import Console

import fastrm as package
from fastrm import cli, errors
from fastrm.config import Config, load_config
from fastrm.data.record import Message
from fastrm.data.tokenizer import train_tokenizer
from fastrm.errors import ConfigError, DataError
from fastrm.forecast.dry_run import dry_run
from fastrm.names import device_name, dtype_name
from fastrm.train import launch
from fastrm.train.loop import train
from tests.helpers.runs import colour_rows, text_rows, tiny_config, write_rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three rows that cannot be used, and what it said."""
    folder = tmp_path_factory.mktemp("run")
    lost = [{"prompt": "Which?", "images": [f"lost/{n}.png"], "chosen": "a", "rejected": "b"} for n in (1, 2)]
    rows = write_rows(folder / "rows.jsonl", [*text_rows(16), lost[0], '{"broken', lost[1]])
    held_out = write_rows(folder / "held_out.jsonl", text_rows(8))
    config = tiny_config(folder, rows, held_out, run={"max_steps": 4, "eval_every": 2})
    said = io.StringIO()
    from fastrm.ui import Display

    train(load_config(config), display=Display(Console(file=said, width=200)))
    return folder, said.getvalue()


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("run.lr=1e-5", "unknown key run.lr; did you mean optim.lr?"),
        ("max_steps=3", "unknown key max_steps; did you mean run.max_steps?"),
        ("model.num_workers=2", "unknown key model.num_workers; did you mean data.num_workers?"),
        ("optim.learning_rate=1e-5", "unknown key optim.learning_rate; did you mean optim.lr?"),
        ("per_device_train_batch_size=8", "did you mean optim.batch_pairs, of all ranks together?"),
        ("data.held_out=0.1", "did you mean data.train.held_out or data.eval.held_out?"),
        ("optim.weigth_decay=0", "did you mean optim.weight_decay?"),
    ],
)
def test_a_key_of_another_section_is_known_again(tmp_path, override, meant):
    config = tiny_config(tmp_path, "rows.jsonl")
    with pytest.raises(ConfigError) as caught:
        load_config(config, [override])
    assert meant in str(caught.value)


def test_names_of_other_trainers_lead_to_keys_that_there_are():
    for meant in Config.names_elsewhere.values():
        section, key = meant.partition(",")[0].split(".")
        assert key in Config.model_fields[section].annotation.model_fields, meant


@pytest.mark.parametrize(
    ("written", "name"),
    [("auto", "auto"), ("cpu", "cpu"), ("CUDA", "cuda"), ("cuda:1", "cuda:1"), (1, "cuda:1"), ("0", "cuda:0"),
     (torch.device("cuda", 3), "cuda:3"), (torch.device("cpu"), "cpu")],
    ids=str,
)  # fmt: skip
def test_devices_are_known_as_people_write_them(tmp_path, written, name):
    assert device_name(written) == name
    assert load_config(tiny_config(tmp_path, "rows.jsonl"), [f"run.device={written}"]).run.device == name


@pytest.mark.parametrize("written", ["gpu", "cuda:", "cuda:x", "mps", -1, None, "cuda:1:2"], ids=str)
def test_a_device_that_there_is_not_is_refused_by_key(tmp_path, written):
    with pytest.raises(ConfigError, match=r"run\.device: got .*, wanted one of auto, cpu, cuda, cuda:0, cuda:1"):
        load_config(tiny_config(tmp_path, "rows.jsonl"), [f"run.device={written}"])


def test_one_gpu_and_several_processes_do_not_go_together(tmp_path):
    config = load_config(tiny_config(tmp_path, "rows.jsonl"), ["run.device=cuda:1"])
    assert launch.num_ranks_to_start(config) == 1
    config = load_config(tiny_config(tmp_path, "rows.jsonl"), ["run.device=cuda:1", "run.num_processes=2"])
    with pytest.raises(ConfigError, match=r"run\.device: cuda:1 is one GPU, but there are 2 ranks"):
        launch.num_ranks_to_start(config)


@pytest.mark.parametrize(
    ("written", "name"),
    [("bf16", "bf16"), ("bfloat16", "bf16"), ("torch.bfloat16", "bf16"), (torch.bfloat16, "bf16"),
     (torch.float16, "fp16"), ("half", "fp16"), ("float32", "fp32"), (torch.float, "fp32"), ("int8", "int8")],
    ids=str,
)  # fmt: skip
def test_dtypes_are_known_as_people_write_them(run, tmp_path, written, name):
    assert dtype_name(written) == name
    if name == "int8":
        with pytest.raises(ConfigError, match=r"dtype: got 'int8', wanted one of auto, fp32, bf16, fp16"):
            package.RewardModel.from_pretrained(run[0] / "run" / "model", dtype=written)
        with pytest.raises(ConfigError, match=r"precision\.dtype: got 'int8'"):
            load_config(tiny_config(tmp_path, "rows.jsonl"), ["precision.dtype=int8"])
        return
    model = package.RewardModel.from_pretrained(run[0] / "run" / "model", dtype=written)
    assert model.network.model.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    if name != "fp16":
        config = load_config(tiny_config(tmp_path, "rows.jsonl"), [f"model.export_dtype={written}"])
        assert config.model.export_dtype == name


@pytest.mark.parametrize("path", [3, None, "", b"runs"])
def test_what_is_no_path_is_refused_by_its_value(path, tmp_path):
    """The empty one would be the working folder, and any other be taken for a hub id of its text."""
    for load in (package.RewardModel.from_pretrained, package.Ensemble.from_pretrained):
        with pytest.raises(ConfigError, match=f"path of a model: got {path!r}, wanted a folder or a hub id"):
            load(path)
    with pytest.raises(ConfigError, match=f"path of a model: got {path!r}"):
        package.Ensemble.from_pretrained([tmp_path, path])


def test_an_empty_path_in_a_configuration_or_an_argument_is_refused(tmp_path, monkeypatch, capsys):
    config = tiny_config(tmp_path, write_rows(tmp_path / "rows.jsonl", text_rows(8)))
    with pytest.raises(ConfigError, match="path and images of a source must not be empty"):
        load_config(config, ['data.train=[{path: ""}]'])
    with pytest.raises(ConfigError, match="path of a model: got ''"):
        dry_run(load_config(config, ['model={path: ""}']))
    monkeypatch.setattr("sys.argv", ["fastrm", "score", "", "rows.jsonl", "--out", "rewards.jsonl"])
    with pytest.raises(SystemExit) as leave:
        cli.main()
    assert leave.value.code == 64 and "argument 2 is empty" in capsys.readouterr().err


def test_a_hint_names_the_argument_in_python_and_the_flag_on_the_command_line(run, tmp_path, monkeypatch, capsys):
    folder, group = run[0] / "run" / "model", {"prompt": "Is 3 even?", "responses": ["yes", "no"]}
    with pytest.raises(DataError, match=r"limit 3; raise tokens_per_pack \(TOO_LONG\)"):
        package.RewardModel.from_pretrained(folder).score([group], tokens_per_pack=3)
    groups, out = write_rows(tmp_path / "groups.jsonl", [group]), tmp_path / "out.jsonl"
    arguments = ["score", str(folder), str(groups), "--out", str(out), "--tokens-per-pack", "3"]
    monkeypatch.setattr("sys.argv", ["fastrm", *arguments])
    with pytest.raises(SystemExit):
        cli.main()
    assert "limit 3; raise --tokens-per-pack" in out.read_text()
    assert not errors.is_command_line


def test_the_end_of_preparing_and_of_a_run_show_the_first_refused_rows(run):
    folder, said = run
    lost = f'{folder / "rows.jsonl"}:17: image "{folder / "lost/1.png"}" cannot be opened'
    prepared, _, trained = said.partition("prepared set made")
    for part in (prepared, trained):
        assert "refused: " + lost in part and "(IMAGE_MISSING, 2 in all)" in part
        assert f"refused: {folder / 'rows.jsonl'}:18: " in part
    assert trained.rindex("refused: ") > trained.index("Training done")


def test_the_end_of_a_run_says_which_step_was_best(run):
    folder, said = run
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluations = {row["step"]: row["eval/accuracy"] for row in rows if "eval/accuracy" in row}
    assert sorted(evaluations) == [2, 4]
    best = max(evaluations, key=lambda step: (evaluations[step], -step))
    line = next(line for line in said.splitlines() if "best at an evaluation" in line)
    assert f"{evaluations[best]:.4f} (step {best})" in line
    assert json.loads((folder / "run" / "summary.json").read_text())["best_accuracy"] == evaluations[best]


def dry(config, *overrides):
    said = io.StringIO()
    report = dry_run(load_config(config, overrides), Console(file=said, width=300))
    return {name: (state, detail) for name, state, detail in report["rows"]}, said.getvalue()


def test_a_dry_run_finds_what_the_first_step_would_find(tmp_path):
    rows = colour_rows(tmp_path, 12)
    (tmp_path / "images" / "3.png").unlink()
    empty = write_rows(tmp_path / "empty.jsonl", [])
    config = tiny_config(tmp_path, rows, write_rows(tmp_path / "lost.jsonl", ["{}"]))
    evaluations = f"data.eval=[{{path: {tmp_path}/lost.jsonl}}, {{path: {empty}}}]"
    found, said = dry(config, f"data.train.0.path={rows}", evaluations)
    state, detail = found["data.train.0"]
    assert state == "refused" and "of all 12 rows 1 cannot be used (IMAGE_MISSING 1)" in detail
    assert f'{rows}:4: image "{tmp_path}/images/3.png" cannot be opened' in detail
    assert found["data.eval.0"][0] == "missing" and "of all 1 rows 1 cannot be used" in found["data.eval.0"][1]
    assert found["data.eval.1"] == ("missing", "no usable row: the source is empty")
    assert "no row that was looked at can be used: data.eval.0, data.eval.1" in said
    found, _ = dry(config, "data.eval=[]", "data.max_tokens_per_group=10")
    assert found["data.train.0"][0] == "missing" and "TOO_LONG 11" in found["data.train.0"][1]
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_usable_rows_says_how_many_were_looked_at(tmp_path):
    found, said = dry(tiny_config(tmp_path, write_rows(tmp_path / "rows.jsonl", text_rows(300))))
    assert found == {"data.train.0": ("usable", "the first 200 rows looked at")}
    assert "its inputs are here." in said


def test_a_dry_run_finds_an_anchor_that_is_not_there(tmp_path):
    rows = text_rows(9)
    conversations = [(Message("user", (row["prompt"],)), Message("assistant", (row["chosen"],))) for row in rows]
    tokenizer = train_tokenizer(conversations, 300)
    tokenizer.chat_template = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    text = {"model_type": "qwen2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = {"init": text, "tokenizer": str(tmp_path / "tokenizer"), "anchor": "end_of_turn"}
    config = tiny_config(tmp_path, write_rows(tmp_path / "rows.jsonl", text_rows(8)), model=model)
    with pytest.raises(ConfigError, match=r"model\.anchor: end_of_turn comes before the end of the response"):
        dry(config)
    assert dry(config, "model.anchor=last_token")[0]["data.train.0"][0] == "usable"
