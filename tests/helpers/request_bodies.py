"""Bodies that each path of a reward server answers, and what strangers make of them."""

import base64
import json
import random
import string
from collections.abc import Iterator

from tests.helpers.support import make_image


def data_uri(image: bytes) -> str:
    """The data URI of a PNG file's bytes, or of bytes that say they are one."""
    return "data:image/png;base64," + base64.b64encode(image).decode()


GOOD = {"prompt": "the cat", "responses": ["yes", "no", "so", "a"]}
# A group that no other request makes: its rewards are neither remembered nor computed with those of others.
NEW = {**GOOD, "prompt": "a red dog sits on a blue cat"}
URI = data_uri(make_image(56, 56).data)
USER = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": URI}}, {"type": "text", "text": "Is"}]}
TURNS = [USER, {"role": "assistant", "content": "yes"}]
TEXT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
    "<|im_start|>assistant\nno<|im_end|>\n"
)
# A body that each path answers, by path and form.
BODIES = {
    "/v1/rewards": {"groups": [GOOD, {"messages": [USER], "responses": ["no"]}]},
    "/get_reward": {"query": [TEXT], "prompts": ["a"], "labels": ["b"]},
    "/get_reward_mllm": {"query": [TEXT], "prompts": [json.dumps([USER])]},
    "/v1/embeddings": {"input": TEXT, "model": "tiny"},
    "/classify": {"messages": TURNS},
    "/classify?input": {"input": [TEXT]},
    "/classify?text": {"text": [TEXT]},
    "/pooling": {"messages": TURNS},
    "/pooling?input": {"input": TEXT},
    "/score": {"queries": "the cat", "documents": ["yes", "no"]},
    "/slime": {"prompt": [{"role": "user", "content": "the cat"}], "response": "yes", "label": None},
}
STRANGE = [
    None, True, 0, -1, 1e308, 10**400, "", " ", "\0", "\ud800", "<|image_pad|>", "<|im_end|>", "a" * 10_000, [], {},
    [[]], "../../etc/passwd", "http://127.0.0.1/", URI, "data:image/png;base64,!!", {"role": "user"}, ["a"] * 100,
]  # fmt: skip
METHODS = ["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "HEAD", "TRACE", "BREW"]
PATHS = [*BODIES, "/", "/health", "/metrics", "/activity", "/v1/models", "/page/page.js", "/nowhere", "/page/../health"]
HEADERS = ["Content-Type", "Accept", "Accept-Encoding", "Content-Encoding", "Expect-Not", "Origin", "Host", "Range",
           "X-Forwarded-For", "Authorization", "Cookie", "If-None-Match", "Upgrade-Not", "Via"]  # fmt: skip


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The places of a JSON value and of all values in it."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def at(value: object, path: tuple) -> object:
    for key in path:
        value = value[key]
    return value


def changed(value: object, path: tuple, new: object) -> object:
    """A copy of a JSON value with another at a place."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(copy[path[0]], path[1:], new)
    return copy


def mutated(rng: random.Random) -> tuple[str, bytes]:
    """A path, and a body that is a good one with one to three changes, or its text with bytes replaced."""
    path = rng.choice(list(BODIES))
    body = BODIES[path]
    for _ in range(rng.randint(1, 3)):
        body = changed(body, rng.choice(list(places(body))), rng.choice(STRANGE))
    text = json.dumps(body).encode()
    if rng.random() < 0.3:
        start = rng.randrange(len(text))
        text = text[:start] + rng.randbytes(rng.randint(0, 8)) + text[start + rng.randint(0, 8) :]
    return path, text


def unstructured(rng: random.Random) -> tuple[str, str, bytes, dict[str, str]]:
    """Any method, path, bytes and headers that HTTP allows."""
    path = rng.choice(PATHS)
    if rng.random() < 0.5:
        path += "".join(f"%{byte:02x}" for byte in rng.randbytes(rng.randint(1, 20)))
    values = string.ascii_letters + string.digits + string.punctuation
    headers = {
        name: "".join(rng.choices(values, k=rng.randint(0, 60))) for name in rng.sample(HEADERS, rng.randint(0, 3))
    }
    return rng.choice(METHODS), path, rng.randbytes(rng.choice([0, 1, 100, 5000])), headers
