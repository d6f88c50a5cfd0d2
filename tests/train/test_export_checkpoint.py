"""`fastrm export RUN --step N` and `--best`: models of checkpoints, which are those of the run to the byte."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fastrm import cli
from fastrm.errors import ConfigError, StorageError
from fastrm.model.export import load_model
from fastrm.train.export_checkpoint import export_checkpoint
from fastrm.ui import Display
from tests.helpers.runs import TEXT_MODEL, run, text_rows, tiny_config, write_rows

# Settings under which checkpoints or exports differ from the network's own weights in names or dtypes.
CASES = {
    "vision": {},
    "text, a classifier": {"model": {"init": TEXT_MODEL, "head": {"layers": 1, "bias": False, "activation": "none"}}},
    "fused, bf16 weights": {
        "model": {"fuse_projections": True, "freeze": ["vision"]},
        "precision": {"dtype": "bf16", "weights": "bf16"},
    },
    "fused, FP8": {"model": {"fuse_projections": True}, "precision": {"dtype": "bf16", "fp8": "rowwise"}},
}
STEPS = {"max_steps": 3, "save_every": 1, "keep_checkpoints": 9, "eval_every": 1}


def export(folder: Path, *arguments, **options) -> str:
    said = io.StringIO()
    with Display(Console(file=said, width=500)) as display:
        export_checkpoint(folder, *arguments, display=display, **options)
    return said.getvalue()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module", params=CASES)
def finished(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    rows = "digits:eval" if request.param != "text, a classifier" else write_rows(folder / "t.jsonl", text_rows(20))
    run(tiny_config(folder, rows, rows, run=STEPS, **CASES[request.param]))
    return folder / "run"


def test_the_last_checkpoint_is_the_runs_own_model_to_the_byte(finished, tmp_path):
    said = export(finished, 3, tmp_path / "out", "transformers")
    assert files_of(tmp_path / "out") == files_of(finished / "model")
    assert f"exported step 3 of {finished}" in said


def test_an_earlier_checkpoint_has_its_own_weights(finished, tmp_path):
    export(finished, 1, tmp_path / "out", "transformers")
    kept = load_file(finished / "checkpoints" / "step-00000001" / "model.safetensors")
    state = load_model(tmp_path / "out").state_dict()
    assert state.keys() == kept.keys()
    for name, tensor in state.items():
        is_rounded = "\n  dtype: bf16" in (finished / "config.yaml").read_text() and not name.startswith("score.")
        assert torch.equal(tensor, kept[name].bfloat16().float() if is_rounded else kept[name].float()), name
    last = load_model(finished / "model").state_dict()
    assert not all(torch.equal(state[name], last[name]) for name in state if name.startswith("score."))


def test_the_best_checkpoint_has_a_place_by_itself(finished):
    best = json.loads((finished / "summary.json").read_text())["best_checkpoint"]
    export(finished, None, None, "transformers")
    export(finished, int(best.removeprefix("step-")), finished / "named", "transformers")
    assert files_of(finished / "exports" / best) == files_of(finished / "named")
    with pytest.raises(ConfigError, match="exists already"):
        export(finished, None, None, "transformers")


def test_other_precision_and_other_readers(finished, tmp_path):
    export(finished, 3, tmp_path / "out", "vllm", dtype=torch.bfloat16)
    state = load_file(tmp_path / "out" / "model.safetensors")
    kinds = {tensor.dtype for name, tensor in state.items() if "score" not in name}
    assert kinds == {torch.bfloat16}
    assert {tensor.dtype for name, tensor in state.items() if "score" in name} == {torch.float32}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.fixture(scope="module")
def unevaluated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unevaluated")
    rows = write_rows(folder / "t.jsonl", text_rows(8))
    run(tiny_config(folder, rows, run={"max_steps": 1}, model={"init": TEXT_MODEL}))
    return folder / "run"


def test_a_run_that_was_moved_is_exported_where_it_is(unevaluated, tmp_path):
    moved = Path(shutil.copytree(unevaluated, tmp_path / "moved"))
    export(moved, 1, tmp_path / "out", "transformers")
    assert files_of(tmp_path / "out") == files_of(unevaluated / "model")


@pytest.mark.parametrize(
    ("step", "message"),
    [(7, "--step 7: .* keeps no checkpoint of it; there are those of steps 1"), (None, "--best: no evaluation of ")],
)
def test_a_step_that_is_not_there_is_named_with_those_that_are(unevaluated, tmp_path, step, message):
    with pytest.raises(ConfigError, match=message):
        export(unevaluated, step, tmp_path / "out", "transformers")
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_refused(unevaluated, tmp_path):
    damaged = Path(shutil.copytree(unevaluated, tmp_path / "damaged"))
    with (damaged / "checkpoints" / "step-00000001" / "model.safetensors").open("r+b") as file:
        file.seek(2000)
        file.write(b"damage")
    with pytest.raises(StorageError, match=r"not an intact checkpoint: model\.safetensors does not match its SHA-256"):
        export(damaged, 1, tmp_path / "out", "transformers")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN/model", "--step", "1"], "holds no checkpoint; --step and --best are for the folder of a run"),
        (["RUN", "--step", "1", "--best"], "--step and --best: name one of them"),
        (["RUN"], "--out: name the folder to write"),
        (["RUN", "--step", "1", "--merge"], "--merge: RUN trains no adapters (model.lora): its checkpoints are whole"),
        (["RUN/model", "--merge", "--out", "OUT"], "--merge: RUN/model is no adapter and whole already"),
        (["RUN", "--step", "1", "--dtype", "fp16"], "'fp16' is not one of 'auto', 'fp32', 'bf16'"),
        (["RUN/checkpoints/step-00000001", "--out", "OUT"], "fastrm export RUN --step 1 --out FOLDER"),
    ],
)
def test_words_that_do_not_fit_are_refused(unevaluated, tmp_path, monkeypatch, capsys, words, message):
    words = [word.replace("RUN", str(unevaluated)).replace("OUT", str(tmp_path / "out")) for word in words]
    monkeypatch.setattr("sys.argv", ["fastrm", "export", *words])
    with pytest.raises(SystemExit) as leave:
        cli.main()
    assert leave.value.code == ConfigError.exit_code
    assert message.replace("RUN", str(unevaluated)) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
