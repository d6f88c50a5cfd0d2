"""Clients that send slowly, half or nothing, leave before their answer, or come in crowds: others are served meanwhile.

`python -m pytest -m slow -s tests/serve/test_faults_connections.py` holds 1,000 bad connections for ten minutes, prints
the latency of good clients without and with them, and sends 10,000 requests to a queue of 8 groups.
"""

import itertools
import json
import random
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import psutil
import pytest

from fastrm.evaluate.reward_model import RewardModel
from tests.helpers.killed_runs import server  # noqa: F401  (fixture)
from tests.helpers.request_bodies import GOOD
from tests.helpers.served import folder, serving  # noqa: F401  (fixture)
from tests.helpers.waiting import wait_until

START = b"POST /v1/rewards HTTP/1.1\r\nHost: localhost\r\n"
HEAD = START + b"Content-Length: %d\r\n\r\n"
WHOLE = json.dumps({"groups": [GOOD]}).encode()
# What a bad client sends at once, and goes on with byte by byte.
KINDS = {
    "slow line": (b"POST /v1/rew", b"a"),
    "slow headers": (START + b"X-A: ", b"a"),
    "half body": (HEAD % 10_000 + WHOLE[:20], b" "),
    "slow chunks": (START + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "silent": (b"", b""),
    "hang-up": (HEAD % len(WHOLE) + WHOLE, None),
}


def hold(served, count, ended):
    """Keep so many bad connections until the event; return how often one was opened."""
    kinds, opened = itertools.cycle(KINDS), 0
    held = {}
    while not ended.is_set():
        while len(held) < count and not ended.is_set():
            first, more = KINDS[next(kinds)]
            sock, opened = served.connect(), opened + 1
            sock.sendall(first)
            if more is None:
                sock.close()
                break  # as many hang-ups as rounds
            sock.setblocking(False)
            held[sock] = more
        for sock, more in list(held.items()):
            try:
                sock.send(more)
                is_open = sock.recv(65536) != b""
            except BlockingIOError:
                is_open = True
            except OSError:
                is_open = False
            if not is_open:  # the server gave it up
                sock.close()
                del held[sock]
        ended.wait(0.05)
    for sock in held:
        sock.close()
    return opened


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


@pytest.mark.parametrize("count, seconds", [(30, 1), pytest.param(1000, 600, marks=pytest.mark.slow)])
def test_bad_connections_keep_nobody_from_an_answer_and_leave_nothing(server, folder, tmp_path, count, seconds):  # noqa: F811
    with serving(server, folder, tmp_path / "log", patch="watched_serving.counting_tasks") as served:
        latencies(served, 0.2)
        before = settled(served)
        alone = latencies(served, min(seconds, 60))
        ended = threading.Event()
        with ThreadPoolExecutor(1) as thread:
            holding = thread.submit(hold, served, count, ended)
            try:
                beside = latencies(served, seconds)
            finally:
                ended.set()
        opened = holding.result()
        p99 = [1000 * np.quantile(found, 0.99) for found in (alone, beside)]
        print(f"{opened} bad connections, {count} at a time; {len(alone)} and {len(beside)} good requests")
        print(f"p99 of latency alone {p99[0]:.1f} ms, beside them {p99[1]:.1f} ms, {p99[1] / p99[0]:.2f} times")
        assert opened >= count
        wait_until(lambda: settled(served) == before)
        status, _, text = served.client().ask("POST", "/v1/rewards", WHOLE)
        assert status == 200 and json.loads(text)["rewards"] == RewardModel.from_pretrained(folder).score([GOOD])


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
