"""vLLM as users start it: `vllm serve` in an environment of its own, and requests to it."""

import base64
import io
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from tests.helpers.project import PROJECT
from tests.helpers.waiting import PATIENCE

ENVIRONMENT = Path(os.environ.get("FASTRM_VLLM", PROJECT / ".venv-vllm"))
MISSING = None if (ENVIRONMENT / "bin" / "vllm").is_file() else f"no vLLM in {ENVIRONMENT}: make test-vllm installs it"
# The log's last lines in the message of a server that has ended.
_SHOWN = 3000


class Server:
    """A running server, by its URL."""

    def __init__(self, url: str):
        self.url = url

    def ask(self, path: str, body: dict) -> tuple[int, dict]:
        """Send JSON; return status and JSON."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def reward(self, conversation: dict) -> float:
        """Return the reward of one conversation from `/classify`."""
        status, answer = self.ask("/classify", conversation | {"use_activation": False})
        assert status == 200, answer
        return answer["data"][0]["probs"][0]

    def rewards(self, group: dict, *, at_once: int = 1) -> list[float]:
        """Return the rewards of a group's responses, each asked for by a request of its own."""
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(self.reward, (conversation(group, text) for text in group["responses"])))


def conversation(group: dict, response: str) -> dict:
    """Return the body of a request: a prompt with its images, and one response."""
    parts = [{"type": "image_url", "image_url": {"url": data_uri(image)}} for image in group.get("images", ())]
    question = [*parts, {"type": "text", "text": group["prompt"]}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
    return {"messages": messages, "add_generation_prompt": False}


def data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@contextmanager
def vllm_server(folder: Path, log: Path, *options: str) -> Iterator[Server]:
    """Serve a model folder on a free port of this machine until the block ends; nothing is asked of a network."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        ENVIRONMENT / "bin" / "vllm", "serve", folder, "--runner", "pooling", "--dtype", "float32",
        "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "2048", "--enforce-eager", *options,
    ]  # fmt: skip
    settings = {
        "VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CACHE_ROOT": str(log.parent / "cache"),
    }  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment | settings)
        try:
            _wait_until_ready(process, f"http://127.0.0.1:{port}", log)
            yield Server(f"http://127.0.0.1:{port}")
        finally:
            _stop(process)


def _wait_until_ready(process: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        assert process.poll() is None, f"vLLM has ended:\n{log.read_text()[-_SHOWN:]}"
        assert time.monotonic() < deadline, f"vLLM was not ready:\n{log.read_text()[-_SHOWN:]}"
        try:
            urllib.request.urlopen(f"{url}/health", timeout=PATIENCE).close()
            return
        except OSError:
            time.sleep(0.5)


def _stop(process: subprocess.Popen) -> None:
    """End the server, which ends the processes that it has started."""
    process.terminate()
    try:
        process.wait(PATIENCE)
    finally:
        process.kill()
