"""A hub of its own: the requests that huggingface_hub's client really sends, answered from memory.

Uploads come as on the hub: weights through Git LFS, the rest in the commit. `gated/...` is there and not allowed.
"""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_right"
COMMIT = "c0ffee" + 34 * "0"


class Hub:
    """The repositories, and the requests that came.

    Attributes:
        files: content by name, for each repository.
        private: whether each repository is private.
    """

    def __init__(self):
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.url = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _answer(self, status=200, body=b"", headers=()):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _handle(self):
        hub, body = self.server.hub, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        hub.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if path == "/":
            self._answer()
        elif path == "/api/validate-yaml":
            self._answer(body={"errors": [], "warnings": []})
        elif "resolve" in parts:
            place = parts.index("resolve")
            self._resolve("/".join(parts[:place][-2:]), "/".join(parts[place + 2 :]))
        elif "tree" in parts:
            self._answer(404, {"error": "no such folder"}, [("X-Error-Code", "EntryNotFound")])
        elif self.command == "GET":
            self._about("/".join(parts[2:4]))
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}" and self.command != "PUT":
            self._answer(401, {"error": "Invalid username or password."})
        else:
            self._write(hub, parts, body)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _missing(self, repo):
        """Answer for a repository that cannot be read; return whether it is so."""
        if repo.startswith("gated/"):
            self._answer(403, {"error": "gated"}, [("X-Error-Code", "GatedRepo")])
        elif repo not in self.server.hub.files:
            self._answer(404, {"error": "not found"}, [("X-Error-Code", "RepoNotFound")])
        else:
            return False
        return True

    def _resolve(self, repo, name):
        if self._missing(repo):
            return
        content = self.server.hub.files[repo].get(name)
        if content is None:
            self._answer(404, headers=[("X-Error-Code", "EntryNotFound"), ("X-Repo-Commit", COMMIT)])
            return
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._answer(200, content, [("ETag", etag), ("X-Repo-Commit", COMMIT)])

    def _about(self, repo):
        if not self._missing(repo):
            files = [{"rfilename": name} for name in self.server.hub.files[repo]]
            private = self.server.hub.private[repo]
            self._answer(200, {"id": repo, "private": private, "sha": COMMIT, "siblings": files})

    def _write(self, hub, parts, body):
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if repo in hub.files:
                self._answer(409, {"error": "exists", "url": f"{hub.url}/{repo}"})
                return
            hub.files[repo], hub.private[repo] = {}, asked["visibility"] == "private"
            self._answer(200, {"url": f"{hub.url}/{repo}"})
        elif "preupload" in parts:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {True: "lfs", False: "regular"}
            self._answer(200, {"files": [
                {"path": name, "uploadMode": modes[name.endswith(".safetensors")], "shouldIgnore": False}
                for name in names
            ]})  # fmt: skip
        elif parts[-2:] == ["objects", "batch"]:
            objects = [
                {**one, "actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif parts[0] == "lfs":
            assert hashlib.sha256(body).hexdigest() == parts[1]
            hub.objects[parts[1]] = body
            self._answer()
        elif "commit" in parts:
            repo = "/".join(parts[2:4])
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[repo][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[repo][value["path"]] = hub.objects[value["oid"]]
            url = f"{hub.url}/{repo}/commit/{COMMIT}"
            self._answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
        else:
            self._answer(400, {"error": f"unknown request {self.path}"})


@contextmanager
def hub_server():
    """Yield a running `Hub`, whose `url` is for HF_ENDPOINT."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = Hub()
    server.hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
