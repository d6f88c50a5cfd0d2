"""A server's rewards are those of `fastrm score`, in whatever requests, order and company they are asked for.

`python -m pytest -m slow -s tests/serve/test_faults_equality.py` asks for 1,000 pairs in three ways.
"""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.helpers.killed_runs import server  # noqa: F401  (fixture)
from tests.helpers.request_bodies import data_uri
from tests.helpers.served import counts, folder, serving  # noqa: F401  (fixture)
from tests.helpers.support import make_image, words

BAND = 1e-6  # docs/serving.md, company and order
NUM_CLIENTS = 24


def make_pairs(count):
    """Pairs of responses to prompts of their own, every fourth with an image."""
    rng = np.random.default_rng(count)
    pairs = []
    for number in range(count):
        responses = [words(rng, int(rng.integers(1, 40))) + f" {side}" for side in "ab"]
        pair = {"prompt": words(rng, int(rng.integers(2, 60))), "responses": responses}
        if number % 4 == 0:
            size = [int(side) for side in rng.integers(28, 140, 2)]
            pair["images"] = [data_uri(make_image(*size, seed=number).data)]
        pairs.append(pair)
    return pairs


def alone(pairs, rng):
    """Requests for a response each: lists of places, and the groups for them."""
    asked = [(number, side) for number in range(len(pairs)) for side in (0, 1)]
    rng.shuffle(asked)
    return [([place], [{**pairs[place[0]], "responses": [pairs[place[0]]["responses"][place[1]]]}]) for place in asked]


def in_pairs(pairs, rng):
    """Requests for a pair each, some of them turned."""
    return [one for number in rng.sample(range(len(pairs)), len(pairs)) for one in together(pairs, [number], rng)]


def in_batches(pairs, rng):
    """Requests for up to 64 pairs, some of them turned."""
    left, requests = rng.sample(range(len(pairs)), len(pairs)), []
    while left:
        size = rng.randint(1, 64)
        requests += together(pairs, left[:size], rng)
        left = left[size:]
    return requests


def together(pairs, numbers, rng):
    sides = [rng.sample((0, 1), 2) for _ in numbers]
    groups = [
        {**pairs[number], "responses": [pairs[number]["responses"][side] for side in two]}
        for number, two in zip(numbers, sides, strict=True)
    ]
    return [([(number, side) for number, two in zip(numbers, sides, strict=True) for side in two], groups)]


@pytest.fixture(scope="module", params=[40, pytest.param(1000, marks=pytest.mark.slow)])
def scored(request, server, folder, tmp_path_factory):  # noqa: F811
    """Pairs, and their rewards by `fastrm score`."""
    pairs, place = make_pairs(request.param), tmp_path_factory.mktemp("scored")
    rows, out, log = place / "pairs.jsonl", place / "rewards.jsonl", place / "log"
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    server.command(["score", folder, rows, "--out", out], log)
    assert server.wait() == 0, log.read_text()
    return pairs, np.array([json.loads(line)["rewards"] for line in out.read_text().splitlines()])


@pytest.mark.parametrize("way", [alone, in_pairs, in_batches])
def test_rewards_are_those_of_the_command_in_any_company_and_order(server, folder, scored, tmp_path, way):  # noqa: F811
    pairs, wanted = scored
    requests, found = way(pairs, random.Random(len(pairs))), np.full_like(wanted, np.nan)

    with serving(server, folder, tmp_path / "log") as served, ThreadPoolExecutor(NUM_CLIENTS) as clients:

        def ask(groups):
            client = served.client()
            status, _, text = client.ask("POST", "/v1/rewards", json.dumps({"groups": groups}).encode())
            client.close()
            assert status == 200, text
            return [reward for rewards in json.loads(text)["rewards"] for reward in rewards]

        for (places, _), rewards in zip(requests, clients.map(ask, [groups for _, groups in requests]), strict=True):
            found[tuple(np.transpose(places))] = rewards
    worst, margins = np.abs(found - wanted).max(), np.diff(wanted)
    flipped = (np.diff(found) > 0) != (margins > 0)
    print(f"{len(pairs)} pairs {way.__name__}: at most {worst:.1e} from the command's, {flipped.sum()} flips")
    assert worst <= BAND
    assert not (flipped & (np.abs(margins) > 2 * BAND)).any()
