"""Conversion of turns as data sets write them to messages, with media in place and all that templates render.
"""

import re
from dataclasses import replace
from reprlib import repr as brief
from typing import NamedTuple

from fastrm.data.record import ROLES, ImageRef, MediaRef, Message, Part, VideoRef
from fastrm.data.sources.keys import TURN_NOTES
from fastrm.data.sources.media import Resolve, media_ref
from fastrm.data.sources.values import bad_row, check_json, check_list, check_text, decode_json
from fastrm.errors import RecordError

# Each placeholder in a text stands for the row's next medium of its kind. <<image>> is the text <image>.
PLACEHOLDERS = {"<image>": ImageRef, "<video>": VideoRef}
_PLACEHOLDER = re.compile("(<<image>>|<<video>>|<image>|<video>)")
_ROLE_NAMES = {role: role for role in ROLES} | {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool_response": "tool",
}
_CALL_ROLES = ("function_call", "tool_call")  # roles of LLaMA-Factory and ms-swift whose content is the call, as JSON
_OWN_KEYS = ("role", "content", "from", "value")
_KINDS = {"image": ImageRef, "image_url": ImageRef, "video": VideoRef, "video_url": VideoRef}
_MEDIA_KEYS = ("path", "url", "bytes", "value")


class Turn(NamedTuple):
    """One turn as it was read. A part that is a class takes the row's next medium of that kind.

    `fields` is that of `Message`.
    """

    role: str
    parts: tuple[Part | type[MediaRef], ...]
    fields: str = ""


def text_turn(role: str, text: object, name: str) -> Turn:
    return Turn(role, (check_text(text, name),))


def read_turns(value: object, resolve: Resolve, name: str) -> list[Turn]:
    """Read a list of ``{"role", "content"}`` or ``{"from", "value"}`` turns.

    Raises:
        RecordError: BAD_ROW or BAD_TEXT, or what `media_ref` raises for a medium inside the content.
    """
    turns = check_list(value, name, "a list of messages")
    return [read_turn(turn, resolve, f"{name}[{i}]") for i, turn in enumerate(turns)]


def read_turn(value: object, resolve: Resolve, name: str) -> Turn:
    """Read one turn, whose content is text or a list of parts.

    The assistant's content may be missing beside `tool_calls` or the like.

    All other keys but nulls and notes (`TURN_NOTES`) become `Turn.fields`: whether the template renders them is
    seen when the turn is encoded.
    """
    if not isinstance(value, dict):
        raise bad_row(name, value, 'a message such as {"role", "content"}')
    role_key, content_key = ("from", "value") if value.get("from") is not None else ("role", "content")
    written = value.get(role_key)
    role = _ROLE_NAMES.get(written) if isinstance(written, str) else None
    if role is None:
        raise RecordError("BAD_ROW", f'"{name}.{role_key}" is {brief(written)}, wanted one of {", ".join(_ROLE_NAMES)}')
    content = value.get(content_key)
    name = f"{name}.{content_key}"
    if value.get("content") is not None and value.get("value") not in (None, value["content"]):
        raise RecordError("BAD_ROW", f'"{name}" has another "value" than "content"; remove one of them')
    left = {key: v for key, v in value.items() if v is not None and key not in _OWN_KEYS and key not in TURN_NOTES}
    if written in _CALL_ROLES and (calls := _read_calls(content)):
        content, left = "", {"tool_calls": calls, **left}
    fields = check_json(left, name) if left else ""
    if isinstance(content, list):
        return Turn(role, tuple(_read_part(part, resolve, f"{name}[{i}]") for i, part in enumerate(content)), fields)
    if content is None and role == "assistant" and left:
        content = ""
    return text_turn(role, content, name)._replace(fields=fields)


def prompt_messages(
    row: dict, turns: list[Turn], media: list[MediaRef], *, replaces_system: bool = False
) -> tuple[Message, ...]:
    """Return the messages before a response: the row's `system` and `history`, then `turns`, media in place.

    The places are the media parts of the content if it has any, else the ``<image>`` and ``<video>``
    placeholders in the text, else, of a kind without any, the start of the first user turn. A text that only speaks
    of a placeholder writes ``<<image>>``; beside media parts, placeholders are text.

    Args:
        replaces_system: as in LLaMA-Factory and ms-swift, a system turn replaces the row's `system`; otherwise
            they must agree.

    Raises:
        RecordError: IMAGE_COUNT or VIDEO_COUNT if the places are not as many as the media; BAD_ROW if the
            prompt is empty or ends with the assistant, or for a bad `system` or `history`.
    """
    turns = _in_context(row, turns, replaced=replaces_system)
    if not any(part != "" for turn in turns for part in (*turn.parts, turn.fields)) and not media:
        raise RecordError("BAD_ROW", "the prompt is empty; every response needs a prompt or an image")
    if turns and turns[-1].role == "assistant":
        raise RecordError("BAD_ROW", "the prompt ends with the assistant's turn; end it with the user's")
    if all(isinstance(part, str) for turn in turns for part in turn.parts):
        turns = [turn._replace(parts=_split_placeholders(turn.parts)) for turn in turns]
        homeless = tuple(type(ref) for ref in media if not any(type(ref) in turn.parts for turn in turns))
        if homeless:
            turns = _media_first(turns, homeless)
    return _fill(turns, media)


def response_message(turn: Turn, name: str) -> Message:
    """Convert a turn that is a response to a message.

    Raises:
        RecordError: BAD_ROW if it is not the assistant's or holds an image or a video.
    """
    if turn.role != "assistant":
        raise RecordError("BAD_ROW", f'"{name}" ends with a turn of the {turn.role}, wanted the assistant')
    if not all(isinstance(part, str) for part in turn.parts):
        raise RecordError("BAD_ROW", f'"{name}" holds an image or a video, wanted text only')
    return Message(turn.role, ("".join(turn.parts),), turn.fields)


def template_arguments(row: dict) -> str:
    """Return `Response.arguments` of a row: its `tools`, `documents` and `chat_template_kwargs`.

    Raises:
        RecordError: BAD_ROW, BAD_JSON or BAD_TEXT.
    """
    found = {key: value for key in ("tools", "documents") if (value := _json_list(row.get(key), key))}
    further = row.get("chat_template_kwargs") or {}
    if not isinstance(further, dict):
        raise bad_row("chat_template_kwargs", further, "an object")
    found |= {key: value for key, value in further.items() if value is not None}
    return check_json(found, "tools") if found else ""


def _json_list(value: object, name: str) -> list | None:
    """Return a list of objects; it may be given as JSON text, as trainers write it."""
    if isinstance(value, str) and value.strip():
        try:
            value = decode_json(value)
        except (ValueError, RecursionError) as error:
            raise RecordError("BAD_JSON", f'"{name}" is text that is not JSON: {error}; correct it') from error
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise bad_row(name, value, "a list of objects, or the same as JSON text")
    return value


def _read_calls(content: object) -> list[dict] | None:
    """Read the content of a turn in `_CALL_ROLES` as `tool_calls`; None if it is not calls in JSON."""
    try:
        calls = decode_json(content)
    except (TypeError, ValueError, RecursionError):
        return None
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls):
        return None
    return [{"type": "function", "function": call} for call in calls]


def _in_context(row: dict, turns: list[Turn], *, replaced: bool) -> list[Turn]:
    """Return the turns after the row's `system` and `history`; if `replaced`, their own system turn wins."""
    own = turns[:1] if turns and turns[0].role == "system" else []
    system = [text_turn("system", row["system"], "system")] if row.get("system") else []
    if own and system and own != system and not replaced:
        raise RecordError("BAD_ROW", '"system" is not the system turn that the prompt begins with; remove one of them')
    return [*(own or system), *_history(row), *turns[len(own) :]]


def _history(row: dict) -> list[Turn]:
    """Return the earlier turns of a row, from its list of [query, response] pairs."""
    history = row.get("history", [])
    if not isinstance(history, list):
        raise bad_row("history", history, "a list of [query, response] pairs")
    turns = []
    for i, exchange in enumerate(history):
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise bad_row(f"history[{i}]", exchange, "[query, response]")
        turns.append(text_turn("user", exchange[0], f"history[{i}][0]"))
        turns.append(text_turn("assistant", exchange[1], f"history[{i}][1]"))
    return turns


def _read_part(part: object, resolve: Resolve, name: str) -> Part | type[MediaRef]:
    if not isinstance(part, dict):
        raise bad_row(name, part, 'a content part such as {"type": "text", "text": ...}')
    kind = part.get("type")
    if kind == "text":
        key = "text" if part.get("text") is not None else "value"
        return check_text(part.get(key), f"{name}.{key}")
    if isinstance(kind, str) and kind in _KINDS:
        ref_kind = _KINDS[kind]
        keys = (ref_kind.noun, f"{ref_kind.noun}_url", *_MEDIA_KEYS)
        key = next((key for key in keys if part.get(key) is not None), None)
        return ref_kind if key is None else media_ref(part[key], resolve, f"{name}.{key}", ref_kind)
    if kind in ("audio", "audio_url", "input_audio"):
        raise RecordError("UNSUPPORTED_MEDIA", f'"{name}" is {kind}; only text, images and videos are supported')
    raise RecordError("BAD_ROW", f'"{name}.type" is {brief(kind)}, wanted "text", "image" or "video"')


def without_placeholders(message: Message, name: str, *, refuse: bool) -> Message:
    """Return a response with ``<<image>>`` in its text replaced by ``<image>``.

    Args:
        refuse: a placeholder, which stands for an image that a response cannot hold, is an error; otherwise it is text.

    Raises:
        RecordError: IMAGE_COUNT or VIDEO_COUNT.
    """
    pieces = _PLACEHOLDER.split(message.text)
    if refuse and (found := next((piece for piece in pieces if piece in PLACEHOLDERS), None)):
        noun = PLACEHOLDERS[found].noun
        raise RecordError(
            f"{noun.upper()}_COUNT",
            f"{name} holds {found}; {noun}s belong in the prompt. Where it only speaks of it, write <{found}>, or "
            "set `images: none` for a source without images and videos",
        )
    return replace(message, parts=("".join(map(_unescaped, pieces)),)) if len(pieces) > 1 else message


def escaped(value: object) -> object:
    """Escape every placeholder in the texts of a row's value, so that it is read as text."""
    if isinstance(value, str):
        for placeholder in PLACEHOLDERS:
            value = value.replace(placeholder, f"<{placeholder}>")
        return value
    if isinstance(value, dict):
        return {key: escaped(item) for key, item in value.items()}
    return list(map(escaped, value)) if isinstance(value, (list, tuple)) else value


def unescaped(text: str) -> str:
    """Undo `escaped`."""
    return "".join(map(_unescaped, _PLACEHOLDER.split(text)))


def _unescaped(piece: str) -> str:
    return piece[1:-1] if piece[1:-1] in PLACEHOLDERS else piece


def _split_placeholders(parts: tuple[str, ...]) -> tuple[str | type[MediaRef], ...]:
    pieces = (piece for text in parts for piece in _PLACEHOLDER.split(text))
    return tuple(PLACEHOLDERS.get(piece, _unescaped(piece)) for piece in pieces)


def _media_first(turns: list[Turn], places: tuple[type[MediaRef], ...]) -> list[Turn]:
    for i, turn in enumerate(turns):
        if turn.role == "user":
            return [*turns[:i], turn._replace(parts=places + turn.parts), *turns[i + 1 :]]
    raise RecordError("BAD_ROW", "the row has images but no user turn to show them in")


def _fill(turns: list[Turn], media: list[MediaRef]) -> tuple[Message, ...]:
    sources = {}
    for placeholder, kind in PLACEHOLDERS.items():
        refs = [ref for ref in media if type(ref) is kind]
        num_places = sum(part is kind for turn in turns for part in turn.parts)
        if num_places != len(refs):
            raise RecordError(
                f"{kind.noun.upper()}_COUNT",
                f"the number of {kind.noun} places in the prompt ({placeholder} or {kind.noun} parts) is "
                f"{num_places}, of {kind.noun}s in the row {len(refs)}; make them equal. Where a text only speaks of "
                f"{placeholder}, write <{placeholder}>, or set `images: none` for a source without images and videos",
            )
        sources[kind] = iter(refs)
    return tuple(
        Message(
            turn.role,
            _merged([next(sources[part]) if isinstance(part, type) else part for part in turn.parts]),
            turn.fields,
        )
        for turn in turns
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
