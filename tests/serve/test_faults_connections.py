"""Clients that send slowly, half or nothing, leave before their answer, or come in crowds: others are served meanwhile.

`python -m pytest -m slow -s tests/serve/test_faults_connections.py` holds 1,000 bad connections for ten minutes,
prints the latency of good clients without and with them, and sends 10,000 requests to a queue of 8 groups.
"""

import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np
import psutil
import pytest

from fastrm.evaluate.reward_model import RewardModel
from tests.helpers.bad_connections import HEAD
from tests.helpers.killed_runs import server  # noqa: F401  (fixture)
from tests.helpers.own_process import environment
from tests.helpers.request_bodies import NEW
from tests.helpers.served import folder, serving  # noqa: F401  (fixture)
from tests.helpers.waiting import PATIENCE, wait_until


@contextmanager
def crowd(served, count):
    """Keep so many bad connections until the block is left; yields what it was at the end, with "opened" and "left"."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.bad_connections", str(served.port), str(count)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    found = {}
    try:
        assert process.stdout.readline() == "open\n"
        yield found
        process.stdin.close()
        found.update(json.loads(process.stdout.readline()))
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()


def latencies(served, seconds):
    """The seconds that each request of four good clients takes, one after another."""

    def ask(number):
        client, found, end = served.client(), [], time.monotonic() + seconds
        rng = random.Random(number)
        while time.monotonic() < end or not found:
            group = {"prompt": f"the cat {rng.random()}", "responses": ["yes", "no"]}
            started = time.perf_counter()
            status, _, text = client.ask("POST", "/v1/rewards", json.dumps({"groups": [group]}).encode())
            found.append(time.perf_counter() - started)
            assert status == 200, text
            time.sleep(0.01)
        return found

    with ThreadPoolExecutor(4) as clients:
        return np.concatenate(list(clients.map(ask, range(4))))


def settled(served):
    """The number of tasks and of files, once it has not changed for half a second, with nothing in the queue."""
    process, found = psutil.Process(served.pid), []

    def is_still():
        found.append((served.num_tasks(), process.num_fds()))
        time.sleep(0.05)
        return len(found) >= 10 and len(set(found[-10:])) == 1

    wait_until(is_still)
    return found[-1]


@pytest.mark.parametrize("count, rounds, seconds", [(30, 2, 1), pytest.param(1000, 5, 120, marks=pytest.mark.slow)])
def test_bad_connections_keep_nobody_waiting_and_leave_nothing(server, folder, tmp_path, count, rounds, seconds):  # noqa: F811
    """Rounds without and with bad connections take turns, so that other work on the machine is in both."""
    with serving(server, folder, tmp_path / "log", patch="watched_serving.counting_tasks") as served:
        latencies(served, 0.2)
        before, alone, beside, bad = settled(served), [], [], Counter()
        for _ in range(rounds):
            alone.append(latencies(served, seconds / 2))
            with crowd(served, count) as found:
                beside.append(latencies(served, seconds))
            assert found["opened"] >= count and found["left"]
            bad.update(found)
            wait_until(lambda: settled(served) == before)
        for name, all_rounds in (("without", alone), ("with", beside)):
            p99 = " ".join(f"{1000 * np.quantile(one, 0.99):.1f}" for one in [np.concatenate(all_rounds), *all_rounds])
            print(f"{name} bad connections: {sum(map(len, all_rounds))} requests, p99 in ms of all and by round {p99}")
        print(f"{count} bad connections at a time, {rounds} rounds of {seconds} s: {dict(bad)}")
        status, _, text = served.client().ask("POST", "/v1/rewards", json.dumps({"groups": [NEW]}).encode())
        assert status == 200 and json.loads(text)["rewards"] == RewardModel.from_pretrained(folder).score([NEW])


@pytest.mark.slow
@pytest.mark.parametrize("count", [10_000])
def test_ten_times_as_much_as_the_queue_holds(server, folder, tmp_path, count):  # noqa: F811
    """80 clients ask at once for a group each, a tenth of them leaving before the answer; the queue has 8 places."""
    num_clients, bound = 80, 8
    with serving(
        server, folder, tmp_path / "log", "--max-queue", bound, patch="watched_serving.counting_tasks"
    ) as served:
        before, lengths, ended = settled(served), [], threading.Event()

        def watch():
            client = served.client()
            while not ended.wait(0.01):
                lengths.append(json.loads(client.ask("GET", "/health")[2])["queue"])
            client.close()

        def ask(number):
            client, statuses = served.client(), Counter()
            for turn in range(number, count, num_clients):
                text = json.dumps({"groups": [{"prompt": f"the cat {turn}", "responses": ["yes", "no"] * 8}]}).encode()
                if turn % 10 == 0:
                    with suppress(OSError), served.connect() as sock:
                        sock.sendall(HEAD % len(text) + text)
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # closes by a reset
                    statuses["left"] += 1
                    continue
                status, headers, answer = client.ask("POST", "/v1/rewards", text)
                statuses[status] += 1
                if status == 503:
                    assert int(headers["Retry-After"]) > 0
                    assert json.loads(answer)["error"]["code"] == "QUEUE_FULL"
            client.close()
            return statuses

        watching = threading.Thread(target=watch)
        watching.start()
        with ThreadPoolExecutor(num_clients) as clients:
            statuses = sum(clients.map(ask, range(num_clients)), Counter())
        ended.set()
        watching.join()
        print(f"{count} requests of {num_clients} clients: {statuses}, at most {max(lengths)} of {bound} groups waited")
        assert statuses.keys() == {200, 503, "left"} and max(lengths) <= bound
        wait_until(lambda: settled(served) == before)
