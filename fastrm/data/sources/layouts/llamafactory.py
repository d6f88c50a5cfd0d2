"""LLaMA-Factory's ranking formats.

- sharegpt: `conversations` (or `messages`, OpenAI style) and one more turn each in `chosen` and
  `rejected`; also MMIF and the VLFeedback mirror.
- alpaca: `instruction`, `input`, `system`, `history` and the texts `chosen` and `rejected`.
- v1: `chosen_messages` and `rejected_messages`, two whole conversations.

``<image>`` in the text is always the place of an image.
"""

from fastrm.data.sources.conversation import (
    Turn,
    prompt_messages,
    read_turn,
    read_turns,
    response_message,
    text_turn,
)
from fastrm.data.sources.draft import Draft, answer, pair
from fastrm.data.sources.media import MEDIA_KEYS, Resolve, row_media
from fastrm.data.sources.values import check_text

KEYS = (
    ("conversations", "messages", "instruction"), "input", "system", "history", "chosen", "rejected", "chosen_messages",
    "rejected_messages", "margin", *MEDIA_KEYS,
)  # fmt: skip


def matches(row: dict) -> bool:
    if "chosen_messages" in row:
        return True
    has_prompt = "conversations" in row or "messages" in row or "instruction" in row
    # A list is TRL's format, whose sets may also have a column `messages`.
    return has_prompt and "chosen" in row and not isinstance(row["chosen"], list)


def parse(row: dict, resolve: Resolve) -> Draft:
    """Parse a row in this layout. Raises RecordError for a row that cannot be used."""
    images = row_media(row, resolve)
    responses = []
    for name in ("chosen", "rejected"):
        *turns, last = _conversation(row, resolve, name)
        prompt = prompt_messages(row, turns, images, replaces_system=True)
        responses.append(answer(prompt, response_message(last, name)))
    return pair(*responses, row)


def _conversation(row: dict, resolve: Resolve, name: str) -> list[Turn]:
    if "chosen_messages" in row:
        return read_turns(row.get(f"{name}_messages"), resolve, f"{name}_messages")
    return [*_prompt_turns(row, resolve), _response_turn(row.get(name), resolve, name)]


def _prompt_turns(row: dict, resolve: Resolve) -> list[Turn]:
    for key in ("conversations", "messages"):
        if key in row:
            return read_turns(row[key], resolve, key)
    parts = [check_text(row.get("instruction"), "instruction"), check_text(row.get("input", ""), "input")]
    return [text_turn("user", "\n".join(filter(None, parts)), "instruction")]


def _response_turn(value: object, resolve: Resolve, name: str) -> Turn:
    return read_turn(value, resolve, name) if isinstance(value, dict) else text_turn("assistant", value, name)
