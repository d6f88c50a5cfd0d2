"""Requests of every protocol with parts that do not belong there: an answer with a code, never a failure of the server.

Valid bodies are changed in up to two places, by chance with a fixed seed. `python -m pytest` runs 25 for each path.
"""

import base64
import json
import random

import pytest
from fastapi.testclient import TestClient

from fastrm.evaluate.ensemble import Ensemble
from fastrm.evaluate.reward_model import RewardModel
from fastrm.serve.app import make_app
from fastrm.serve.scheduler import Scheduler
from fastrm.serve.scorer import Scorer
from fastrm.serve.settings import ServeSettings
from tests.helpers.support import make_image, make_model

IMAGE = "data:image/png;base64," + base64.b64encode(make_image(56, 56).data).decode()
TEXT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
    "<|im_start|>assistant\nno<|im_end|>\n"
)
ASKED = TEXT.removesuffix("no<|im_end|>\n")
SEEN = TEXT.replace("Why?", "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>Why?")
PROMPT = {
    "role": "user",
    "content": [{"type": "image_url", "image_url": {"url": IMAGE}}, {"type": "text", "text": "a"}],
}
CHAT = [PROMPT, {"role": "assistant", "content": "no"}]
BODIES = {
    "/get_reward": [{"query": [SEEN, TEXT], "prompts": ["a", "b"], "labels": [{"images": [IMAGE]}, "x"]}],
    "/get_reward_mllm": [{"query": [TEXT], "prompts": [json.dumps(CHAT[:1])]}],
    "/classify": [
        {"input": [TEXT]}, {"messages": CHAT, "use_activation": True}, {"text": [SEEN], "image_data": [[IMAGE]]},
        {"input": [1, 2, 3]},
    ],
    "/pooling": [{"input": TEXT}, {"messages": CHAT, "task": "classify"}],
    "/score": [{"queries": {"content": PROMPT["content"]}, "documents": ["a", {"content": "b"}]}],
    "/v1/embeddings": [{"input": [{"text": SEEN, "image": IMAGE}]}, {"input": TEXT, "model": "tiny"}],
    "/slime": [{"prompt": CHAT[:1], "response": "x", "label": None}, {"prompt": ASKED, "response": "no", "label": 1}],
}  # fmt: skip


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


LEAVES = [
    None, True, -1, 10**30, 1.5, "", "a", "\0", "\ud800", "<image>", "<|im_end|>", "<|image_pad|>", TEXT, IMAGE, [], {},
    [1, 2], nested(600), "data:image/png;base64,aaaa", "http://host/a.png", "/etc/passwd", "file:///etc/passwd",
    {"role": "user", "content": "a"}, {"type": "text", "text": "x"}, {"images": "../x"},
]  # fmt: skip


def changed(chance, value, leaf):
    """The value with one place of it, by chance, become the leaf; texts get a text inside."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(list(value))
        return {**value, key: changed(chance, value[key], leaf)}
    if isinstance(value, list) and value and chance.random() < 0.85:
        place = chance.randrange(len(value))
        return [*value[:place], changed(chance, value[place], leaf), *value[place + 1 :]]
    if isinstance(value, str) and isinstance(leaf, str) and chance.random() < 0.6:
        place = chance.randrange(len(value) + 1)
        return value[:place] + leaf + value[place:]
    return leaf


@pytest.fixture(scope="module")
def client():
    scheduler = Scheduler([Scorer("tiny", Ensemble([RewardModel(make_model("qwen2_5_vl"))]), 8192)])
    with TestClient(make_app(scheduler, ServeSettings()), "http://localhost", raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("path", BODIES)
def test_odd_requests_are_answered_with_a_code(client, path):
    chance = random.Random(path)
    statuses = []
    for _ in range(25):
        body = chance.choice(BODIES[path])
        for _ in range(chance.randint(0, 2)):
            body = changed(chance, body, chance.choice(LEAVES))
        answer = client.post(path, content=json.dumps(body))
        statuses.append(answer.status_code)
        assert answer.status_code in (200, 400, 404, 413, 422), (body, answer.text)
        assert "NaN" not in answer.text and "Infinity" not in answer.text
        if answer.status_code != 200:
            assert answer.json()["error"]["code"].isupper(), (body, answer.text)
    assert len(set(statuses)) > 1, "all requests were right, or all wrong in the same way"


@pytest.mark.parametrize(
    "path, body, name",
    [
        ("/classify", {"input": []}, "input"),
        ("/pooling", {"input": []}, "input"),
        ("/classify", {"text": []}, "text"),
        ("/classify", {"input_ids": []}, "input_ids"),
        ("/v1/embeddings", {"input": []}, "input"),
        ("/score", {"queries": "a", "documents": []}, "documents"),
        ("/v1/score", {"queries": [], "documents": []}, "queries"),
    ],
)
def test_requests_for_nothing_are_refused_as_by_vllm_and_sglang(client, path, body, name):
    """A client that reads the first entry of an empty list would fail without a reason."""
    answer = client.post(path, json=body)
    error = {"code": "BAD_REQUEST", "message": f'"{name}" is [], wanted one entry or more'}
    assert (answer.status_code, answer.json()) == (400, {"error": error})


def test_the_message_of_a_group_does_not_repeat_its_code(client):
    answer = client.post("/score", json={"queries": "a", "documents": ["the cat " * 9000]})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (422, "TOO_LONG")
    assert error["message"].startswith("group 0: the group has ") and "TOO_LONG" not in error["message"]
