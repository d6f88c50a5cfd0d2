"""Whatever bytes a stranger sends: an answer with a code, no file opened, and a server that works afterwards.

`python -m pytest -m slow -s tests/serve/test_faults_bodies.py` sends 100,000 requests and every payload in every text.
"""

import json
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from fastrm.evaluate.reward_model import RewardModel
from tests.helpers.killed_runs import server  # noqa: F401  (fixture)
from tests.helpers.request_bodies import BODIES, NEW, at, changed, mutated, places, unstructured
from tests.helpers.served import counts, folder, serving  # noqa: F401  (fixture)

NUM_CLIENTS = 4
# 403: a header named another host or page.
STATUSES = {200, 400, 403, 404, 405, 413, 422}
PAYLOADS = [
    "/etc/hostname", "file:///etc/hostname", "file://localhost/etc/passwd", "../../../../etc/hostname", "..", ".", "~",
    "/proc/self/environ", "/proc/self/fd/0", "/dev/zero", "/dev/tcp/127.0.0.1/9", "\\\\127.0.0.1\\a\\b.png",
    "/etc/hostname\0.png", "....//....//etc/passwd", "%2e%2e%2fetc%2fpasswd", "http://169.254.169.254/latest/meta-data",
    "http://localhost:9/a.png", "https://example.org/a.png", "http://127.0.0.9/a.png", "http://[::1]:9/a.png",
    "http://0x7f.1:9/a.png", "http://2130706433:9/", "HTTP://LOCALHOST:9/", "ftp://127.0.0.9/a", "gopher://127.0.0.9:70/",
    "//127.0.0.9/a.png", "jar:file:///etc/hostname!/a", "php://filter/resource=/etc/passwd", "dict://127.0.0.9:11211/",
    "<img src=http://127.0.0.9/>", "<image>/etc/hostname</image>", "{{config}}", "$(cat /etc/passwd)", "`id`",
    "hf://datasets/a/b", "s3://a/b.png", "data:text/plain,/etc/hostname", "data:image/png;base64,L2V0Yy9ob3N0bmFtZQ==",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(folder):  # noqa: F811
    return RewardModel.from_pretrained(folder)


def check_works(model, client):
    _, _, text = client.ask("POST", "/v1/rewards", json.dumps({"groups": [NEW]}).encode())
    assert json.loads(text)["rewards"] == model.score([NEW])
    assert json.loads(client.ask("GET", "/health")[2])["queue"] == 0


def test_the_bodies_that_are_changed_are_answered_as_they_are(server, folder, tmp_path):  # noqa: F811
    with serving(server, folder, tmp_path / "log") as served:
        client = served.client()
        for path, body in BODIES.items():
            status, _, text = client.ask("POST", path, json.dumps(body).encode())
            assert status == 200, (path, text)


def test_the_pages_files_are_sent_whole_whatever_range_is_asked(server, folder, tmp_path):  # noqa: F811
    with serving(server, folder, tmp_path / "log") as served:
        client = served.client()
        for path in ("/", "/page/page.js"):
            whole = client.ask("GET", path)
            for asked in ("bytes=0-3", "bytes=9999999-", "x", "bytes=9-1"):
                status, headers, text = client.ask("GET", path, headers={"Range": asked})
                assert (status, text) == (200, whole[2]) and headers["Content-Type"].startswith("text/")


def send(client, rng):
    """Send a request, one in five of any form; its status."""
    if rng.random() < 0.2:
        method, path, body, headers = unstructured(rng)
    else:
        method, headers, (path, body) = "POST", {}, mutated(rng)
    status, _, text = client.ask(method, path, body, headers)
    assert status in STATUSES, (method, path, body, headers, status, text)
    if status != 200 and method != "HEAD":
        assert json.loads(text)["error"]["code"].isupper(), (method, path, body, headers, text)
    elif status == 200 and method == "POST":
        assert b"NaN" not in text and b"Infinity" not in text
        json.loads(text)
    return status


def ask_for_the_largest(client):
    """Ask for as much at once as the server computes in one pack, whose memory is not given back to the system."""
    group = {"prompt": "a", "responses": [f"{number} " + "the cat " * 800 for number in range(12)]}
    status, _, text = client.ask("POST", "/v1/rewards", json.dumps({"groups": [group]}).encode())
    usage = json.loads(text)["usage"]
    assert status == 200 and 20_000 < usage["total_tokens"] <= 32_768, usage


@counts(320, 100_000)
def test_no_request_breaks_the_server_and_every_error_has_a_code(server, folder, model, tmp_path, count):  # noqa: F811
    with serving(server, folder, tmp_path / "log") as served:
        process, seen, started = psutil.Process(served.pid), Counter(), time.monotonic()

        def send_many(part, number):
            client, rng = served.client(), random.Random(f"{count} {part} {number}")
            found = Counter(send(client, rng) for _ in range(count // 10 // NUM_CLIENTS))
            client.close()
            return found

        ask_for_the_largest(served.client())
        memory = []
        with ThreadPoolExecutor(NUM_CLIENTS) as clients:
            for part in range(10):
                seen.update(sum(clients.map(send_many, [part] * NUM_CLIENTS, range(NUM_CLIENTS)), Counter()))
                memory.append(process.memory_info().rss)
                print(f"{seen.total()} requests, {time.monotonic() - started:.0f} s, {memory[-1] / 1e6:.1f} MB, {seen}")
        assert {200, 400, 404, 405, 422} <= seen.keys()
        if count >= 100_000:  # the first 10,000 warm up
            assert memory[-1] <= 1.05 * memory[0]
        check_works(model, served.client())


@counts(300, len(PAYLOADS) * 30)
def test_no_text_of_a_request_opens_a_file_or_an_address(server, folder, tmp_path, count):  # noqa: F811
    asked = [
        (path, json.dumps(changed(body, place, payload)).encode())
        for path, body in BODIES.items()
        for place in places(body)
        if isinstance(at(body, place), str)
        for payload in PAYLOADS
    ]
    if count < len(asked):
        asked = random.Random(count).sample(asked, count)
    with serving(server, folder, tmp_path / "log", patch="watched_serving.telling_what_is_opened") as served:
        client = served.client()
        for path, body in BODIES.items():
            client.ask("POST", path, json.dumps(body).encode())
        before = len(served.lines("opened"))
        assert before  # the model was opened
        statuses = Counter(client.ask("POST", *one)[0] for one in asked)
        print(f"{len(asked)} payloads: {statuses}")
        assert served.lines("opened")[before:] == []
        assert statuses.keys() <= STATUSES and statuses.keys() - {200}
