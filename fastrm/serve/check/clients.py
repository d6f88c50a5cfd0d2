"""The set of prompts sent to a server by each API that it may have, and what it answers."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import httpx

from fastrm.data.sources.layouts.groups import group_record
from fastrm.data.template import ConversationEncoder
from fastrm.errors import ServerError
from fastrm.serve.check.prompts import CheckedPrompt


class Served(NamedTuple):
    """A server's reward of one response.

    Attributes:
        num_tokens: of the conversation, where the server says so for it alone; else None. A server that remembers
            the reward says 0.
    """

    reward: float
    num_tokens: int | None = None


class Refused(NamedTuple):
    """The message with which a server refused a prompt."""

    message: str


Answer = list[Served] | Refused


class _RefusedRequest(Exception):
    pass


class Asker:
    """A client that asks one server, by one API, for the rewards of a prompt's responses.

    Args:
        client: whose base URL is the server's.
        encoder: of the model that the server is said to serve; APIs that take rendered text get its rendering.
    """

    def __init__(self, client: httpx.Client, api: str, encoder: ConversationEncoder):
        self._client, self._ask, self._encoder = client, APIS[api], encoder

    def ask(self, prompt: CheckedPrompt) -> Answer:
        """Return the server's rewards of all responses to a prompt.

        Raises:
            ServerError: if the server is away, fails, wants a token, or answers with something else.
        """
        try:
            return self._ask(self, prompt)
        except _RefusedRequest as error:
            return Refused(str(error))

    def rendered(self, prompt: CheckedPrompt) -> list[str]:
        """Return the conversation of each response as text, with one placeholder for an image."""
        record = group_record(prompt.group, 0)
        return [self._encoder.rendered_text(response) for response in record.responses]

    def post(self, path: str, body: dict, read: Callable[[object], Answer]) -> Answer:
        """Send a request and return what `read` finds in the answer.

        Raises:
            ServerError: as `ask`.
        """
        place = f"{str(self._client.base_url).rstrip('/')}{path}"
        try:
            response = self._client.post(path, json=body)
        except httpx.HTTPError as error:
            raise ServerError(f"{place}: no answer ({type(error).__name__}: {error}); is the server up?") from None
        said = " ".join(response.text.split())[:300]  # another server's page may have many lines
        if response.status_code in (400, 413, 422):
            raise _RefusedRequest(f"HTTP {response.status_code}: {said}")
        if response.status_code != 200:
            hint = {401: "give --token", 403: "give --token", 404: "is --api right, and is the URL without a path?"}
            advice = hint.get(response.status_code, "see the server's log")
            raise ServerError(f"{place}: HTTP {response.status_code}: {said}; {advice}")
        try:
            answer = read(response.json())
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ServerError(
                f"{place}: the answer {said!r} has another form than --api says ({type(error).__name__}: {error})"
            ) from None
        if not all(math.isfinite(one.reward) for one in answer):
            raise ServerError(
                f"{place}: a reward is no finite number: {said!r}; look at the server's weights and dtype"
            )
        return answer


def _ask_fastrm(asker: Asker, prompt: CheckedPrompt) -> Answer:
    def read(answer: dict) -> Answer:
        rewards = answer["rewards"][0]
        if isinstance(rewards, dict) and "error" in rewards:
            raise _RefusedRequest(f"{rewards['error']['code']}: {rewards['error']['message']}")
        return [Served(float(reward)) for reward in _as_many(rewards, prompt.responses)]

    return asker.post("/v1/rewards", {"groups": [prompt.group]}, read)


def _ask_vllm(asker: Asker, prompt: CheckedPrompt) -> Answer:
    def read(answer: dict) -> Answer:
        data, usage = answer["data"], answer.get("usage") or {}
        return [Served(float(data[0]["probs"][0]), usage.get("prompt_tokens"))]

    messages = [{**message, "content": _as_urls(message["content"])} for message in prompt.messages]
    found: list[Served] = []
    for response in prompt.responses:
        conversation = [*messages, {"role": "assistant", "content": response}]
        body = {"messages": conversation, "use_activation": False, "add_generation_prompt": False}
        found += asker.post("/classify", body, read)
    return found


def _ask_sglang(asker: Asker, prompt: CheckedPrompt) -> Answer:
    def read(answer: dict) -> Answer:
        return [Served(float(answer["embedding"][0]), answer.get("meta_info", {}).get("prompt_tokens"))]

    images = {"image_data": prompt.images} if prompt.images else {}
    found: list[Served] = []
    for text in asker.rendered(prompt):
        found += asker.post("/classify", {"text": text, **images}, read)
    return found


def _ask_openrlhf(asker: Asker, prompt: CheckedPrompt) -> Answer:
    def read(answer: dict) -> Answer:
        return [Served(float(reward)) for reward in _as_many(answer["rewards"], prompt.responses)]

    texts = asker.rendered(prompt)
    label = {"answer": "", "images": prompt.images} if prompt.images else ""
    body = {"query": texts, "prompts": texts, "labels": [label] * len(texts)}
    return asker.post("/get_reward", body, read)


def _as_urls(content: str | list[dict]) -> str | list[dict]:
    """Return content whose images are OpenAI's `image_url` parts."""
    if isinstance(content, str):
        return content
    return [
        {"type": "image_url", "image_url": {"url": part["image"]}} if part["type"] == "image" else part
        for part in content
    ]


def _as_many(rewards: Sequence[float], responses: Sequence[str]) -> Sequence[float]:
    if len(rewards) != len(responses):
        raise ValueError(f"{len(rewards)} rewards for {len(responses)} responses")
    return rewards


APIS: dict[str, Callable[[Asker, CheckedPrompt], Answer]] = {
    "vllm": _ask_vllm, "sglang": _ask_sglang, "fastrm": _ask_fastrm, "openrlhf": _ask_openrlhf,
}  # fmt: skip
