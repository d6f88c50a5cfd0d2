"""`fastrm serve` as a process of its own: ready, asked, and ended by a signal; what it refuses to start with."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager

import httpx
import psutil
import pytest
import torch

from fastrm.errors import ConfigError, DataError
from fastrm.evaluate.ensemble import Ensemble
from fastrm.evaluate.reward_model import RewardModel
from fastrm.model.export import save_model
from fastrm.serve.command import open_port, warm_up
from fastrm.serve.settings import ServeSettings
from tests.helpers.documents import blocks, words_of
from tests.helpers.runs import fastrm_here
from tests.helpers.support import make_model
from tests.helpers.waiting import PATIENCE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of two models, a and b."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        save_model(make_model("qwen2", seed=seed), folder / name)
    return folder


@contextmanager
def served(*arguments, token=None, cwd=None, before=""):
    """The command in a process, a client of it when it is ready, and the line that says so.

    Args:
        before: Python that the process runs first.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FASTRM_TOKEN": token or ""}
    if token is None:
        del environment["FASTRM_TOKEN"]
    program = f"{before}\nfrom fastrm.cli import main\nmain()"
    command = [sys.executable, "-c", program, "serve", *map(str, arguments), "--port", "0"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=cwd)
    watchdog = threading.Timer(PATIENCE, process.kill)
    watchdog.start()
    try:
        line = process.stdout.readline()
        found = re.search(r"at (http://\S+)$", line)
        assert found, line + process.stderr.read()
        with httpx.Client(base_url=found[1], timeout=PATIENCE) as client:
            yield process, client, line
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


RESPONSES = ["yes", "no", "so", "a"]  # in fours, rewards are those of `RewardModel.score` to the bit
GROUPS = [{"prompt": "the cat", "responses": RESPONSES}, {"prompt": "a dog", "responses": RESPONSES}]


def test_two_models_answer_by_their_names_and_a_signal_ends_the_server(folder):
    with served(f"first={folder / 'a'}", folder / "b") as (process, client, line):
        assert line.startswith(f"serving first, {folder / 'b'} at http://127.0.0.1:")
        for name, place in ((None, "a"), ("first", "a"), (str(folder / "b"), "b")):
            body = {"groups": GROUPS} | ({"model": name} if name else {})
            rewards = client.post("/v1/rewards", json=body).json()["rewards"]
            assert rewards == RewardModel.from_pretrained(folder / place).score(GROUPS)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        assert process.stderr.read().count("error") == 0


def test_an_ensemble_and_a_route_are_one_model(folder):
    with served(folder / "a", folder / "b", "--ensemble", "mean") as (_, client, _):
        rewards = client.post("/v1/rewards", json={"groups": GROUPS}).json()["rewards"]
    assert rewards == Ensemble.from_pretrained([folder / "a", folder / "b"]).score(GROUPS)
    with served(folder / "a", "--route", f"text={folder / 'b'}") as (_, client, _):
        rewards = client.post("/v1/rewards", json={"groups": GROUPS}).json()["rewards"]
    assert rewards == RewardModel.from_pretrained(folder / "b").score(GROUPS)


def test_two_workers_give_the_same_rewards_by_every_protocol_and_end_with_the_server(folder):
    model = RewardModel.from_pretrained(folder / "a")
    groups = [{"prompt": f"the cat {n}", "responses": ["yes", "no"]} for n in range(12)]
    with served(folder / "a", "--workers", "2") as (process, client, line):
        assert " by 2 workers at http://" in line
        found = client.post("/v1/rewards", json={"groups": groups}).json()["rewards"]
        for rewards, wanted in zip(found, model.score(groups), strict=True):
            assert rewards == pytest.approx(wanted, abs=1e-6)
        assert client.post("/v1/rewards", json={"groups": groups[1:2]}).json()["rewards"] == found[1:2]  # remembered
        counted = client.get("/metrics").text
        assert "fastrm_groups_total 12.0" in counted and "fastrm_reward_hits_total 2.0" in counted
        turns = [{"role": "user", "content": "the cat 1"}, {"role": "assistant", "content": "no"}]
        text = model.network.encoder.tokenizer.apply_chat_template(turns, tokenize=False)
        (answer,) = client.post("/classify", json={"input": text}).json()["data"]
        assert answer["probs"] == pytest.approx(found[1][1:], abs=1e-6)  # of another worker, where its hash says so
        named = {"prompt": "a", "images": ["/etc/hostname"], "responses": ["b"]}  # the rules for media go along
        (refused,) = client.post("/v1/rewards", json={"groups": [named]}).json()["rewards"]
        assert refused["error"]["code"] == "IMAGE_PATH"
        workers = psutil.Process(process.pid).children(recursive=True)
        named = [worker for worker in workers if "multiprocessing" in " ".join(worker.cmdline())]
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        assert psutil.wait_procs(workers, PATIENCE)[1] == [] and len(named) >= 2
        assert process.stderr.read().count("error") == 0


def test_a_token_of_the_environment_is_asked_for(folder):
    with served(folder / "a", token="secret") as (_, client, _):
        assert client.post("/v1/rewards", json={"groups": GROUPS}).status_code == 401
        answer = client.post("/v1/rewards", json={"groups": GROUPS}, headers={"Authorization": "Bearer secret"})
        assert answer.status_code == 200


HELD = """
import threading
from fastrm.serve.scheduler import Scheduler
from fastrm.serve.scorer import Scorer
is_ending, compute, stop = threading.Event(), Scorer.run, Scheduler.stop_accepting

def held(scorer, groups):
    is_ending.wait()
    return compute(scorer, groups)

def stopped(scheduler):
    stop(scheduler)
    is_ending.set()

Scorer.run, Scheduler.stop_accepting = held, stopped
"""


def test_what_was_accepted_is_answered_after_sigterm_and_what_comes_later_is_refused(folder):
    """Nothing is computed before the server knows of its end."""
    with served(folder / "a", before=HELD) as (process, client, _):
        answers = []
        asking = threading.Thread(target=lambda: answers.append(client.post("/v1/rewards", json={"groups": GROUPS})))
        asking.start()
        with httpx.Client(base_url=client.base_url, timeout=PATIENCE) as other:
            while not other.get("/health").json()["queue"]:
                time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0  # of a server that ends in time
        asking.join(PATIENCE)
        assert answers[0].status_code == 200 and len(answers[0].json()["rewards"]) == 2
        with pytest.raises(httpx.ConnectError):
            client.get("/health")


STUCK = """
import os, time
from fastrm.serve import command
from fastrm.serve.rendered_text import RenderedTextReader
from fastrm.serve.scorer import Scorer
command._DRAIN_SECONDS = 1

def stuck(*_, **__):
    os.write(1, b"stuck\\n")
    time.sleep(3600)

"""


@pytest.mark.parametrize(
    "name, path, leaves",
    [
        ("Scorer.run", "/v1/rewards", False),
        ("Scorer.prepare", "/v1/rewards", True),
        ("RenderedTextReader.read", "/get_reward", False),
    ],
)
def test_a_thread_that_is_stuck_does_not_keep_the_server_from_its_end(folder, name, path, leaves):
    body = {"query": ["a"]} if path == "/get_reward" else {"groups": GROUPS}
    with served(folder / "a", before=f"{STUCK}\n{name} = stuck") as (process, client, _):
        with closing(socket.create_connection(("127.0.0.1", client.base_url.port))) as asking:
            sent = json.dumps(body).encode()
            asking.sendall(b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s"
                           % (path.encode(), len(sent), sent))  # fmt: skip
            assert process.stdout.readline() == "stuck\n"
            if leaves:
                asking.close()
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 75
        assert json.loads(process.stderr.read().splitlines()[-1])["exit_code"] == 75


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["{a}", "{a}"], "two models are called"),
        (["x={a}", "x={b}"], "two models are called x"),
        (["{a}", "--host", "0.0.0.0"], "FASTRM_TOKEN"),
        (["{a}", "{b}", "--ensemble", "accuracy"], "--validation"),
        (["{a}/missing"], "missing"),
        (["{a}/missing", "--workers", "2"], "missing"),
    ],
)
def test_what_cannot_work_is_refused_with_its_reason(folder, capfd, arguments, text):
    words = [word.format(a=folder / "a", b=folder / "b") for word in arguments]
    code, said = fastrm_here(capfd, "serve", *words, "--port", "0")
    assert code == 64 and text in said
    assert json.loads(said.splitlines()[-1])["exit_code"] == 64


def test_a_port_in_use_is_named(folder, capfd):
    with served(folder / "a") as (_, client, _):
        port = client.base_url.port
        code, said = fastrm_here(capfd, "serve", folder / "a", "--port", port)
    assert code == 64 and f"--port {port}" in said and "in use" in said


def test_a_port_is_taken_before_the_models_are_loaded():
    with closing(open_port(ServeSettings(port=0))) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}: Address already in use"):
            open_port(ServeSettings(port=port))


def test_a_model_that_gives_no_rewards_is_not_served():
    model = RewardModel(make_model("qwen2"))
    with torch.no_grad():
        next(model.network.parameters()).fill_(torch.nan)
    with pytest.raises(DataError, match=r"member 1: cannot score even a short text or image: .*NON_FINITE_REWARD"):
        warm_up(Ensemble([model]))


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_the_commands_of_the_page_do_what_it_shows(folder, tmp_path):
    block = next(block for block in blocks("docs/serving.md", "console") if "fastrm serve" in block)
    serve, ready, ask, answer = block.splitlines()
    (model,) = words_of(serve.removeprefix("$ fastrm serve "))
    shutil.copytree(folder / "a", tmp_path / model)
    with served(model, cwd=tmp_path) as (_, client, line):
        address = f"127.0.0.1:{client.base_url.port}"
        assert line.strip() == ready.replace("127.0.0.1:8000", address)
        command = ask.removeprefix("$ ").replace("127.0.0.1:8000", address)
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=PATIENCE)
    found, shown = json.loads(done.stdout), json.loads(answer)
    assert list(found) == list(shown) and found["model"] == shown["model"]
    assert list(map(len, found["rewards"])) == list(map(len, shown["rewards"]))
    assert list(found["usage"]) == list(shown["usage"]) and found["usage"]["responses"] == shown["usage"]["responses"]
