"""OpenRLHF's reward server: ``POST /get_reward``.

A query is the decoded text of prompt and response, special tokens kept. OpenRLHF sends no images: they come in a label
that is an object, ``{"answer": any, "images": [...]}``, a convention of fastrm. Versions 0.10 and 0.11 send one query a
request, and, to all but the first of several URLs, empty lists.
"""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field

from fastrm.serve.app import Service
from fastrm.serve.protocols.bodies import Body, Texts, bad_request, check_as_many, flat, form_of, reading, sigmoid
from fastrm.serve.rendered_text import Conversation, RenderedTextReader


class GetReward(Body):
    """The body of ``/get_reward``.

    Attributes:
        query: rendered conversations.
        prompts: their beginnings, which the queries hold too.
        labels: of any kind; those that are objects may hold `images`.
    """

    query: Texts
    prompts: Texts = Field(default_factory=list)
    labels: list[Any] = Field(default_factory=list)


def conversations(body: GetReward, reader: RenderedTextReader) -> list[Conversation]:
    """Return the conversation of each query.

    Raises:
        RecordError: BAD_REQUEST, or as `RenderedTextReader.read`.
    """
    check_as_many("prompts", body.prompts, "query", len(body.query))
    check_as_many("labels", body.labels, "query", len(body.query))
    labels = body.labels or [None] * len(body.query)
    return [
        reader.read(query, label_images(label, f"labels[{number}]"), f"query[{number}]")
        for number, (query, label) in enumerate(zip(body.query, labels, strict=True))
    ]


def label_images(label: object, name: str) -> list:
    """Return the images of a label: of an object with the key `images`, one or a list; of anything else none.

    Raises:
        RecordError: BAD_REQUEST.
    """
    images = label.get("images") if isinstance(label, dict) else None
    if images is None:
        return []
    images = images if isinstance(images, list) else [images]
    for number, image in enumerate(images):
        if not isinstance(image, str):
            raise bad_request(f"{name}.images[{number}]", image, "a path, URL or data URI")
    return images


def answer(rewards: Sequence[float], asked: Sequence[Conversation]) -> dict:
    """Return the answer to queries with these rewards: `scores` are their sigmoid, `cut` is 1 for a cut response."""
    return {
        "rewards": list(rewards),
        "scores": [sigmoid(reward) for reward in rewards],
        "extra_logs": {"reward": list(rewards), "cut": [float(not one.finished) for one in asked]},
    }


def routes(service: Service) -> APIRouter:
    """Return the router of /get_reward."""
    router = APIRouter()

    @router.post("/get_reward")
    async def get_reward(request: Request) -> dict:
        body = await service.read(request, form_of(GetReward))
        service.check_count(len(body.query))
        asked = await reading(conversations, body, service.reader())
        scored = await service.rewards(request, [one.group for one in asked])
        return answer(flat(scored.results), asked)

    return router
