"""SIGTERM while many ask: what was accepted is answered, and the server ends in time.

`python -m pytest -m slow -s tests/serve/test_faults_stops.py` stops 100 servers and prints how long they took.
"""

import http.client
import json
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from tests.helpers.killed_runs import server  # noqa: F401  (fixture)
from tests.helpers.request_bodies import GOOD
from tests.helpers.served import counts, folder, serving  # noqa: F401  (fixture)

NUM_CLIENTS = 8


def ask_until_it_ends(served, number, asked):
    """Ask for two groups after another until nobody listens; the prompts that were answered, and all statuses."""
    answered, statuses = set(), Counter()
    client = served.client()
    for turn in range(10**6):
        prompts = [f"{number} {turn} {part}" for part in "ab"]
        body = json.dumps({"groups": [{**GOOD, "prompt": prompt} for prompt in prompts]}).encode()
        try:
            status, headers, text = client.ask("POST", "/v1/rewards", body)
        except (OSError, http.client.HTTPException):
            return answered, statuses
        statuses[status] += 1
        if status == 200:
            assert [len(rewards) for rewards in json.loads(text)["rewards"]] == [4, 4]
            answered.update(prompts)
        else:
            assert (status, json.loads(text)["error"]["code"]) == (503, "CLOSING") and headers["Retry-After"], text
        asked.set()


def stop(server, folder, log, seconds):  # noqa: F811
    """Stop a server so long after its first answer; the seconds until its end, and what its clients saw."""
    asked = threading.Event()
    with (
        serving(server, folder, log, patch="watched_serving.telling_what_is_accepted") as served,
        ThreadPoolExecutor(NUM_CLIENTS) as clients,
    ):
        asking = [clients.submit(ask_until_it_ends, served, number, asked) for number in range(NUM_CLIENTS)]
        asked.wait()
        time.sleep(seconds)
        os.kill(served.pid, signal.SIGTERM)
        started = time.monotonic()
        code = served.wait()
        taken = time.monotonic() - started
        found = [one.result() for one in asking]
        accepted = set(re.findall(r"^accepted (.*)$", log.read_text(), re.MULTILINE))
    assert code == 0, log.read_text()
    answered = set().union(*(prompts for prompts, _ in found))
    assert accepted and accepted == answered
    return taken, sum((statuses for _, statuses in found), Counter())


@counts(2, 100)
def test_what_was_accepted_is_answered_before_the_end(server, folder, tmp_path, count):  # noqa: F811
    rng, taken, statuses = random.Random(count), [], Counter()
    for number in range(count):
        seconds, found = stop(server, folder, tmp_path / f"{number}.log", rng.random())
        taken.append(seconds)
        statuses += found
    print(f"{count} stops: {statuses}; at most {max(taken):.2f} s until the end, mean {sum(taken) / count:.2f} s")
