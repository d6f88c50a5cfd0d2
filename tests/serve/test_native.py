"""POST /v1/rewards, /v1/models and /health in process: answers, errors in their places, and bounds."""

import base64

import pytest
from fastapi.testclient import TestClient

from fastrm.evaluate.ensemble import Ensemble
from fastrm.serve.app import make_app
from fastrm.serve.scheduler import Scheduler
from fastrm.serve.scorer import Scorer
from fastrm.serve.settings import ServeSettings
from tests.helpers.support import make_image


@pytest.fixture
def client(model):
    settings = ServeSettings(max_body_bytes=100_000, max_groups=4)
    scheduler = Scheduler([Scorer("tiny", Ensemble([model]), 8192)])
    with TestClient(make_app(scheduler, settings), "http://localhost", raise_server_exceptions=False) as client:
        yield client


def data_uri(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def test_rewards_are_those_of_the_model(model, client):
    image = make_image(84, 56).data
    groups = [
        {"prompt": "the cat", "responses": ["yes", "no", ""]},
        {"prompt": "Is this red?", "images": [image], "responses": ["yes", "so", "no"]},
        {
            "messages": [{"role": "system", "content": "the"}, {"role": "user", "content": "Is this?"}],
            "responses": ["a dog", "so"],
        },
    ]
    sent = [groups[0], {**groups[1], "images": [data_uri(image)]}, groups[2]]
    answer = client.post("/v1/rewards", json={"groups": sent})
    assert answer.status_code == 200
    body = answer.json()
    assert body["rewards"] == model.score(groups) and body["model"] == "tiny"
    assert body["usage"]["groups"] == 3 and body["usage"]["responses"] == 8


def test_an_error_stands_in_the_place_of_its_group(model, client):
    good = {"prompt": "the cat", "responses": ["yes", "no", "so", "a"]}
    body = client.post("/v1/rewards", json={"groups": [{"prompt": "a"}, good]}).json()
    assert body["rewards"][0]["error"]["code"] == "BAD_ROW"
    assert body["rewards"][1:] == model.score([good])


@pytest.mark.parametrize(
    "body, status, code",
    [
        (b"", 400, "BAD_JSON"),
        (b"{", 400, "BAD_JSON"),
        (b"\xff", 400, "BAD_JSON"),
        (b"[" * 50_000, 400, "BAD_JSON"),
        (b"[]", 400, "BAD_REQUEST"),
        (b'{"groups": 1}', 400, "BAD_REQUEST"),
        (b'{"groups": [], "groups": []}', 400, "DUPLICATE_KEY"),
        (b'{"groups": [], "temperature": 1}', 400, "UNKNOWN_KEY"),
        (b'{"groups": [], "model": "other"}', 404, "MODEL_UNKNOWN"),
        (b'{"groups": [], "model": ["tiny"]}', 404, "MODEL_UNKNOWN"),
        (b'{"groups": [1, 2, 3, 4, 5]}', 413, "REQUEST_TOO_LARGE"),
        (b" " * 100_001, 413, "REQUEST_TOO_LARGE"),
    ],
)
def test_bad_requests_are_named(client, body, status, code):
    answer = client.post("/v1/rewards", content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_a_body_without_a_length_is_bounded_too(client):
    answer = client.post("/v1/rewards", content=iter([b" " * 60_000] * 2))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "REQUEST_TOO_LARGE")


def test_health_models_and_unknown_paths(client):
    assert client.get("/health").json() == {"status": "ok", "queue": 0}
    assert [entry["id"] for entry in client.get("/v1/models").json()["data"]] == ["tiny"]
    for method, path, status, code in (
        ("get", "/nowhere", 404, "NOT_FOUND"),
        ("get", "/v1/rewards", 405, "METHOD_NOT_ALLOWED"),
    ):
        answer = client.request(method, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
