"""The server of rewards, a stand-in for it whose failures a test chooses, and a scorer without weights."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from fastrm.errors import GroupError


class CountingScorer:
    """A scorer whose reward is a number made of prompt, images and response; it keeps the groups it was asked about."""

    def __init__(self):
        self.groups = []

    def score(self, groups, *, on_error="raise"):
        self.groups += groups
        return [self._score(number, group) for number, group in enumerate(groups)]

    def _score(self, number, group):
        if any("unscorable" in response for response in group["responses"]):
            return GroupError(number, None, "TOO_LONG", "the group is too long for this test")
        if not all(isinstance(image, bytes) for image in group.get("images", ())):
            return GroupError(number, None, "IMAGE_MISSING", "paths are not read in this test")
        return [reward_of(group["messages"], group.get("images", ()), response) for response in group["responses"]]


def reward_of(messages, images, response) -> float:
    """A reward from -4 to 4 that any change of its arguments changes."""
    digests = [hashlib.sha256(image).hexdigest() for image in images]
    text = json.dumps([messages, digests, response], sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**29 - 4


class Reply:
    """An answer in place of rewards: a status with headers and body, or `hang_up`."""

    def __init__(self, status=200, body=b"{}", headers=(), hang_up=False):
        self.status, self.body, self.headers, self.hang_up = status, body, dict(headers), hang_up


@contextmanager
def answering(handler: type[BaseHTTPRequestHandler]):
    """Answer requests by a handler, which logs nothing, on a free port in threads; yield the server's URL."""
    handler.log_message = lambda *_: None
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def reward_server(scorer, replies=()):
    """Serve `POST /v1/rewards` on a free port; yield (URL, list of the bodies that came).

    Args:
        replies: what the first requests get in place of rewards.
    """
    waiting, bodies = list(replies), []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            sender = {"token": self.headers.get("Authorization"), "peer": self.client_address}
            bodies.append({**json.loads(body), "path": self.path, **sender})
            reply = waiting.pop(0) if waiting else Reply(body=json.dumps(answer(scorer, bodies[-1])).encode())
            if reply.hang_up:
                self.close_connection = True
                self.connection.close()
                return
            self.send_response(reply.status)
            for name, value in {"Content-Length": len(reply.body), **reply.headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(reply.body)

    with answering(Handler) as url:
        yield url, bodies


@contextmanager
def real_server(**models):
    """Serve reward models by `fastrm.serve` on a free port; yield its URL."""
    from fastrm.evaluate.ensemble import Ensemble
    from fastrm.serve.app import make_app
    from fastrm.serve.scheduler import Scheduler
    from fastrm.serve.scorer import Scorer
    from fastrm.serve.settings import ServeSettings
    from tests.helpers.servers import running

    scheduler = Scheduler([Scorer(name, Ensemble([model]), 8192) for name, model in models.items()])
    with running(make_app(scheduler, ServeSettings())) as url:
        yield url


def answer(scorer, body) -> dict:
    """What the server answers to a body by the rewards of a scorer, which takes data URIs as images."""
    results = scorer.score([decoded(group) for group in body["groups"]], on_error="return")
    return {"rewards": [_entry(one) for one in results], "usage": {"groups": len(results)}}


def _entry(result) -> list | dict:
    is_error = isinstance(result, GroupError)
    return {"error": {"code": result.code, "message": result.message}} if is_error else result


def decoded(group) -> dict:
    import base64

    images = [base64.b64decode(image.partition(",")[2]) for image in group.get("images", ())]
    return {**group, "images": images} if images else group
