"""The server under Ray Serve, by the configuration of the documentation, with two replicas on a CPU."""

import base64
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import yaml

from fastrm.config import load_config
from fastrm.errors import ConfigError
from fastrm.evaluate.reward_model import RewardModel
from fastrm.train.loop import train
from tests.helpers.project import PROJECT
from tests.helpers.runs import tiny_config
from tests.helpers.support import make_image
from tests.helpers.waiting import PATIENCE, wait_until

pytest.importorskip("ray.serve", reason='Ray Serve is not installed: pip install "fastrm[serve,ray]"')

TOKEN = "open-sesame"
MAX_QUEUE = 80
BAND = 1e-6  # of rewards near 1 in float32: each replica computes its groups in packs of their own


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(load_config(tiny_config(folder, "digits:eval", run={"max_steps": 1})))
    return folder / "run" / "model"


def adapted(model, port):
    """The configuration that the documentation shows, for this machine."""
    config = yaml.safe_load((PROJECT / "configs/serve/ray.yaml").read_text())
    config["http_options"]["port"] = port
    (application,) = config["applications"]
    application["args"] |= {"models": [f"tiny={model}"], "device": "cpu", "max_queue": MAX_QUEUE}
    for deployment in application["deployments"]:
        deployment |= {"ray_actor_options": {"num_cpus": 0.1}, "health_check_period_s": 1}
    return config


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """The process of `serve run`, and a client of the server."""
    folder = tmp_path_factory.mktemp("ray")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "ray.yaml").write_text(yaml.safe_dump(adapted(model, port)))
    environment = {
        **os.environ, "FASTRM_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": os.pathsep.join([str(PROJECT), str(PROJECT / "kernels")]),
    }  # fmt: skip
    command = [str(Path(sys.executable).with_name("serve")), "run", str(folder / "ray.yaml")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
    try:
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=PATIENCE
        ) as client:
            wait_until(lambda: process.poll() is not None or is_up(client))
            assert process.poll() is None, (folder / "log").read_text()[-5000:]
            yield process, client
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE)


def is_up(client):
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def replicas(process):
    """The process ids of the replicas with models."""
    found = set()
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "ServeReplica:fastrm:Scorers" in " ".join(child.cmdline()):
                found.add(child.pid)
        except psutil.NoSuchProcess:
            pass
    return found


def ask(client, groups):
    return client.post("/v1/rewards", json={"groups": groups})


def groups_of(name, count, *responses):
    return [{"prompt": f"{name} {n}: which digit?", "responses": list(responses)} for n in range(count)]


def figure(client, name):
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def test_rewards_are_those_of_the_model(server, model):
    _, client = server
    images = [make_image(84, 56, seed).data for seed in range(4)]
    groups = [{"prompt": "Which?", "images": [image], "responses": ["one", "two"]} for image in images]
    uris = ["data:image/png;base64," + base64.b64encode(image).decode() for image in images]
    answer = ask(client, [{**group, "images": [uri]} for group, uri in zip(groups, uris, strict=True)])
    assert answer.status_code == 200, answer.text
    np.testing.assert_allclose(
        answer.json()["rewards"], RewardModel.from_pretrained(model, device="cpu").score(groups), rtol=0, atol=BAND
    )
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"


def test_rollouts_of_a_prompt_meet_at_one_of_two_replicas(server):
    """A replica remembers the rewards that it has computed, and no other's: what is asked again is all known."""
    process, client = server
    assert len(replicas(process)) == 2
    for response in ("one", "two", "three"):
        for group in groups_of("meet", 16, response):
            assert ask(client, [group]).status_code == 200
    hits = "fastrm_reward_hits_total"
    before, computed = figure(client, hits), figure(client, "fastrm_groups_total")
    for group in groups_of("meet", 16, "three", "one", "two"):
        assert ask(client, [group]).status_code == 200
    assert figure(client, hits) - before == 48 and figure(client, "fastrm_groups_total") == computed


def test_a_path_is_not_opened_and_a_token_is_asked_for(server, tmp_path):
    _, client = server
    (tmp_path / "image.png").write_bytes(make_image(84, 56).data)
    group = {"prompt": "Which?", "images": [str(tmp_path / "image.png")], "responses": ["one"]}
    assert "error" in ask(client, [group]).json()["rewards"][0]
    answer = httpx.post(f"{client.base_url}/v1/rewards", json={"groups": [group]}, timeout=PATIENCE)
    assert answer.status_code == 401 and answer.json()["error"]["code"] == "UNAUTHORIZED"


def test_without_a_token_nothing_starts(monkeypatch):
    from fastrm.serve.ray_app import Arguments, build

    monkeypatch.delenv("FASTRM_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="FASTRM_TOKEN is not set"):
        build(Arguments(models=["runs/my/model"]))


def test_too_many_groups_are_refused_with_503(server):
    _, client = server
    together = threading.Barrier(8)

    def work(number):
        together.wait()
        return ask(client, groups_of(f"many {number}", 60, "one", "two"))

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(work, range(8)))
    assert {answer.status_code for answer in answers} == {200, 503}
    for answer in answers:
        if answer.status_code == 503:
            assert answer.json()["error"]["code"] == "QUEUE_FULL" and answer.headers["Retry-After"]


def test_a_replica_that_dies_costs_its_requests_a_503_and_is_replaced(server, model):
    process, client = server
    before = replicas(process)
    scorer, ended, answers = RewardModel.from_pretrained(model, device="cpu"), threading.Event(), []

    def work(thread):
        number = 0
        while not ended.is_set():
            groups = groups_of(f"die {thread} {number}", 16, "one", "two")
            answers.append((groups, ask(client, groups)))
            number += 1

    with ThreadPoolExecutor(4) as pool:
        working = [pool.submit(work, thread) for thread in range(4)]
        try:
            wait_until(lambda: len(answers) >= 4)
            dead = min(before)
            os.kill(dead, signal.SIGKILL)
            wait_until(lambda: any(answer.status_code != 200 for _, answer in answers))
            wait_until(lambda: len(replicas(process) - {dead}) == 2)
        finally:
            ended.set()
        for one in working:
            one.result()
    assert before - {dead} < replicas(process), "the other replica was harmed"
    lost = [answer for _, answer in answers if answer.status_code != 200]
    assert {(answer.status_code, answer.json()["error"]["code"]) for answer in lost} == {(503, "WORKER_LOST")}
    for groups, answer in answers[:4] + answers[-4:]:
        if answer.status_code == 200:
            np.testing.assert_allclose(answer.json()["rewards"], scorer.score(groups), rtol=0, atol=BAND)
    assert ask(client, groups_of("after", 16, "one")).status_code == 200


def test_health_is_503_while_no_replica_runs_and_groups_wait_for_one(server):
    process, client = server
    for replica in replicas(process):
        os.kill(replica, signal.SIGKILL)
    wait_until(lambda: client.get("/health").status_code != 200)
    answer = client.get("/health")
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "NOT_READY"
    assert ask(client, groups_of("waits", 4, "one")).status_code == 200
    wait_until(lambda: client.get("/health").status_code == 200)
