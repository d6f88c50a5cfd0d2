"""Statistics of rewards that a run stores with its model, and rewards that are normalised by them."""

import json

import numpy as np
import pytest
from fastapi.testclient import TestClient

from fastrm.errors import ConfigError
from fastrm.evaluate.ensemble import Ensemble
from fastrm.evaluate.reward_model import RewardModel
from fastrm.model.reward_statistics import reward_statistics
from fastrm.serve.app import make_app
from fastrm.serve.caches import BoundedCache
from fastrm.serve.check.clients import APIS
from fastrm.serve.check.command import compare, verdict
from fastrm.serve.scheduler import Scheduler
from fastrm.serve.scorer import Scorer
from fastrm.serve.settings import ServeSettings
from fastrm.train.metrics import read_rows
from fastrm.ui import Display
from tests.helpers.runs import fastrm_here, run, text_rows, tiny_config, write_rows

GROUPS = [{"prompt": f"Is {n} even?", "responses": ["yes it is", "no", "maybe"]} for n in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a run with an evaluation after every step, each with a checkpoint."""
    folder = tmp_path_factory.mktemp("normalised")
    train, held_out = (write_rows(folder / f"{name}.jsonl", text_rows(12)) for name in ("train", "eval"))
    often = {"max_steps": 3, "eval_every": 1, "save_every": 1, "keep_checkpoints": 9}
    run(tiny_config(folder, train, held_out, run=often))
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return folder / "run" / "model"


@pytest.fixture(scope="module")
def scores(model):
    """Rewards of GROUPS as they are, and (mean, std)."""
    found = RewardModel.from_pretrained(model)
    statistics = found.network.reward_statistics
    return found.score(GROUPS), statistics["mean"], statistics["std"]


def normalised(scores):
    rewards, mean, std = scores
    return [[pytest.approx((reward - mean) / std, abs=1e-5) for reward in group] for group in rewards]


def test_statistics_are_those_of_the_exported_model_on_the_evaluation_set(folder, model):
    rows = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    groups = [{"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"]]} for row in rows]
    rewards = np.array(RewardModel.from_pretrained(model).score(groups)).ravel()
    found = json.loads((model / "config.json").read_text())["fastrm"]["rewards"]
    assert found["count"] == len(rewards) == 24
    assert found["mean"] == pytest.approx(rewards.mean(), abs=1e-5)
    assert found["std"] == pytest.approx(rewards.std(ddof=1), abs=1e-5)
    for share, value in found["quantiles"].items():
        assert value == pytest.approx(np.quantile(rewards, float(share)), abs=1e-5)
    assert list(found["quantiles"]) == ["0.05", "0.25", "0.5", "0.75", "0.95"]
    last = read_rows(folder / "run" / "metrics.jsonl")[-1]
    assert last["eval/rewards"] == found


def test_rewards_are_left_as_they_are_unless_asked_and_normalised_when_asked(model, scores):
    assert RewardModel.from_pretrained(model).network.normalization is None
    found = RewardModel.from_pretrained(model, normalize=True)
    assert found.score(GROUPS) == normalised(scores)
    assert found.rank(GROUPS[0]) == RewardModel.from_pretrained(model).rank(GROUPS[0])


def test_members_of_an_ensemble_are_normalised_before_they_are_combined(model, scores):
    found = Ensemble.from_pretrained([model, model], normalize=True)
    assert found.score(GROUPS) == normalised(scores)


def test_the_command_normalises_when_asked(folder, model, scores, tmp_path, capfd):
    groups, out = write_rows(tmp_path / "groups.jsonl", GROUPS), tmp_path / "out.jsonl"
    assert fastrm_here(capfd, "score", model, groups, "--out", out, "--normalize", "--device", "cpu")[0] == 0
    assert [json.loads(line)["rewards"] for line in out.read_text().splitlines()] == normalised(scores)


def test_an_export_keeps_statistics_and_that_of_a_step_has_its_own(folder, model, tmp_path, capfd):
    assert fastrm_here(capfd, "export", model, "--out", tmp_path / "whole")[0] == 0
    assert fastrm_here(capfd, "export", folder / "run", "--step", 1, "--out", tmp_path / "first")[0] == 0
    whole, first, own = (
        json.loads((path / "config.json").read_text())["fastrm"]["rewards"]
        for path in (tmp_path / "whole", tmp_path / "first", model)
    )
    rows = {row["step"]: row for row in read_rows(folder / "run" / "metrics.jsonl") if "eval/rewards" in row}
    assert whole == own == rows[3]["eval/rewards"] and first == rows[1]["eval/rewards"] != own


def test_a_model_without_an_evaluation_has_none_and_says_how_to_make_them(tmp_path, capfd):
    run(tiny_config(tmp_path, write_rows(tmp_path / "rows.jsonl", text_rows(8)), run={"max_steps": 1}))
    model = tmp_path / "run" / "model"
    assert "rewards" not in json.loads((model / "config.json").read_text())["fastrm"]
    with pytest.raises(ConfigError, match=r"normalize: .*model has no statistics .* a run with data\.eval stores them"):
        RewardModel.from_pretrained(model, normalize=True)
    groups = write_rows(tmp_path / "groups.jsonl", GROUPS)
    for command in (["score", model, groups, "--out", tmp_path / "out.jsonl"], ["serve", model, "--port", 0]):
        code, said = fastrm_here(capfd, *command, "--normalize")
        assert code == 64 and "--normalize:" in said and "a run with data.eval" in said


def test_equal_rewards_have_no_statistics():
    assert reward_statistics([]) is None and reward_statistics([0.5]) is None and reward_statistics([1.0, 1.0]) is None
    assert reward_statistics([3.0, 1.0])["std"] == pytest.approx(2**0.5)


def server(model):
    scorer = Scorer("tiny", Ensemble([model]), 32768)
    return TestClient(make_app(Scheduler([scorer], rewards=BoundedCache(1000)), ServeSettings()), "http://localhost")


@pytest.mark.parametrize("api", APIS)
def test_a_server_answers_normalised_rewards_by_every_api_and_check_serving_knows_them(model, api):
    raw, found = RewardModel.from_pretrained(model), RewardModel.from_pretrained(model, normalize=True)
    with server(found) as client:
        for _ in range(2):  # the second time from what the server remembers
            assert compare(found, client, api, 1e-4, Display(silent=True)).worst.difference < 1e-4
        other = compare(raw, client, api, 1e-4, Display(silent=True))
    assert not other.agrees
    said = " ".join(verdict(other, raw, lambda name: raw))
    assert "likely cause: scale:" in said and "serve --normalize" in said
