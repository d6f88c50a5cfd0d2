"""What gives rewards of responses refuses a critic and a judge, whose numbers would be others."""

import importlib
import json
import shutil

import pytest
from transformers import AutoModelForSequenceClassification

from fastrm import Ensemble, RewardModel
from fastrm.errors import ConfigError
from fastrm.model.export import save_model
from fastrm.model.export_command import export_model
from fastrm.model.paradigms import stored_paradigm
from fastrm.rl.rewards import open_scorer
from fastrm.ui import Display
from tests.helpers.runs import fastrm_here, write_rows
from tests.helpers.support import make_model

WHY = {"critic": "its reward is read behind a critique that it writes first", "judge": "it writes a verdict"}
ROWS = [{"prompt": "Why?", "chosen": "because", "rejected": "no idea"}]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scorer") / "model"
    save_model(make_model("qwen2"), folder)
    return folder


@pytest.fixture(params=WHY)
def writer(request, scorer, tmp_path):
    folder = shutil.copytree(scorer, tmp_path / request.param)
    set_paradigm(folder, {"kind": request.param, "spec": {"kind": "critic", "prompt": "{{ response }}"}})
    return folder


def set_paradigm(folder, paradigm):
    config = json.loads((folder / "config.json").read_text())
    config["fastrm"]["paradigm"] = paradigm
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "load",
    [
        RewardModel.from_pretrained,
        lambda folder: Ensemble.from_pretrained([folder, folder]),
        open_scorer,
        AutoModelForSequenceClassification.from_pretrained,
    ],
    ids=["RewardModel", "Ensemble", "open_scorer", "fastrm.hf"],
)
def test_from_python(load, writer):
    importlib.import_module("fastrm.hf")  # for each test anew (`stock_auto_classes` of conftest.py)
    kind = writer.name
    with pytest.raises(ConfigError, match=f"{kind}: is a {kind}, not a reward model: {WHY[kind]}.*fastrm eval"):
        load(writer)


@pytest.mark.parametrize(
    "command",
    [
        "score MODEL DATA --out OUT",
        "eval MODEL OTHER DATA --compare",
        "eval OTHER DATA --route text=MODEL",
        "serve MODEL --port 0",
        "check-serving MODEL --url http://127.0.0.1:1",
        "export MODEL --out OUT --for vllm",
    ],
)
def test_from_the_command_line(command, writer, scorer, tmp_path, capfd):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    places = {"MODEL": writer, "OTHER": scorer, "DATA": data, "OUT": tmp_path / "out"}
    words = [word for given in command.split() for word in [str(places.get(given, given))]]
    words = [word.replace("text=MODEL", f"text={writer}") for word in words]
    code, error = fastrm_here(capfd, *words)
    assert code == 64 and not (tmp_path / "out").exists(), error
    if "--compare" in command:
        assert "reward models' options" in error
    else:
        assert f"is a {writer.name}, not a reward model" in error.replace("\n", " ")


def test_an_export_of_files_that_lack_what_a_writer_has_is_refused(writer, tmp_path):
    why = {"critic": "lm_head.weight is not in the files", "judge": "is a judge by .* files hold a reward head"}
    with pytest.raises(ConfigError, match=why[writer.name]):
        export_model(writer, tmp_path / "out", "transformers", Display(silent=True))
    assert not (tmp_path / "out").exists()


def test_a_critic_is_loaded_for_conversations_that_end_with_critiques(writer, scorer):
    chat = [{"role": "user", "content": "no idea"}, {"role": "assistant", "content": "It says nothing."}]
    if writer.name == "judge":
        with pytest.raises(ConfigError, match="is a judge"):
            RewardModel.from_pretrained(writer, behind_critique=True)
        return
    found = RewardModel.from_pretrained(writer, behind_critique=True, check_exactness=False).get_score(chat)
    assert found == RewardModel.from_pretrained(scorer, check_exactness=False).get_score(chat)


@pytest.mark.parametrize("paradigm", ["critic", {"kind": "oracle", "spec": {}}, {"kind": "critic"}])
def test_a_section_that_says_something_else_is_named(paradigm, scorer, tmp_path):
    folder = shutil.copytree(scorer, tmp_path / "model")
    set_paradigm(folder, paradigm)
    with pytest.raises(ConfigError, match=r'config\.json: no valid "paradigm"'):
        stored_paradigm(folder)
    with pytest.raises(ConfigError, match=r'config\.json: no valid "paradigm"'):
        RewardModel.from_pretrained(folder)
