"""The token on every route, bounds of the body's time, and the figures of /metrics."""

import base64

import pytest
from fastapi.testclient import TestClient

from fastrm.errors import ConfigError
from fastrm.evaluate.ensemble import Ensemble
from fastrm.serve.app import make_app
from fastrm.serve.caches import BoundedCache
from fastrm.serve.command import check_host
from fastrm.serve.gate import OPEN_PATHS
from fastrm.serve.scheduler import Scheduler
from fastrm.serve.scorer import Scorer
from fastrm.serve.settings import ServeSettings
from tests.helpers.served import routes_of
from tests.helpers.support import make_image

TOKEN = "a-secret"
BODY = '{"groups": [{"prompt": "a", "responses": ["b"]}]}'


def make_client(model, **settings):
    images = BoundedCache(1 << 20)
    scheduler = Scheduler([Scorer("tiny", Ensemble([model]), 8192, images)], rewards=BoundedCache(100), images=images)
    return TestClient(make_app(scheduler, ServeSettings(**settings)), "http://localhost", raise_server_exceptions=False)


BAD_HEADERS = [
    [], [("Authorization", "")], [("Authorization", "Bearer")], [("Authorization", "Bearer a-secre")],
    [("Authorization", "Bearer a-secrets")], [("Authorization", TOKEN)], [("Authorization", f"Token {TOKEN}")],
    [("Authorization", f"Bearer {TOKEN} {TOKEN}")], [("Authorization", "Bearer \xe4".encode("latin-1"))],
    [("Authorization", "Basic !")], [("Authorization", "Basic YTph")], [("Authorization", "Bearer " + "a" * 60_000)],
    [("Authorization", f"Bearer {TOKEN}"), ("Authorization", "Bearer other")], [("X-Token", TOKEN)],
]  # fmt: skip


def test_every_route_and_method_needs_the_token_but_health_and_the_pages_files(model):
    with make_client(model, token=TOKEN) as client:
        found = routes_of(client.app)
        assert ("/v1/rewards", "POST") in found and ("/metrics", "GET") in found
        paths = {path for path, _ in found}
        page = {"/", "/page/page.css", "/page/page.js", "/page/examples.js"}
        assert paths & OPEN_PATHS == {"/health"} | page == OPEN_PATHS
        for path in [*sorted(paths - OPEN_PATHS), "/nowhere"]:
            for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
                for headers in BAD_HEADERS:
                    answer = client.request(method, path, headers=headers)
                    assert answer.status_code == 401, (method, path, headers)
        assert client.get("/health").status_code == 200


def test_the_token_opens_as_bearer_and_as_a_password(model):
    body = {"groups": [{"prompt": "a", "responses": ["b"]}]}
    with make_client(model, token=TOKEN) as client:
        for options in ({"headers": {"Authorization": f"bearer  {TOKEN}"}}, {"auth": ("anybody", TOKEN)}):
            assert client.post("/v1/rewards", json=body, **options).status_code == 200


FOREIGN = [
    {"Host": "evil.example"}, {"Host": "evil.example:8000"}, {"Host": "127.0.0.1.evil.example"}, {"Host": "["},
    {"Host": ""}, {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://localhost:1"},
    {"Host": "evil.example", "Origin": "http://evil.example"},
]  # fmt: skip


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_pages_of_other_sites_get_nothing(model, headers):
    with make_client(model) as client:
        for method, path in [("POST", "/v1/rewards"), ("GET", "/metrics"), ("GET", "/activity"), ("GET", "/health")]:
            answer = client.request(method, path, headers={"Content-Type": "text/plain"} | headers, content=BODY)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "FOREIGN_SITE"), path


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000", "10.0.0.1"])
def test_the_servers_own_page_and_programs_are_answered(model, host):
    with make_client(model) as client:
        for headers in ({"Host": host}, {"Host": host, "Origin": f"http://{host}".lower()}):
            assert client.post("/v1/rewards", headers=headers, content=BODY).status_code == 200
    with make_client(model, host="reward.local") as client:
        assert client.get("/health", headers={"Host": "reward.local:80"}).status_code == 200


def test_with_the_token_any_name_is_the_servers_but_no_other_page(model):
    headers = {"Authorization": f"Bearer {TOKEN}", "Host": "reward.example"}
    with make_client(model, token=TOKEN) as client:
        assert client.post("/v1/rewards", headers=headers, content=BODY).status_code == 200
        foreign = headers | {"Origin": "http://evil.example"}
        assert client.post("/v1/rewards", headers=foreign, content=BODY).status_code == 403


def test_a_path_with_a_slash_more_is_not_found(model):
    with make_client(model) as client:
        for path in ("/health/", "/v1/rewards/"):
            answer = client.get(path, follow_redirects=False)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "NOT_FOUND")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org"])
def test_a_host_that_others_reach_needs_a_token(host):
    with pytest.raises(ConfigError, match="FASTRM_TOKEN"):
        check_host(ServeSettings(host=host))
    check_host(ServeSettings(host=host, token=TOKEN))


@pytest.mark.parametrize("token", ["", "a\nb", "ä"])
def test_a_token_that_no_header_holds_is_refused(token):
    with pytest.raises(ConfigError, match="--token"):
        check_host(ServeSettings(token=token))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_none(host):
    check_host(ServeSettings(host=host))


def figures(client):
    lines = client.get("/metrics").text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def test_metrics_count_groups_packs_answers_and_what_the_caches_knew(model):
    image = make_image(56, 56).data
    uri = "data:image/png;base64," + base64.b64encode(image).decode()
    body = {"groups": [{"prompt": "a", "images": [uri], "responses": ["b", "c"]}]}
    with make_client(model) as client:
        first = client.post("/v1/rewards", json=body).json()
        assert client.post("/v1/rewards", json=body).json()["rewards"] == first["rewards"]
        body["groups"][0]["responses"].append("d")
        assert client.post("/v1/rewards", json=body).json()["rewards"][0][:2] == first["rewards"][0]
        client.get("/nowhere/at/all")
        found = figures(client)
    assert found["fastrm_groups_total"] == 2 and found["fastrm_responses_total"] == 3
    assert found["fastrm_reward_hits_total"] == 4 and found["fastrm_reward_misses_total"] == 3
    # Decoded once, found when its pack was built and in the second request.
    assert found["fastrm_image_misses_total"] == 1 and found["fastrm_image_hits_total"] == 3
    assert found["fastrm_queue_groups"] == 0
    assert found['fastrm_request_seconds_count{path="/v1/rewards",status="200"}'] == 3
    assert found['fastrm_request_seconds_count{path="other",status="404"}'] == 1
    assert found["fastrm_packs_total"] == 2


def test_a_cache_keeps_what_was_used_last_within_its_capacity():
    cache = BoundedCache(10)
    for number in range(4):
        cache.store(bytes([number]), number, 3)
        cache.get(b"\0")
    assert [cache.get(bytes([number])) for number in range(4)] == [0, None, 2, 3] and cache.size == 9
    cache.store(b"large", 9, 11)
    assert cache.get(b"large") is None and len(cache) == 3
