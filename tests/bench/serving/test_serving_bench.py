"""The serving benchmark: its requests, its clients, the stock side, the goals; and the gate with both servers."""

import asyncio
import itertools
import json
import sys

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from bench.serving import run_serving
from bench.serving.load import Answer, Load, closed_loop, open_loop
from bench.serving.stock import StockModel
from bench.serving.workload import RESPONSES, make_groups, singles, whole
from fastrm.evaluate.reward_model import RewardModel
from fastrm.model.export import save_model
from tests.helpers.servers import running
from tests.helpers.support import make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(make_model("qwen2_5_vl"), folder)
    return folder


def take(items, count):
    return list(itertools.islice(items, count))


def test_no_request_repeats_and_singles_are_the_groups_in_parts():
    groups = take(make_groups(28), 2000)  # more than there are digits
    assert len({group.image for group in groups}) == 2000
    bodies = [json.loads(body)["groups"][0] for body in whole(groups[:3])]
    parts = [json.loads(body)["groups"][0] for body in singles(groups[:3])]
    assert all(len(set(body["responses"])) == RESPONSES for body in bodies)
    for number, body in enumerate(bodies):
        mine = parts[RESPONSES * number : RESPONSES * (number + 1)]
        assert [response for part in mine for response in part["responses"]] == body["responses"]
        assert {part["images"][0] for part in mine} == {body["images"][0]} and mine[0]["prompt"] == body["prompt"]


def make_server(seconds=0.0, refuse_every=0):
    """An application that computes one request at a time, in so many seconds."""
    app, one_at_a_time, numbers = FastAPI(), asyncio.Lock(), itertools.count(1)

    @app.post("/v1/rewards")
    async def rewards(body: dict):
        async with one_at_a_time:
            await asyncio.sleep(seconds)
        if refuse_every and next(numbers) % refuse_every == 0:
            return JSONResponse({}, 503)
        return {"rewards": [[0.5] * len(group["responses"]) for group in body["groups"]]}

    return app


def test_closed_loop_counts_answers_rewards_and_refusals():
    with running(make_server(refuse_every=3)) as url:
        load = closed_loop(f"{url}/v1/rewards", singles(make_groups(28)), clients=4, seconds=2.0, warm_up=0.1)
    assert load.good and set(load.failed) == {503}
    assert len(load.good) + load.failed[503] == len(load.answers)
    assert load.rewards_per_second == pytest.approx(len(load.good) / 2.0)


def test_open_loop_counts_the_time_that_a_request_waits_for_its_turn():
    with running(make_server(seconds=0.1)) as url:
        load = open_loop(f"{url}/v1/rewards", whole(make_groups(28)), rate=40, seconds=2.0, warm_up=0.0)
    # Four times as many come as can be computed: the last ones wait for most of the time that the load took.
    assert len(load.good) > 20 and load.latency(0.99) > 2.0
    assert load.latency(0.01) < load.latency(0.5) < load.latency(0.99)


def test_a_server_that_is_gone_is_status_0():
    with running(make_server()) as url:
        pass
    load = closed_loop(f"{url}/v1/rewards", whole(make_groups(28)), clients=1, seconds=0.5, warm_up=0.0)
    assert set(load.failed) == {0} and not load.good


def test_latency_is_the_smallest_that_covers_the_share():
    load = Load(1.0, [Answer(0.0, seconds / 100, 200, {"rewards": [[1.0]]}) for seconds in range(100, 0, -1)])
    assert (load.latency(0.5), load.latency(0.99), load.latency(1.0)) == (0.5, 0.99, 1.0)


@pytest.mark.parametrize("size", [1, 5])
def test_the_stock_side_gives_the_models_rewards(folder, size):
    groups = take(make_groups(56), 2)
    flat = [(group.prompt, group.image, response) for group in groups for response in group.responses]
    stock = StockModel(str(folder))
    found = [reward for start in range(0, len(flat), size) for reward in stock.rewards(flat[start : start + size])]
    wanted = RewardModel.from_pretrained(folder).score([group.as_dict() for group in groups])
    assert found == pytest.approx([reward for group in wanted for reward in group], abs=1e-5)


def closed(side, requests, rate, **more):
    return {"side": side, "requests": requests, "rewards_per_second": rate} | more


def test_goals_say_what_was_missed():
    found = {
        "closed": [
            closed("fastrm", "groups", 90.0),
            closed("fastrm", "groups", 100.0, outside_packs=0.03),
            closed("fastrm", "singles", 84.0),
            closed("transformers, one at a time", "singles", 25.0),
        ],
        "open": [
            {"requests": "groups", "p50_ms": 10.0, "p99_ms": 19.0},
            {"requests": "singles", "p50_ms": 10.0, "p99_ms": 20.0},
        ],
    }
    reached = [(goal["reached"], goal["met"]) for goal in run_serving.goals(found).values()]
    assert reached == [(0.84, False), (4.0, True), (1.9, True), (2.0, False), (0.03, True)]


@pytest.mark.slow
def test_the_whole_benchmark_in_small(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "serving.json"
    arguments = ["--clients", "1,4", "--seconds", "3", "--warm-up", "0.5", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["run_serving.py", str(folder), *arguments])
    run_serving.main()
    found = json.loads(out.read_text())
    assert len(found["closed"]) == 5 and len(found["open"]) == 2 and len(found["batches"]) == 3
    assert all(one["answers"] > 0 and not one["failed"] for one in [*found["closed"], *found["open"]])
    assert "gate: transformers, batches of 8" in capsys.readouterr().out


def test_a_wrong_reward_is_a_red_gate(folder, monkeypatch):
    groups = take(make_groups(56), 2)
    right = RewardModel.from_pretrained(folder).score([group.as_dict() for group in groups])
    flat = [reward for group in right for reward in group]
    answers = {"ours": iter([flat[:8], [*flat[8:15], flat[15] + 1e-3]]), "stock": iter([flat])}
    monkeypatch.setattr(run_serving, "served", lambda url, bodies: next(answers[url]))
    with pytest.raises(run_serving.RedGate, match=r"fastrm, groups and singles: a reward differs by 1\.0e-03"):
        run_serving.check(str(folder), groups, "ours", "stock")
