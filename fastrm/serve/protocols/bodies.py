"""Parts that several protocols share: the form of bodies, their checks, and the forms of answers."""

import asyncio
import math
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastrm.errors import RecordError
from fastrm.serve.problems import BadRequest, RequestError


class Body(BaseModel):
    """A request's body. A key that it does not name is refused: it might ask for another reward than it would get."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


# Lists whose first wrong entry is enough: pydantic would describe each of a million.
Texts = Annotated[list[str], Field(fail_fast=True)]
Tokens = Annotated[list[int], Field(fail_fast=True)]
ManyTokens = Annotated[list[Tokens], Field(fail_fast=True)]

_Body = TypeVar("_Body", bound=Body)
_Read = TypeVar("_Read")


def form_of(kind: type[_Body]) -> Callable[[dict], _Body]:
    """Return the function that gives a request's JSON the form of a kind of body, as `Service.read` takes it."""
    return partial(parsed, kind)


def parsed(kind: type[_Body], body: dict) -> _Body:
    """Return a request's JSON as its kind of body.

    Raises:
        BadRequest: BAD_REQUEST, naming the first key that is wrong.
    """
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(map(str, problem["loc"])) or "body"
        raise BadRequest("BAD_REQUEST", f'"{place}": {problem["msg"]}; got {problem["input"]!r:.80}') from None


async def reading(read: Callable[..., _Read], *arguments) -> _Read:
    """Return what a function makes of a request's content, by another thread, since rendering takes a while.

    Raises:
        RequestError: status 422 with the code of a RecordError; BadRequest for BAD_REQUEST.
    """
    try:
        return await asyncio.to_thread(read, *arguments)
    except RecordError as error:
        if error.code == "BAD_REQUEST":
            raise BadRequest(error.code, error.message) from None
        raise RequestError(422, error.code, error.message) from None


def sigmoid(reward: float) -> float:
    """Return 1 / (1 + exp(-reward))."""
    small = math.exp(-abs(reward))
    return 1 / (1 + small) if reward >= 0 else small / (1 + small)


def activated(rewards: Sequence[float], use_activation: bool | None) -> list[float]:
    """Return rewards as they are, or their sigmoid where a request asks for the activation."""
    return [sigmoid(reward) for reward in rewards] if use_activation else list(rewards)


def flat(results: Sequence[Sequence[float]]) -> list[float]:
    """Return the rewards of all groups one after another."""
    return [reward for rewards in results for reward in rewards]


def bad_request(name: str, got: object, wanted: str) -> RecordError:
    """Return the error of a value that a protocol does not have."""
    return RecordError("BAD_REQUEST", f'"{name}" is {got!r:.80}, wanted {wanted}')


def check_some(name: str, values: object) -> None:
    """Refuse an empty list, as vLLM and SGLang do: their clients read the first entry of every answer.

    Raises:
        RecordError: BAD_REQUEST.
    """
    if values == []:
        raise bad_request(name, values, "one entry or more")


def check_as_many(name: str, values: Sequence, others: str, num_others: int) -> None:
    """Refuse a list that is not as long as another, and not left out.

    Raises:
        RecordError: BAD_REQUEST.
    """
    if values and len(values) != num_others:
        raise RecordError(
            "BAD_REQUEST",
            f'"{name}" has {len(values)} entries and "{others}" {num_others}; send one for each, or leave it out',
        )


def listing(prefix: str, model: str, data: list[dict], num_tokens: int) -> dict:
    """Return an answer in the form that vLLM's pooling endpoints share.

    Args:
        num_tokens: of all prompts with their responses.
    """
    usage = {
        "prompt_tokens": num_tokens, "total_tokens": num_tokens, "completion_tokens": 0, "prompt_tokens_details": None,
    }  # fmt: skip
    name, now = f"{prefix}-{uuid.uuid4().hex}", int(time.time())
    return {"id": name, "object": "list", "created": now, "model": model, "data": data, "usage": usage}
