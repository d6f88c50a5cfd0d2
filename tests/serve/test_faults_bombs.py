"""Bombs by HTTP: refused by their codes and with little work, while others get their rewards.

`python -m pytest -m slow -s tests/serve/test_faults_bombs.py` sends 200 and prints what they cost.
"""

import gzip
import io
import itertools
import json
import random
import re
import struct
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock

import numpy as np
import psutil
from PIL import Image

from fastrm.evaluate.reward_model import RewardModel
from tests.helpers.killed_runs import server  # noqa: F401  (fixture)
from tests.helpers.request_bodies import GOOD, TEXT, data_uri
from tests.helpers.served import counts, folder, serving  # noqa: F401  (fixture)
from tests.helpers.support import make_image

MB = 2**20
CPU_SECONDS = (
    2.0  # of the server for a bomb and the good requests beside it; its wall time depends on the machine's load
)
MEMORY = 256 * MB  # that the server may have more while it refuses one


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, data):
    """A PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def declared(width, height):
    """A PNG that declares a size and holds next to nothing."""
    data = bytearray(encoded(Image.new("L", (1, 1)), "PNG"))
    data[12:33] = chunk(b"IHDR", struct.pack(">II", width, height) + data[24:29])[4:]
    return bytes(data)


def with_chunk(kind, data):
    """A good PNG with another chunk behind its header."""
    return GOOD_IMAGE[:33] + chunk(kind, data) + GOOD_IMAGE[33:]


def large_jpeg():
    data = bytearray(encoded(Image.new("L", (8, 8)), "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", 65_500, 65_500)
    return bytes(data)


def large_webp():
    """A WebP whose canvas is as large as the format allows."""
    body = b"VP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + (16_383).to_bytes(3, "little") * 2
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


GOOD_IMAGE = make_image(56, 56).data
ZEROS = zlib.compress(bytes(64 * MB), 9)
ALLOWED = "49 MP of one colour"  # which the default limit allows
# By name: the bytes, and the code of their refusal.
IMAGES = {
    "2,500 MP": (declared(50_000, 50_000), "IMAGE_TOO_LARGE"),
    "a million wide": (declared(10**6, 60), "IMAGE_TOO_LARGE"),
    "the widest": (declared(2**31 - 1, 1), "IMAGE_TOO_LARGE"),
    "no rows": (declared(56, 0), "IMAGE_DAMAGED"),
    "JPEG of 4,290 MP": (large_jpeg(), "IMAGE_TOO_LARGE"),
    "WebP of 268 MP": (large_webp(), "IMAGE_TOO_LARGE"),
    "144 MP of one colour": (encoded(Image.new("1", (12_000, 12_000)), "PNG"), "IMAGE_TOO_LARGE"),
    "text of 64 MiB": (with_chunk(b"zTXt", b"a\0\0" + ZEROS), "IMAGE_DAMAGED"),
    "profile of 64 MiB": (with_chunk(b"iCCP", b"a\0\0" + ZEROS), "IMAGE_DAMAGED"),
    "narrow": (encoded(Image.new("1", (30_000, 1)), "PNG"), "IMAGE_ASPECT"),
    "no bytes": (b"", "BAD_BASE64"),
    "GIF": (b"GIF89a", "IMAGE_FORMAT"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "IMAGE_FORMAT"),
    "cut": (GOOD_IMAGE[:-40], "IMAGE_DAMAGED"),
    ALLOWED: (encoded(Image.new("1", (7000, 7000)), "PNG"), None),
}
OTHERS = {
    "65 groups and more": lambda rng: ("/v1/rewards", json.dumps({"groups": [GOOD] * rng.randint(65, 5000)}), 413),
    "33 MiB": lambda _: ("/v1/rewards", '{"groups": ["' + "a" * 33 * MB + '"]}', 413),
    "1,025 responses and more": lambda rng: ("/score", documents("a", ["b"] * rng.randint(1025, 10**5)), 422),
    "long responses": lambda rng: ("/score", documents("a", long_responses(rng)), 422),
    "a long prompt": lambda rng: ("/score", documents("a " * rng.randint(10**5, 15 * MB), ["b"]), 422),
    "a long rendered text": lambda rng: ("/get_reward", rendered("a " * rng.randint(10**5, 15 * MB)), 422),
    "nested lists": lambda rng: ("/v1/rewards", "[" * rng.randint(10**4, 10**6), 400),
    "a long number": lambda rng: ("/v1/rewards", '{"groups": %s}' % ("9" * rng.randint(10**4, 10**6)), 400),
    "many keys": lambda rng: ("/v1/rewards", json.dumps(dict.fromkeys(range(rng.randint(10**4, 990_000)))), 400),
    "too many keys": lambda rng: ("/v1/rewards", json.dumps(dict.fromkeys(range(rng.randint(1_000_001, 2 * MB)))), 413),
    "32 MiB of lists": lambda _: ("/v1/rewards", '{"groups": [' + "[]," * (10 * MB) + "0]}", 413),
    "compressed": lambda _: ("/v1/rewards", ZIPPED, 400),
}  # fmt: skip
ZIPPED = gzip.compress(json.dumps({"groups": [GOOD]}).encode() + b" " * 64 * MB)


def long_responses(rng):
    return [f"{number} " + "b " * rng.randint(1000, 15_000) for number in range(1000)]


def rendered(text):
    return json.dumps({"query": [TEXT.replace("Why?", text)], "prompts": ["a"]})


def documents(query, texts):
    return json.dumps({"queries": query, "documents": texts})


def image_body(path, data):
    """A request with an image; one of /v1/rewards asks for another group besides."""
    uri = data_uri(data)
    if path == "/v1/rewards":
        return json.dumps({"groups": [{"prompt": "a", "images": [uri], "responses": ["b"]}, GOOD]}).encode()
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "a"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "b"}]
    return json.dumps({"messages": turns}).encode()


class Bombs:
    """Sends bombs one after another, and keeps the most that each kind cost the server.

    Attributes:
        costs: by kind, the seconds of its CPU and until the answer, and the MiB that it had more meanwhile.
    """

    def __init__(self, served, wanted):
        self._client, self._process, self._wanted = served.client(), psutil.Process(served.pid), wanted
        self.costs, self.statuses = {}, Counter()

    def image(self, name, path, body, code):
        status, answer = self._ask(name, path, body)
        if path == "/v1/rewards":
            assert status == 200 and answer["rewards"][1] == self._wanted
            answer = answer["rewards"][0]
        if code is None:
            assert status == 200 and "error" not in answer, (name, answer)
        else:
            assert answer["error"]["code"] == code and status in (200, 422), (name, answer)

    def other(self, name, path, body, wanted):
        status, answer = self._ask(name, path, body)
        assert status == wanted and answer["error"]["code"].isupper(), (name, answer)

    def _ask(self, name, path, body):
        self._forget_peak()
        cpu, memory, started = self._cpu(), self._process.memory_info().rss, time.perf_counter()
        status, _, text = self._client.ask("POST", path, body, {"Content-Encoding": "gzip"} if body is ZIPPED else {})
        cost = (self._cpu() - cpu, time.perf_counter() - started, (self._peak() - memory) / MB)
        assert cost[0] <= CPU_SECONDS and (cost[2] <= MEMORY / MB or name == ALLOWED), (name, cost)
        self.costs[name] = tuple(map(max, cost, self.costs.get(name, (0, 0, 0))))
        self.statuses[status] += 1
        return status, json.loads(text)

    def _cpu(self):
        return sum(self._process.cpu_times()[:2])

    def _forget_peak(self):
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")

    def _peak(self):
        text = Path(f"/proc/{self._process.pid}/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", text)[1])


def ask_until(served, ended, making):
    """Ask for a group after another: the groups, their rewards, and the seconds of each answer.

    While a bomb is made, which takes this process a second, nothing is asked.
    """
    client, rng, groups, rewards, seconds = served.client(), random.Random(0), [], [], []
    while not ended.is_set():
        groups.append({**GOOD, "prompt": f"the cat {rng.random()}"})
        with making:
            started = time.perf_counter()
            status, _, text = client.ask("POST", "/v1/rewards", json.dumps({"groups": groups[-1:]}).encode())
            seconds.append(time.perf_counter() - started)
        assert status == 200, text
        rewards += json.loads(text)["rewards"]
        ended.wait(0.02)
    return groups, rewards, seconds


def make(name, rng):
    """A bomb of a kind: its path, its body, and its status or the code of an image."""
    if name in OTHERS:
        path, body, status = OTHERS[name](rng)
        return path, body.encode() if isinstance(body, str) else body, status
    path, (data, code) = rng.choice(["/v1/rewards", "/classify", "/pooling"]), IMAGES[name]
    return path, image_body(path, data), code


@counts(28, 200)
def test_bombs_are_refused_by_their_codes_while_others_are_served(server, folder, tmp_path, count):  # noqa: F811
    rng, model, ended, making = random.Random(count), RewardModel.from_pretrained(folder), Event(), Lock()
    kinds = itertools.cycle([*IMAGES, *OTHERS])
    with serving(server, folder, tmp_path / "log") as served, ThreadPoolExecutor(1) as thread:
        bombs = Bombs(served, model.score([GOOD])[0])
        bombs.image("good", "/v1/rewards", image_body("/v1/rewards", GOOD_IMAGE), None)
        asking = thread.submit(ask_until, served, ended, making)
        try:
            for name in itertools.islice(kinds, count):
                with making:
                    bomb = make(name, rng)
                (bombs.other if name in OTHERS else bombs.image)(name, *bomb)
        finally:
            ended.set()
        groups, rewards, seconds = asking.result()
    for name, (cpu, wall, memory) in sorted(bombs.costs.items(), key=lambda item: -item[1][0]):
        print(f"{name}: at most {cpu:.2f} s of the CPU, {wall:.2f} s until the answer, {memory:.0f} MiB")
    print(f"{count} bombs: {bombs.statuses}")
    print(f"{len(groups)} good requests meanwhile, the slowest {max(seconds):.2f} s, median {np.median(seconds):.3f} s")
    assert rewards == model.score(groups)
