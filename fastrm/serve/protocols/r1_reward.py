"""R1-Reward's reward server, of its fork of OpenRLHF: ``POST /get_reward_mllm``.

A query is rendered as in OpenRLHF. The prompt beside it is that of the data set: plain text, or messages as JSON text,
whose image parts are the images of the query.
"""

import json
from collections.abc import Sequence

from fastapi import APIRouter, Request
from pydantic import Field

from fastrm.serve.app import Service
from fastrm.serve.protocols.bodies import Body, Texts, bad_request, check_as_many, flat, form_of, reading
from fastrm.serve.rendered_text import Conversation, RenderedTextReader


class GetRewardMllm(Body):
    """The body of ``/get_reward_mllm``.

    Attributes:
        query: rendered conversations.
        prompts: of the data set.
    """

    query: Texts
    prompts: Texts = Field(default_factory=list)


def conversations(body: GetRewardMllm, reader: RenderedTextReader) -> list[Conversation]:
    """Return the conversation of each query.

    Raises:
        RecordError: BAD_REQUEST, or as `RenderedTextReader.read`.
    """
    check_as_many("prompts", body.prompts, "query", len(body.query))
    prompts = body.prompts or [""] * len(body.query)
    return [
        reader.read(query, _images(prompt, f"prompts[{number}]"), f"query[{number}]")
        for number, (query, prompt) in enumerate(zip(body.query, prompts, strict=True))
    ]


def answer(rewards: Sequence[float]) -> dict:
    """Return the answer to queries with these rewards."""
    return {"rewards": list(rewards)}


def _images(prompt: str, name: str) -> list:
    """Return the images of a prompt that is a list of messages as JSON text, in order; of any other none."""
    try:
        messages = json.loads(prompt)
    except (ValueError, RecursionError):
        return []
    contents = (
        [turn.get("content") for turn in messages if isinstance(turn, dict)] if isinstance(messages, list) else []
    )
    parts = [part for content in contents if isinstance(content, list) for part in content]
    images = [part.get("image") for part in parts if isinstance(part, dict) and part.get("type") == "image"]
    for image in images:
        if not isinstance(image, str):
            raise bad_request(name, image, "image parts with a path, URL or data URI")
    return images


def routes(service: Service) -> APIRouter:
    """Return the router of /get_reward_mllm."""
    router = APIRouter()

    @router.post("/get_reward_mllm")
    async def get_reward_mllm(request: Request) -> dict:
        body = await service.read(request, form_of(GetRewardMllm))
        service.check_count(len(body.query))
        asked = await reading(conversations, body, service.reader())
        scored = await service.rewards(request, [one.group for one in asked])
        return answer(flat(scored.results))

    return router
