"""slime's remote reward model: ``POST /slime``, whose answer is a bare number.

The prompt is a list of messages, or a text that was rendered with the model's chat template and ends where the response
begins. Any other text is refused: a plain question cannot be told from one that another template rendered. Images,
which slime does not send, may come in the label as for OpenRLHF.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field

from fastrm.errors import RecordError
from fastrm.serve.app import Service
from fastrm.serve.protocols.bodies import Body, flat, form_of, reading
from fastrm.serve.protocols.openrlhf import label_images
from fastrm.serve.rendered_text import RenderedTextReader, group_of


class Sample(Body):
    """The body of ``/slime``.

    Attributes:
        label: of any kind; if it is an object, it may hold `images` for a rendered prompt.
    """

    prompt: str | Annotated[list[dict], Field(fail_fast=True)]
    response: str
    label: Any = None


def group(body: Sample, reader: RenderedTextReader) -> dict:
    """Return the group of a sample.

    Raises:
        RecordError: BAD_REQUEST, IMAGE_COUNT, or as `RenderedTextReader.read`.
    """
    images = label_images(body.label, "label")
    if isinstance(body.prompt, str):
        return reader.read(body.prompt + body.response, images, "prompt and response").group
    if images:
        raise RecordError(
            "IMAGE_COUNT",
            'the label has images, and "prompt" is no rendered text with a placeholder for each; put them into the '
            "content of messages",
        )
    return group_of(body.prompt, [reader.response_text(body.response)[0]])


def routes(service: Service) -> APIRouter:
    """Return the router of /slime."""
    router = APIRouter()

    @router.post("/slime")
    async def slime(request: Request) -> float:
        body = await service.read(request, form_of(Sample))
        asked = await reading(group, body, service.reader())
        scored = await service.rewards(request, [asked])
        return flat(scored.results)[0]

    return router
