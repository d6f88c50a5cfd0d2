"""`fastrm push`, and hub ids in the place of folders, with huggingface_hub's own client against a hub of the test."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

import fastrm
from fastrm.data.sources.published import PUBLISHED
from fastrm.evaluate.accuracy import wilson_interval
from fastrm.share.card import make_card
from tests.helpers.hub_server import TOKEN, hub_server
from tests.helpers.runs import colour_rows, tiny_config
from tests.helpers.waiting import PATIENCE

# One process for the calls of one environment: the hub's client reads it when it is imported.
CALLS = """
import json, sys
import fastrm
from fastrm.share.push import push

def score(model):
    return fastrm.RewardModel.from_pretrained(model).score([{"prompt": "2 + 2?", "responses": ["4", "5"]}])[0]

def evaluate(data):
    return fastrm.evaluate(sys.argv[2], data, quiet=True).accuracy

def train(model, folder):
    rows = [{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}]
    config = {"run": {"dir": folder, "max_steps": 1}, "data": {"train": [{"rows": rows}], "num_workers": 0},
              "model": {"path": model}, "precision": {"dtype": "fp32"}}
    return fastrm.train(config, quiet=True).metrics["steps"]

for name, *arguments in json.loads(sys.argv[1]):
    try:
        options = arguments.pop() if isinstance(arguments[-1], dict) else {}
        call = {"score": score, "evaluate": evaluate, "train": train, "push": push}[name]
        answer = call(*arguments, **options)
    except fastrm.FastrmError as error:
        answer = f"{type(error).__name__}: {error}"
    print("\\nANSWER", json.dumps(answer))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pushed")
    return fastrm.train(tiny_config(folder, colour_rows(folder), "digits:eval", run={"max_steps": 1}), quiet=True)


@pytest.fixture
def hub():
    with hub_server() as served:
        yield served


def answers(home: Path, url: str, *calls, **environment) -> list:
    """Return what each call returns, or its error as text."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    clean |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **environment}
    model = next((call[1] for call in calls if call[0] == "score"), "")
    command = [sys.executable, "-c", CALLS, json.dumps(calls), model]
    done = subprocess.run(command, capture_output=True, text=True, env=clean, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("ANSWER ") for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    return [json.loads(line) for line in lines]


def test_a_pushed_model_is_loaded_by_its_id_and_gives_the_same_rewards(run, hub, tmp_path):
    folder = str(run.folder)
    (run.folder / "model" / "notes.bin").write_bytes(b"optimizer")
    before, sent, here, there, public, steps = answers(
        tmp_path, hub.url, ["push", folder, "me/tiny", {"dry_run": True}], ["push", folder, "me/tiny"],
        ["score", folder], ["score", "me/tiny"], ["push", folder, "me/tiny", {"public": True}],
        ["train", "me/tiny", str(tmp_path / "run")], HF_TOKEN=TOKEN,
    )  # fmt: skip
    assert (before, sent, public, steps) == (None, None, None, 1) and here == there
    files = hub.files["me/tiny"]
    model = run.folder / "model"
    sent_names = {"README.md"} | {file.name for file in model.iterdir()} - {"notes.bin"}
    assert set(files) == sent_names and hub.private["me/tiny"]
    assert files["model.safetensors"] == (model / "model.safetensors").read_bytes()
    assert any(request.startswith("PUT /lfs/") for request in hub.requests)
    assert hub.requests.index("POST /api/repos/create") < hub.requests.index("POST /api/models/me/tiny/commit/main")
    everything = b"".join(content for name, content in files.items() if name != "model.safetensors").decode()
    assert str(run.folder) not in everything and "quarantine" not in everything


def test_a_dry_run_needs_no_hub_and_names_sizes(run, capsys):
    from fastrm.share.push import push

    push(run.folder, "me/tiny", dry_run=True, licence="apache-2.0")
    said = capsys.readouterr().out
    assert "me/tiny (private)" in said and f"{(run.folder / 'model' / 'config.json').stat().st_size:,}" in said
    assert "license: apache-2.0" in said and "nothing was sent" in said


def test_a_public_repository_is_not_filled_by_default(run, hub, tmp_path):
    hub.files["me/open"], hub.private["me/open"] = {}, False
    (refused,) = answers(tmp_path, hub.url, ["push", str(run.folder), "me/open"], HF_TOKEN=TOKEN)
    assert refused == (
        "ConfigError: me/open: exists and is public; add --public to send the model where everybody reads it"
    )
    assert hub.files["me/open"] == {}


def test_what_the_hub_refuses_says_what_to_do(run, hub, tmp_path):
    nobody, gated, misspelt, gated_data, misspelt_data = answers(
        tmp_path, hub.url, ["push", str(run.folder), "me/tiny"], ["score", "gated/model"], ["score", "me/tinny"],
        ["evaluate", "hub:gated/data"], ["evaluate", "hub:me/dta"], HF_TOKEN="hf_wrong",
    )  # fmt: skip
    log_in = "log in with hf auth login, or set HF_TOKEN"
    assert nobody.startswith("ServerError: me/tiny: nothing was sent: ") and log_in in nobody and "401" in nobody
    assert "gated/model" in gated and f"it is gated: accept its terms at {hub.url}/gated/model, then {log_in}" in gated
    assert f"{hub.url} has no model of this name, or it is private; check the spelling, or {log_in}" in misspelt
    assert f"accept its terms at {hub.url}/datasets/gated/data" in gated_data
    assert f"{hub.url} has no dataset of this name" in misspelt_data
    assert all("Error: " in one for one in (gated, misspelt, gated_data, misspelt_data))


def test_offline_a_whole_download_works_and_a_part_is_named(run, hub, tmp_path):
    hub.files["me/tiny"] = {file.name: file.read_bytes() for file in (run.folder / "model").iterdir()}
    hub.private["me/tiny"] = True
    (online,) = answers(tmp_path, hub.url, ["score", "me/tiny"])
    never, offline = answers(tmp_path, hub.url, ["score", "me/never"], ["score", "me/tiny"], HF_HUB_OFFLINE="1")
    assert offline == online and "HF_HUB_OFFLINE is set" in never and "hf download me/never" in never
    weights = list((tmp_path / "hub" / "models--me--tiny").rglob("model.safetensors"))
    weights[0].unlink()
    (part,) = answers(tmp_path, hub.url, ["score", "me/tiny"], HF_HUB_OFFLINE="1")
    assert "its download was not finished: the cache has its config.json and not its weights" in part
    assert "hf download me/tiny" in part
    (mended,) = answers(tmp_path, hub.url, ["score", "me/tiny"])
    assert mended == online


def test_a_hub_that_is_away_is_named(run, tmp_path):
    away = "http://127.0.0.1:9"
    pushed, loaded = answers(tmp_path, away, ["push", str(run.folder), "me/tiny"], ["score", "me/tiny"], HF_TOKEN=TOKEN)
    assert pushed.startswith(f"ServerError: me/tiny: nothing was sent: {away}: ")
    assert loaded.startswith("ConfigError: 'me/tiny': no such folder here") and f"{away} cannot be reached" in loaded


@pytest.mark.parametrize(
    "name, repo, message",
    [
        ("nowhere", "me/tiny", "nowhere: no such folder; wanted that of a run"),
        ("run", "tiny", "wanted OWNER/NAME"),
        ("run", "me//tiny", "the hub has no such names"),
        ("checkpoint", "me/tiny", "is a checkpoint for going on with a run, not a model"),
        ("backbone", "me/tiny", "is no reward model of fastrm; write one with fastrm export"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_anything_is_sent(run, tmp_path, name, repo, message):
    from fastrm.share.push import push

    places = {
        "nowhere": "nowhere", "run": run.folder, "backbone": tmp_path / "backbone",
        "checkpoint": next((run.folder / "checkpoints").glob("step-*")),
    }  # fmt: skip
    shutil.copytree(run.folder / "model", tmp_path / "backbone")
    config = json.loads((tmp_path / "backbone" / "config.json").read_text())
    del config["fastrm"]
    (tmp_path / "backbone" / "config.json").write_text(json.dumps(config))
    with pytest.raises(fastrm.ConfigError, match=message):
        push(places[name], repo, dry_run=True)


# ---- the card


def test_the_card_says_what_the_run_was(run):
    text = make_card("me/tiny", run.model_folder, run.folder, "apache-2.0")
    card = ModelCard(text)
    assert card.data.license == "apache-2.0" and card.data.base_model is None and "reward-model" in card.data.tags
    assert yaml.safe_load(card.data.to_yaml()) == yaml.safe_load(text.split("---")[1])
    count = sum(one["preferences"] for one in run.metrics["eval_by_source"].values())
    low, high = wilson_interval(round(run.accuracy * count), count)
    assert f"| all | {count} | {run.accuracy:.4f} | {low:.4f} - {high:.4f} |" in text
    assert "| colours | no | unknown |" in text and "random weights" in text and str(run.folder.parent) not in text
    assert 'from_pretrained("me/tiny")' in text and "import fastrm.hf" in text and "vllm serve" in text


def test_known_sets_bring_their_licences_and_ids(run, tmp_path):
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    config["data"]["train"] = [
        {"set": "rlaif-v"}, {"path": "hub:openbmb/UltraFeedback:train"}, {"path": "hub:who/knows/config"},
        {"path": "/home/me/secret/mine.jsonl"},
    ]  # fmt: skip
    config["model"] = {"path": "Qwen/Qwen2.5-VL-3B-Instruct"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    text = make_card("me/x", run.model_folder, tmp_path, None)
    card = ModelCard(text)
    assert card.data.datasets == ["openbmb/RLAIF-V-Dataset", "openbmb/UltraFeedback", "who/knows"]
    assert card.data.base_model == "Qwen/Qwen2.5-VL-3B-Instruct" and card.data.license is None
    assert f"| rlaif-v | openbmb/RLAIF-V-Dataset | {PUBLISHED['rlaif-v'].licence} |" in text
    assert "| openbmb/UltraFeedback | openbmb/UltraFeedback | MIT |" in text
    assert "| who/knows | who/knows | unknown |" in text and "| mine | no | unknown |" in text
    assert "secret" not in text and "Not measured" in text


def test_of_a_best_step_the_card_has_its_own_accuracy(run, tmp_path):
    shutil.copy(run.folder / "config.yaml", tmp_path)
    summary = {**run.metrics, "steps": 9, "exported_step": 4, "best_accuracy": 0.75}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    text = make_card("me/x", run.model_folder, tmp_path, None)
    assert "| 0.7500 |" in text and "| digits/which |" not in text and "| steps | 4 |" in text


def test_a_model_alone_has_a_card_that_says_so(run):
    text = make_card("me/x", run.model_folder, None, None)
    assert ModelCard(text).data.library_name == "fastrm"
    assert text.count("Unknown: the run's config.yaml is not beside the model.") == 2 and "Not measured" in text


def test_a_card_beside_the_model_is_sent_as_it_is(run, tmp_path, capsys):
    from fastrm.share.push import push

    shutil.copytree(run.model_folder, tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("# Mine\n")
    push(tmp_path / "model", "me/x", dry_run=True)
    assert capsys.readouterr().out.endswith("# Mine\n\n")


def adapter(folder: Path, base: str) -> Path:
    """Make the files of a run's adapter."""
    model = folder / "model"
    model.mkdir(parents=True)
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (model / "adapter_model.safetensors").write_bytes(b"weights")
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "fastrm": {}}))
    return folder


def test_an_adapter_needs_a_base_that_others_have(tmp_path, capsys):
    from fastrm.share.push import push

    with pytest.raises(fastrm.ConfigError, match=r"its base model, .*, is a folder that nobody else has; push a whole"):
        push(adapter(tmp_path / "local", str(tmp_path)), "me/x", dry_run=True)
    push(adapter(tmp_path / "known", "Qwen/Qwen2.5-0.5B"), "me/x", dry_run=True)
    said = capsys.readouterr().out
    assert "The files are an adapter and a head" in said and "adapter_model.safetensors" in said
    assert "AutoModelForSequenceClassification.from_pretrained" not in said


def test_the_card_of_a_model_that_writes_has_all_that_it_is_asked_with(tmp_path):
    spec = {"prompt": "{{ question }} | {{ response }}"}
    for system in ("", "You are strict.\nReally."):
        paradigm = {"kind": "critic", "spec": spec | ({"system": system} if system else {})}
        (tmp_path / "config.json").write_text(json.dumps({"fastrm": {"paradigm": paradigm}}))
        _, _, asked = make_card("me/x", tmp_path, None, None).partition("It learnt to answer\n")
        behind = f", behind this system turn:\n\n```text\n{system}\n```" if system else ":"
        assert asked.startswith(f"this prompt{behind}\n\n```text\n{spec['prompt']}\n```\n")
