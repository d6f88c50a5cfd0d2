"""vLLM as users start it: `vllm serve` in an environment of its own, and requests to it."""

import base64
import io
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from bench.serving.vllm_process import start, stop, vllm_serving
from fastrm import RewardModel
from tests.helpers.project import PROJECT
from tests.helpers.waiting import PATIENCE

ENVIRONMENT = Path(os.environ.get("FASTRM_VLLM", PROJECT / ".venv-vllm"))
MISSING = None if (ENVIRONMENT / "bin" / "vllm").is_file() else f"no vLLM in {ENVIRONMENT}: make test-vllm installs it"


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
    """Serve a model folder on a free port of this machine until the block ends."""
    with vllm_serving(ENVIRONMENT, folder, log, "--enforce-eager", *options) as url:
        yield Server(url)


def check_rewards(server: Server, model: RewardModel, *groups: dict, at_once: int = 1) -> None:
    """Assert that a server's rewards of groups are those of a model, and print the worst difference for the docs."""
    for group, wanted in zip(groups, model.score(groups), strict=True):
        assert max(wanted) - min(wanted) > 1e-4, "rewards that are all alike prove nothing"
        worst = np.abs(np.array(server.rewards(group, at_once=at_once)) - wanted).max()
        kind = f"{len(wanted)} responses, {len(group.get('images', ()))} images, {len(group['prompt'])} characters"
        print(f"{kind}: worst difference {worst:.1e} of rewards up to {np.abs(wanted).max():.1e}")  # pytest -rP
        assert worst <= 1e-5, kind


def refusal(folder: Path, log: Path, *options: str, **settings: str) -> str:
    """Return what `vllm serve` writes until it ends, which it must by itself and with an error.

    Args:
        settings: further variables of its environment.
    """
    _, process = start(ENVIRONMENT, folder, log, ["--enforce-eager", *options], settings)
    try:
        code = process.wait(PATIENCE)
    finally:
        stop(process)
    assert code > 0, log.read_text()
    return log.read_text()
