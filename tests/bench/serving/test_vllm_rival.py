"""The serving benchmark's comparison with vLLM, without vLLM: its requests, its answers, its gate and its figures."""

import argparse
import itertools
import json

import pytest
from fastapi import FastAPI

from bench.serving import run_serving, vllm_rival
from bench.serving.load import Answer, Load
from bench.serving.vllm_process import VllmEnded, vllm_serving
from bench.serving.workload import RESPONSES, classify, make_groups
from tests.helpers.servers import running


def answered(*probs):
    return {"data": [{"index": 0, "label": "LABEL_0", "probs": list(probs), "num_classes": len(probs)}]}


def make_server(seen):
    """An application with both sides' endpoints, whose rewards are lengths of responses."""
    app = FastAPI()

    @app.post("/v1/rewards")
    async def rewards(body: dict):
        seen.append("fastrm")
        return {"rewards": [[float(len(response)) for response in group["responses"]] for group in body["groups"]]}

    @app.post("/classify")
    async def classified(body: dict):
        seen.append("vLLM")
        assert body["use_activation"] is False and body["add_generation_prompt"] is False
        return answered(float(len(body["messages"][-1]["content"])))

    @app.get("/version")
    async def version():
        return {"version": "0.32.0"}

    return app


def test_a_request_to_vllm_is_one_conversation_with_the_groups_image():
    (group,) = itertools.islice(make_groups(28), 1)
    bodies = [json.loads(body) for body in classify([group])]
    assert [body["messages"][1] for body in bodies] == [
        {"role": "assistant", "content": response} for response in group.responses
    ]
    (ours,) = json.loads(group.request(group.responses))["groups"]
    for body in bodies:
        image, text = body["messages"][0]["content"]
        assert image["image_url"]["url"] == ours["images"][0] and text["text"] == ours["prompt"]


@pytest.mark.parametrize(
    "body",
    [answered(0.5, 0.5), answered(float("nan")), {"data": []}, {"error": {"message": "no"}}, answered("0.5")],
    ids=["two labels", "NaN", "nothing", "error", "text"],
)
def test_what_is_no_reward_of_one_conversation_is_refused(body):
    assert vllm_rival.reward(answered(-1.25)) == -1.25
    with pytest.raises(ValueError, match="wanted one conversation with one finite reward"):
        vllm_rival.reward(body)


def test_answers_count_as_rewards_and_refusals_stay():
    answers = [Answer(0.0, 0.1, 200, answered(2.5)), Answer(0.0, 0.2, 503, None), Answer(0.0, 0.3, 200, answered(0.5))]
    load = vllm_rival.as_rewards(Load(0.5, answers))
    assert load.rewards_per_second == 4.0 and load.failed == {503: 1}


def test_the_figures_name_the_version_that_answered():
    with running(make_server([])) as url:
        assert vllm_rival.vllm_version(url) == "0.32.0"


class Model:
    """A model whose rewards are lengths of responses, but for the last one of all."""

    def __init__(self, off):
        self._off = off

    def score(self, groups):
        found = [[float(len(response)) for response in group["responses"]] for group in groups]
        found[-1][-1] += self._off
        return found


def test_the_gate_is_red_where_a_reward_differs(monkeypatch):
    groups = list(itertools.islice(make_groups(28), 2))
    with running(make_server([])) as url:
        monkeypatch.setattr(vllm_rival.RewardModel, "from_pretrained", lambda *_, **__: Model(0.0))
        assert vllm_rival.check("model", groups, url, url) == {"fastrm": 0.0, "vLLM": 0.0}
        monkeypatch.setattr(vllm_rival.RewardModel, "from_pretrained", lambda *_, **__: Model(1e-3))
        with pytest.raises(run_serving.RedGate, match=r"differs by 1\.0e-03"):
            vllm_rival.check("model", groups, url, url)


def test_sides_alternate_and_a_group_counts_eight_rewards_on_both():
    seen: list[str] = []
    options = argparse.Namespace(rounds=2, clients=[2], seconds=0.5, warm_up=0.1)
    with running(make_server(seen)) as url:
        found = vllm_rival.measure(url, url, make_groups(28), options)
    assert [(one["side"], one["requests"]) for one in found] == [
        ("fastrm", "groups"), ("vLLM", "groups"), ("fastrm", "singles"), ("vLLM", "singles"),
        ("vLLM", "groups"), ("fastrm", "groups"), ("vLLM", "singles"), ("fastrm", "singles"),
    ]  # fmt: skip
    assert [side for side, _ in itertools.groupby(seen)] == [
        "fastrm",
        "vLLM",
        "fastrm",
        "vLLM",
        "fastrm",
        "vLLM",
        "fastrm",
    ]
    for one in found:
        size = RESPONSES if (one["side"], one["requests"]) == ("fastrm", "groups") else 1
        assert not one["failed"] and one["rewards_per_second"] == pytest.approx(size * one["answers"] / 0.5)


def test_ratios_are_of_medians_over_the_rounds():
    rates = {"fastrm": (30.0, 10.0, 20.0), "vLLM": (5.0, 4.0, 90.0)}
    found = [
        {"side": side, "requests": "groups", "clients": 8, "rewards_per_second": rate}
        for side in rates
        for rate in rates[side]
    ]
    assert vllm_rival.ratios(found) == {"groups, 8 clients": {"fastrm": 20.0, "vLLM": 5.0, "ratio": 4.0}}


def test_a_vllm_that_ends_at_its_start_is_an_error_with_its_last_words(tmp_path):
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "no such model: $2"\nexit 1\n')
    program.chmod(0o755)
    with (
        pytest.raises(VllmEnded, match="no such model: the-model"),
        vllm_serving(tmp_path, "the-model", tmp_path / "log"),
    ):
        pass
