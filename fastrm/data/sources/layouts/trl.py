"""TRL's preference format: standard or conversational, with an explicit or an implicit prompt.

Without `prompt`, or when `chosen` and `rejected` start with the prompt's own turns (Skywork, Tulu,
OLMo mixes), both are whole conversations. A prompt that they do not repeat, though they start with the system or the
user, is refused: it would not be read. Images are `images` or `image`, at the image parts of the
content or else before the first user turn. `margin` is optional.
"""

import os

from fastrm.data.sources.conversation import Turn, prompt_messages, read_turns, response_message, text_turn
from fastrm.data.sources.draft import Draft, answer, pair
from fastrm.data.sources.media import MEDIA_KEYS, Resolve, row_media
from fastrm.data.sources.values import bad_row, check_text
from fastrm.errors import RecordError

KEYS = ("prompt", "chosen", "rejected", "margin", *MEDIA_KEYS)


def matches(row: dict) -> bool:
    return "chosen" in row or "rejected" in row


def parse(row: dict, resolve: Resolve) -> Draft:
    """Parse a row in this layout. Raises RecordError for a row that cannot be used."""
    if "prompt" not in row and isinstance(row.get("chosen"), str):
        row = row | _split_prompt(row)
    prompt = _prompt_turns(row.get("prompt"), resolve)
    images = row_media(row, resolve)
    responses = []
    for name in ("chosen", "rejected"):
        is_text = isinstance(row.get("prompt"), str)
        *turns, last = _conversation(prompt, row.get(name), resolve, name, is_text=is_text)
        messages = prompt_messages(row, turns, images)
        responses.append(answer(messages, response_message(last, name)))
    return pair(*responses, row)


def _prompt_turns(value: object, resolve: Resolve) -> list[Turn]:
    if value is None:
        return []
    if isinstance(value, str):
        return [text_turn("user", value, "prompt")]
    if isinstance(value, list):
        return read_turns(value, resolve, "prompt")
    raise bad_row("prompt", value, "text or a list of messages")


def _conversation(prompt: list[Turn], value: object, resolve: Resolve, name: str, *, is_text: bool) -> list[Turn]:
    """Return the whole conversation that ends with a response, which may repeat the prompt or follow it."""
    if isinstance(value, str):
        return [*prompt, text_turn("assistant", value, name)]
    if not isinstance(value, list):
        raise bad_row(name, value, "text or a list of messages")
    turns = read_turns(value, resolve, name)
    if turns[0].role not in ("system", "user"):
        return [*prompt, *turns]
    if not _repeats(prompt, turns, is_text=is_text):
        raise RecordError(
            "BAD_ROW",
            f'"{name}" is a whole conversation that does not begin with "prompt", which would not be read; '
            "remove one of them, or begin the conversation with the prompt",
        )
    return turns


def _repeats(prompt: list[Turn], turns: list[Turn], *, is_text: bool) -> bool:
    """Return whether a conversation repeats the prompt. As text it may be a part of one turn, or all turns in one."""
    if not is_text:
        return turns[: len(prompt)] == prompt
    said, texts = _said(prompt[0]), [_said(turn) for turn in turns[:-1] if turn.role != "assistant"]
    return any(said in text for text in texts) or all(text in said for text in texts)


def _said(turn: Turn) -> str:
    return "".join(part for part in turn.parts if isinstance(part, str)).strip()


def _split_prompt(row: dict) -> dict:
    """Split off the prompt of a row in standard format: the words that both texts begin with, as TRL does."""
    chosen, rejected = (check_text(row.get(name), name) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise RecordError("IDENTICAL_RESPONSES", "chosen and rejected are equal; remove the row")
    common = os.path.commonprefix([chosen, rejected])  # noqa: RUF071  (by character is meant)
    cut = max(common.rfind(" "), common.rfind("\n"))
    if common.rstrip().endswith(":") and common.strip() in (chosen.strip(), rejected.strip()):
        cut = len(common)  # HH's dialogues end with "Assistant:" where the response is empty
    if cut <= 0:
        raise RecordError("BAD_ROW", '"prompt" is missing, and chosen and rejected begin differently; add it')
    return {"prompt": common[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}
