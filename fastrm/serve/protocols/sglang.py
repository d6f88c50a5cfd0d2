"""SGLang's own forms: ``POST /classify`` with `text` or `input_ids`, and ``POST /v1/embeddings``, which verl uses."""

from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import Field

from fastrm.serve.app import Service
from fastrm.serve.protocols.bodies import (
    Body,
    ManyTokens,
    Texts,
    Tokens,
    bad_request,
    check_as_many,
    check_some,
    flat,
    form_of,
    reading,
)
from fastrm.serve.rendered_text import RenderedTextReader

Images = str | Texts | None
ManyImages = Annotated[list[Images], Field(fail_fast=True)]


class NativeInput(Body):
    """The body of ``/classify`` in SGLang's form.

    Attributes:
        text: a rendered conversation, or several.
        input_ids: their tokens, instead.
        image_data: for one conversation an image or a list of them; for several, that for each.
    """

    text: str | Texts | None = None
    input_ids: Tokens | ManyTokens | None = None
    image_data: str | ManyImages | None = None
    video_data: None = None
    rid: str | Texts | None = None
    model: str | None = None


class EmbeddedInput(Body):
    """A conversation with its images, as SGLang's ``/v1/embeddings`` takes it."""

    text: str
    image: Images = None
    video: None = None


class Embeddings(Body):
    """The body of ``/v1/embeddings``."""

    input: str | Texts | Annotated[list[EmbeddedInput], Field(fail_fast=True)] | Tokens | ManyTokens
    model: str | None = None
    encoding_format: Literal["float"] = "float"
    dimensions: None = None
    user: str | None = None


def native_groups(body: NativeInput, reader: RenderedTextReader) -> list[dict]:
    """Return the group of each conversation of a request in SGLang's form.

    Raises:
        RecordError: BAD_REQUEST, or as `RenderedTextReader.read`.
    """
    if (body.text is None) == (body.input_ids is None):
        raise bad_request("text", body.text, "one of text and input_ids")
    name, value = ("text", body.text) if body.text is not None else ("input_ids", body.input_ids)
    check_some(name, value)
    if not is_many(value):
        return [read_one(value, _as_list(body.image_data), reader, name)]
    images = body.image_data if isinstance(body.image_data, list) else _as_list(body.image_data)
    check_as_many("image_data", images, name, len(value))
    images = images or [None] * len(value)
    return [
        read_one(one, _as_list(image), reader, f"{name}[{number}]")
        for number, (one, image) in enumerate(zip(value, images, strict=True))
    ]


def native_answer(body: NativeInput, rewards: Sequence[float]) -> dict | list[dict]:
    """Return the answer in SGLang's form: an object for one conversation, a list for a list."""
    answers = [{"embedding": [reward], "meta_info": {}} for reward in rewards]
    return answers if is_many(body.text if body.text is not None else body.input_ids) else answers[0]


def embedding_groups(body: Embeddings, reader: RenderedTextReader) -> list[dict]:
    """Return the group of each conversation of ``/v1/embeddings``.

    Raises:
        RecordError: BAD_REQUEST, or as `RenderedTextReader.read`.
    """
    check_some("input", body.input)
    if not is_many(body.input):
        return [read_one(body.input, [], reader, "input")]
    return [
        read_one(one.text, _as_list(one.image), reader, f"input[{number}].text")
        if isinstance(one, EmbeddedInput)
        else read_one(one, [], reader, f"input[{number}]")
        for number, one in enumerate(body.input)
    ]


def embedding_answer(model: str, rewards: Sequence[float], num_tokens: int) -> dict:
    """Return the answer of ``/v1/embeddings``: a reward is an embedding of one number."""
    data = [{"object": "embedding", "embedding": [reward], "index": number} for number, reward in enumerate(rewards)]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def is_many(value: str | list) -> bool:
    """Return whether an input is several conversations: not a text, and not the tokens of one."""
    return isinstance(value, list) and not (value and isinstance(value[0], int))


def num_inputs(value: str | list) -> int:
    """Return the number of conversations of an input."""
    return len(value) if is_many(value) else 1


def read_one(value: str | list[int], images: list, reader: RenderedTextReader, name: str) -> dict:
    """Return the group of a conversation given as rendered text or as its tokens.

    Raises:
        RecordError: as `RenderedTextReader.read`.
    """
    read = reader.read if isinstance(value, str) else reader.read_tokens
    return read(value, images, name).group


def _as_list(images: Images) -> list:
    return [] if images is None else images if isinstance(images, list) else [images]


async def classify(service: Service, request: Request, body: NativeInput) -> dict | list[dict]:
    """Answer a request to ``/classify`` in SGLang's form.

    Raises:
        RequestError: as `Service.rewards`, or for a body that cannot be read.
    """
    service.check_count(num_inputs(body.text if body.text is not None else body.input_ids or []))
    groups = await reading(native_groups, body, service.reader(body.model))
    scored = await service.rewards(request, groups, body.model)
    return native_answer(body, flat(scored.results))


def routes(service: Service) -> APIRouter:
    """Return the router of /v1/embeddings."""
    router = APIRouter()

    @router.post("/v1/embeddings")
    async def embeddings(request: Request) -> dict:
        body = await service.read(request, form_of(Embeddings))
        service.check_count(num_inputs(body.input))
        groups = await reading(embedding_groups, body, service.reader(body.model))
        scored = await service.rewards(request, groups, body.model)
        return embedding_answer(scored.model, flat(scored.results), scored.num_tokens)

    return router
