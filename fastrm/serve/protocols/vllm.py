"""vLLM's endpoints for models with one label: ``POST /classify``, ``/pooling``, ``/score`` and ``/v1/score``.

Rewards are raw unless a request sets `use_activation` to true, which gives their sigmoid: verl sets it to false, and
stock vLLM with an export of fastrm does the same by the model's `problem_type`.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import AliasChoices, Field, model_validator

from fastrm.errors import RecordError
from fastrm.serve.app import Service
from fastrm.serve.protocols import sglang
from fastrm.serve.protocols.bodies import (
    Body,
    ManyTokens,
    Texts,
    Tokens,
    activated,
    bad_request,
    check_some,
    flat,
    form_of,
    listing,
    parsed,
    reading,
)
from fastrm.serve.rendered_text import RenderedTextReader, group_of


class _Options(Body):
    """The keys that all requests may have; those that would change the conversation may only have the values here."""

    model: str | None = None
    use_activation: bool | None = None
    activation: bool | None = None
    truncate_prompt_tokens: None = None
    truncation_side: str | None = None
    priority: int = 0
    cache_salt: str | None = None
    user: str | None = None
    request_id: str | None = None

    @property
    def is_activated(self) -> bool:
        """True if the request asks for the sigmoid; `activation` is the older name of the key."""
        return bool(self.activation if self.use_activation is None else self.use_activation)

    @model_validator(mode="after")
    def _check_activation(self) -> "_Options":
        if None not in (self.use_activation, self.activation) and self.use_activation != self.activation:
            raise ValueError("use_activation and activation, its older name, differ; leave one of them out")
        return self


class _Pooled(_Options):
    """The keys that ``/pooling`` has besides; ``/classify`` may have them too."""

    task: Literal["classify"] | None = None
    encoding_format: Literal["float"] = "float"
    dimensions: None = None


class TextInput(_Pooled):
    """The body of ``/classify`` and ``/pooling`` in the form with `input`: rendered conversations, or their tokens."""

    input: str | Texts | Tokens | ManyTokens
    add_special_tokens: bool = True


class ChatInput(_Pooled):
    """The body of ``/classify`` and ``/pooling`` in the form with `messages`: one conversation, up to its answer.

    Attributes:
        chat_template_kwargs: further arguments of the chat template.
    """

    messages: Annotated[list[dict], Field(fail_fast=True)]
    add_generation_prompt: Literal[False] = False
    continue_final_message: Literal[False] = False
    add_special_tokens: Literal[False] = False
    chat_template: None = None
    chat_template_kwargs: dict | None = None


Content = str | dict | Annotated[list[str | dict], Field(fail_fast=True)]


class Score(_Options):
    """The body of ``/score``.

    Attributes:
        queries: one question, or one for each document; a text, or an object with content parts.
        documents: answers.
    """

    queries: Content = Field(validation_alias=AliasChoices("queries", "text_1", "data_1"))
    documents: Content = Field(validation_alias=AliasChoices("documents", "items", "text_2", "data_2"))
    instruction: None = None


def groups(body: TextInput | ChatInput, reader: RenderedTextReader) -> list[dict]:
    """Return the group of each conversation of ``/classify`` or ``/pooling``.

    Raises:
        RecordError: BAD_REQUEST, or as `RenderedTextReader.read`.
    """
    if isinstance(body, ChatInput):
        return [_chat_group(body)]
    check_some("input", body.input)
    if not sglang.is_many(body.input):
        return [sglang.read_one(body.input, [], reader, "input")]
    return [sglang.read_one(one, [], reader, f"input[{number}]") for number, one in enumerate(body.input)]


def _chat_group(body: ChatInput) -> dict:
    *prompt, last = body.messages or [{}]
    if last.get("role") != "assistant":
        raise bad_request("messages", last.get("role"), "a conversation whose last message is the assistant's")
    # Other keys, such as tool_calls, are a part of the turn, which the chat template may render.
    said = last if last.keys() - {"role", "content"} else _text(last.get("content"), "messages[-1].content")
    group = group_of(prompt, [said])
    return group | ({"chat_template_kwargs": body.chat_template_kwargs} if body.chat_template_kwargs else {})


def _text(content: object, name: str) -> str:
    """Return a content of text alone, given as text or as parts."""
    if isinstance(content, dict):
        content = _only_content(content, name)
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(_is_text(part) for part in parts):
        raise bad_request(name, content, "a text, or content parts of type text")
    return "".join(part["text"] for part in parts)


def _only_content(value: dict, name: str) -> object:
    """Return the content of an object that has nothing else."""
    if others := value.keys() - {"content"}:
        raise bad_request(f"{name}.{min(others, key=str)}", value[min(others, key=str)], 'an object of "content" alone')
    return value.get("content")


def _is_text(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def classify_answer(model: str, rewards: Sequence[float], is_activated: bool, num_tokens: int) -> dict:
    """Return the answer of ``/classify``: one label, whose probability is the reward."""
    data = [
        {"index": number, "label": "LABEL_0", "probs": [value], "num_classes": 1}
        for number, value in enumerate(activated(rewards, is_activated))
    ]
    return listing("classify", model, data, num_tokens)


def pooling_answer(model: str, rewards: Sequence[float], is_activated: bool, num_tokens: int) -> dict:
    """Return the answer of ``/pooling``."""
    data = [
        {"index": number, "object": "pooling", "data": [value]}
        for number, value in enumerate(activated(rewards, is_activated))
    ]
    return listing("pool", model, data, num_tokens)


def score_groups(body: Score) -> list[dict]:
    """Return the groups of a request to ``/score``: one of all documents for one query, or one for each pair.

    Query and document are the turns of user and assistant, which stock vLLM does not make of them.

    Raises:
        RecordError: BAD_REQUEST.
    """
    check_some("queries", body.queries)
    check_some("documents", body.documents)
    queries, documents = (value if isinstance(value, list) else [value] for value in (body.queries, body.documents))
    answers = [_text(document, f"documents[{number}]") for number, document in enumerate(documents)]
    questions = [_question(query, f"queries[{number}]") for number, query in enumerate(queries)]
    if len(queries) == 1:
        return [group_of(questions, answers)]
    if len(queries) != len(documents):
        raise RecordError(
            "BAD_REQUEST",
            f"there are {len(queries)} queries and {len(documents)} documents; send one query, or as many as documents",
        )
    return [group_of([question], [said]) for question, said in zip(questions, answers, strict=True)]


def _question(query: str | dict, name: str) -> dict:
    content = _only_content(query, name) if isinstance(query, dict) else query
    if not isinstance(content, (str, list)):
        raise bad_request(name, query, 'a text or {"content": [parts]}')
    return {"role": "user", "content": content}


def score_answer(model: str, rewards: Sequence[float], is_activated: bool, num_tokens: int) -> dict:
    """Return the answer of ``/score``: a score for each document, in order."""
    data = [
        {"index": number, "object": "score", "score": value}
        for number, value in enumerate(activated(rewards, is_activated))
    ]
    return listing("score", model, data, num_tokens)


def _pooling_form(content: dict) -> TextInput | ChatInput:
    return parsed(ChatInput if "messages" in content else TextInput, content)


def _classify_form(content: dict) -> TextInput | ChatInput | sglang.NativeInput:
    return parsed(sglang.NativeInput, content) if content.keys() & {"text", "input_ids"} else _pooling_form(content)


def routes(service: Service) -> APIRouter:
    """Return the router of /classify, /pooling, /score and /v1/score."""
    router = APIRouter()

    async def pooled(request: Request, body: TextInput | ChatInput, answer: Callable[..., dict]) -> dict:
        service.check_count(sglang.num_inputs(body.input) if isinstance(body, TextInput) else 1)
        asked = await reading(groups, body, service.reader(body.model))
        scored = await service.rewards(request, asked, body.model)
        return answer(scored.model, flat(scored.results), body.is_activated, scored.num_tokens)

    @router.post("/classify")
    async def classify(request: Request):
        body = await service.read(request, _classify_form)
        if isinstance(body, sglang.NativeInput):
            return await sglang.classify(service, request, body)
        return await pooled(request, body, classify_answer)

    @router.post("/pooling")
    async def pooling(request: Request) -> dict:
        return await pooled(request, await service.read(request, _pooling_form), pooling_answer)

    @router.post("/score")
    @router.post("/v1/score")
    async def score(request: Request) -> dict:
        body = await service.read(request, form_of(Score))
        scored = await service.rewards(request, await reading(score_groups, body), body.model)
        return score_answer(scored.model, flat(scored.results), body.is_activated, scored.num_tokens)

    return router
