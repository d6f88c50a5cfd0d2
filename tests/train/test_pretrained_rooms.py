"""SmolLM2-135M-Instruct: prepared data, training, a kill, export, scoring, and the plan's memory."""

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaForSequenceClassification

import fastrm
from tests.helpers import memory_runs
from tests.helpers.killed_runs import ForkServer, assert_same, outcome
from tests.helpers.runs import write_rows
from tests.helpers.smollm2 import needs_smollm2
from tests.helpers.waiting import wait_until

pytestmark = needs_smollm2

GROUPS = [
    {"id": "moon", "prompt": "Why does the moon shine?",
     "responses": ["It reflects the light of the sun.", "It is made of cheese.", "Because it is night and hot."]},
    {"id": "bread", "prompt": "How do I keep bread fresh for a week?",
     "responses": ["Slice it, freeze it, and toast what you need.", "You cannot."]},
    {"id": "2024", "prompt": "Name two numbers above 2024.", "responses": ["2025 and 3000", "1999", "7"]},
]  # fmt: skip
ROWS = [{**group, "preferences": [[0, loser] for loser in range(1, len(group["responses"]))]} for group in GROUPS]


@pytest.fixture(scope="module")
def server():
    found = ForkServer()
    yield found
    found.close()


def make_config(folder, model):
    """Three steps with a checkpoint after each; the head is the one that stock classifiers have."""
    rows = write_rows(folder / "rows.jsonl", ROWS)
    tree = {
        "run": {"dir": str(folder / "run"), "max_steps": 3, "save_every": 1, "keep_checkpoints": 1},
        "data": {"train": [{"path": str(rows)}], "eval": [{"path": str(rows)}], "num_workers": 0},
        "model": {"path": str(model), "head": {"layers": 1, "bias": False}},
        "optim": {"lr": 1.0e-4, "batch_pairs": 3, "warmup_ratio": 0.0},
        "precision": {"dtype": "fp32"},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def run_dir(server, smollm2_folder, tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    server.start(make_config(folder, smollm2_folder), "no")
    assert server.wait() == 0, (folder / "config.yaml.log").read_text()
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run_dir):
    return fastrm.RewardModel.from_pretrained(run_dir / "model")


def test_three_steps_learn_their_preferences_from_a_prepared_set(run_dir):
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["steps"], summary["quarantined"]) == (3, 0)
    assert summary["tokens_processed"] < summary["tokens_unshared"]
    assert (run_dir / "prepared").is_dir()
    rows, _ = outcome(run_dir)
    losses = [row["loss"] for row in rows if "loss" in row]
    evaluated = next(row for row in reversed(rows) if "eval/loss" in row)
    assert evaluated["eval/loss"] < losses[0] and evaluated["eval/accuracy"] == 1.0


def test_a_killed_run_resumes_to_the_bit(server, run_dir, smollm2_folder, tmp_path):
    config = make_config(tmp_path, smollm2_folder)
    pid = server.start(config, "no")
    first = tmp_path / "run" / "checkpoints" / "step-00000001" / "manifest.json"
    wait_until(first.exists)
    os.killpg(pid, signal.SIGKILL)
    assert server.wait() == -signal.SIGKILL
    assert not (tmp_path / "run" / "summary.json").exists()
    server.start(config)
    assert server.wait() == 0, (tmp_path / "config.yaml.log").read_text()[-2000:]
    assert_same(tmp_path / "run", outcome(run_dir))


def test_the_export_gives_the_same_rewards_as_stock_transformers(run_dir, exported):
    stock = LlamaForSequenceClassification.from_pretrained(run_dir / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    for group, rewards in zip(GROUPS, exported.score(GROUPS), strict=True):
        for response, reward in zip(group["responses"], rewards, strict=True):
            turns = [{"role": "user", "content": group["prompt"]}, {"role": "assistant", "content": response}]
            tokens = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
            with torch.no_grad():
                assert reward == pytest.approx(float(stock(tokens).logits), rel=1e-4, abs=1e-4)


def test_a_checkpoint_is_exported_as_the_run_itself_does_it(server, run_dir, tmp_path):
    words = ["export", run_dir, "--step", 3, "--out", tmp_path / "whole"]
    server.command(words, tmp_path / "log")
    assert server.wait() == 0, (tmp_path / "log").read_text()
    files = {path.name for path in (run_dir / "model").iterdir()}
    assert {path.name for path in (tmp_path / "whole").iterdir()} == files
    assert all((tmp_path / "whole" / name).read_bytes() == (run_dir / "model" / name).read_bytes() for name in files)
    server.command([*words[:-1], tmp_path / "half", "--best", "--dtype", "bf16"], tmp_path / "log")
    assert server.wait() == 64  # --step and --best
    server.command(["export", run_dir, "--best", "--dtype", "bf16", "--out", tmp_path / "half"], tmp_path / "log")
    assert server.wait() == 0, (tmp_path / "log").read_text()
    rewards = fastrm.RewardModel.from_pretrained(tmp_path / "half", dtype="fp32").score(GROUPS)
    for group, found in zip(ROWS, rewards, strict=True):
        assert all(found[winner] > found[loser] for winner, loser in group["preferences"])


def test_eight_threads_that_share_one_model_score_as_one_does(exported):
    wanted = exported.score(GROUPS)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(exported.score, [GROUPS] * 16)) == [wanted] * 16


@pytest.mark.slow
def test_the_plans_peak_memory_is_that_of_a_real_step(smollm2_folder):
    case = {"path": str(smollm2_folder), "load": [2, 120, 60, 0]}
    [run] = memory_runs.measure([case])
    assert memory_runs.predict(case, run).total == pytest.approx(run["peak_bytes"], rel=0.10)
