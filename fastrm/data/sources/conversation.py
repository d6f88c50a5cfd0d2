"""Turns as datasets write them -> messages, with every image at its place."""

from reprlib import repr as brief
from typing import NamedTuple

from fastrm.data.record import ROLES, ImageRef, Message, Part
from fastrm.data.sources.media import Resolve, image_ref
from fastrm.data.sources.values import bad_row, check_list, check_text
from fastrm.errors import RecordError

PLACEHOLDER = "<image>"
_ROLE_NAMES = {role: role for role in ROLES} | {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "developer": "system",
}
_IMAGE_KEYS = ("image", "image_url", "path", "url", "bytes", "value")


class Turn(NamedTuple):
    """One turn as it was read. A part that is None takes the next image of the row."""

    role: str
    parts: tuple[Part | None, ...]


def text_turn(role: str, text: object, name: str) -> Turn:
    return Turn(role, (check_text(text, name),))


def read_turns(value: object, resolve: Resolve, name: str) -> list[Turn]:
    """A list of ``{"role", "content"}`` or ``{"from", "value"}`` turns.

    Raises:
        RecordError: BAD_ROW or BAD_TEXT, or what `image_ref` raises for an image inside the content.
    """
    turns = check_list(value, name, "a list of messages")
    return [read_turn(turn, resolve, f"{name}[{i}]") for i, turn in enumerate(turns)]


def read_turn(value: object, resolve: Resolve, name: str) -> Turn:
    """One turn; its content is text or a list of parts."""
    if not isinstance(value, dict):
        raise bad_row(name, value, 'a message such as {"role", "content"}')
    role_key, content_key = ("from", "value") if value.get("from") is not None else ("role", "content")
    written = value.get(role_key)
    role = _ROLE_NAMES.get(written) if isinstance(written, str) else None
    if role is None:
        raise RecordError("BAD_ROW", f'"{name}.{role_key}" is {brief(written)}, wanted one of {", ".join(_ROLE_NAMES)}')
    content = value.get(content_key)
    name = f"{name}.{content_key}"
    if isinstance(content, list):
        return Turn(role, tuple(_read_part(part, resolve, f"{name}[{i}]") for i, part in enumerate(content)))
    return text_turn(role, content, name)


def prompt_messages(turns: list[Turn], images: list[ImageRef], *, strict: bool) -> tuple[Message, ...]:
    """The turns before a response, with the row's images at their places.

    The places are the image parts of the content if it has any, else the ``<image>`` placeholders in
    the text, else the start of the first user turn.

    Args:
        strict: ``<image>`` is never plain text, as in LLaMA-Factory and ms-swift; otherwise it is
            plain text in a row without images.

    Raises:
        RecordError: IMAGE_COUNT if the places are not as many as the images; BAD_ROW if the prompt
            is empty or ends with the assistant.
    """
    if not any(part != "" for turn in turns for part in turn.parts) and not images:
        raise RecordError("BAD_ROW", "the prompt is empty; every response needs a prompt or an image")
    if turns and turns[-1].role == "assistant":
        raise RecordError("BAD_ROW", "the prompt ends with the assistant's turn; end it with the user's")
    if all(isinstance(part, str) for turn in turns for part in turn.parts):
        if images or strict:
            turns = [Turn(turn.role, _split_placeholders(turn.parts)) for turn in turns]
        if images and not any(part is None for turn in turns for part in turn.parts):
            turns = _images_first(turns, len(images))
    return _fill(turns, images)


def response_text(turn: Turn, name: str) -> str:
    """The text of a turn that is a response.

    Raises:
        RecordError: BAD_ROW if it is not the assistant's or holds an image.
    """
    if turn.role != "assistant":
        raise RecordError("BAD_ROW", f'"{name}" ends with a turn of the {turn.role}, wanted the assistant')
    if not all(isinstance(part, str) for part in turn.parts):
        raise RecordError("BAD_ROW", f'"{name}" holds an image, wanted text only')
    return "".join(turn.parts)


def _read_part(part: object, resolve: Resolve, name: str) -> Part | None:
    if not isinstance(part, dict):
        raise bad_row(name, part, 'a content part such as {"type": "text", "text": ...}')
    kind = part.get("type")
    if kind == "text":
        key = "text" if part.get("text") is not None else "value"
        return check_text(part.get(key), f"{name}.{key}")
    if kind in ("image", "image_url"):
        key = next((key for key in _IMAGE_KEYS if part.get(key) is not None), None)
        return None if key is None else image_ref(part[key], resolve, f"{name}.{key}")
    if kind in ("video", "video_url", "audio", "audio_url"):
        raise RecordError("UNSUPPORTED_MEDIA", f'"{name}" is {kind}; only text and images are supported')
    raise RecordError("BAD_ROW", f'"{name}.type" is {brief(kind)}, wanted "text" or "image"')


def _split_placeholders(parts: tuple[str, ...]) -> tuple[str | None, ...]:
    split = []
    for text in parts:
        first, *rest = text.split(PLACEHOLDER)
        split.append(first)
        for piece in rest:
            split += (None, piece)
    return tuple(split)


def _images_first(turns: list[Turn], num_images: int) -> list[Turn]:
    for i, turn in enumerate(turns):
        if turn.role == "user":
            return [*turns[:i], Turn(turn.role, (None,) * num_images + turn.parts), *turns[i + 1 :]]
    raise RecordError("BAD_ROW", "the row has images but no user turn to show them in")


def _fill(turns: list[Turn], images: list[ImageRef]) -> tuple[Message, ...]:
    num_places = sum(part is None for turn in turns for part in turn.parts)
    if num_places != len(images):
        raise RecordError(
            "IMAGE_COUNT",
            f"the number of image places in the prompt ({PLACEHOLDER} or image parts) is {num_places}, "
            f"of images in the row {len(images)}; make them equal",
        )
    source = iter(images)
    return tuple(
        Message(turn.role, _merged([next(source) if part is None else part for part in turn.parts])) for turn in turns
    )


def _merged(parts: list[Part]) -> tuple[Part, ...]:
    """Join neighbouring texts and leave out empty ones: equal content has equal parts."""
    if len(parts) == 1:
        return tuple(parts)
    merged: list[Part] = []
    for part in parts:
        if part == "":
            continue
        if merged and isinstance(part, str) and isinstance(merged[-1], str):
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)
