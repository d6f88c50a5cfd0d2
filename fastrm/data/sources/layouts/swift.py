"""ms-swift's preference rows: `messages` that end with the chosen response, and what is rejected.

Rejected is `rejected_response` (text, or the messages after the last user turn), or
`rejected_messages` (a whole conversation with its own `rejected_images` and `rejected_videos`), or these
alone (the same conversation about other media). `rejected_tools` are the tools of the rejected conversation.
The older columns `query`, `response`, `history` and `system`, and ms-swift's aliases of them, also work.
``<image>`` in the text is always the place of an image, ``<video>`` of a video.
"""

from dataclasses import replace

from fastrm.data.record import ImageRef, MediaRef, Response, VideoRef
from fastrm.data.sources.conversation import (
    Turn,
    prompt_messages,
    read_turns,
    response_message,
    template_arguments,
    text_turn,
)
from fastrm.data.sources.draft import Draft, answer, pair
from fastrm.data.sources.media import MEDIA_KEYS, Resolve, media_refs, row_media
from fastrm.data.sources.values import bad_row, check_list
from fastrm.errors import RecordError

_MESSAGES = ("messages", "conversations", "conversation")
_QUERY = ("query", "prompt", "input", "instruction", "question", "problem")
_RESPONSE = ("response", "answer", "output")
_REJECTED = ("rejected_response", "rejected_messages", "rejected_images", "rejected_videos", "rejected_tools")

KEYS = (_MESSAGES, _QUERY, _RESPONSE, *_REJECTED, "history", "system", "margin", "objects", *MEDIA_KEYS)


def matches(row: dict) -> bool:
    return any(key in row for key in _REJECTED)


def parse(row: dict, resolve: Resolve) -> Draft:
    """Parse a row in this layout. Raises RecordError for a row that cannot be used."""
    if row.get("objects"):
        raise RecordError(
            "UNRENDERED_KEY",
            'the row has "objects", names and boxes for <ref-object> and <bbox>, which are not put in; '
            "write them into the texts and remove it",
        )
    turns = _chosen_turns(row, resolve)
    media = row_media(row, resolve)
    chosen = _response(row, turns, media, "chosen")
    rejected_media = [ref for kind in (ImageRef, VideoRef) for ref in _rejected_media(row, media, resolve, kind)]
    rejected = _response(row, _rejected_turns(row, turns, resolve), rejected_media, "rejected")
    if "rejected_tools" in row:
        rejected = replace(rejected, arguments=template_arguments({**row, "tools": row["rejected_tools"]}))
    return pair(chosen, rejected, row)


def _response(row: dict, turns: list[Turn], media: list[MediaRef], name: str) -> Response:
    *prompt, last = turns
    messages = prompt_messages(row, prompt, media, replaces_system=True)
    return answer(messages, response_message(last, name))


def _chosen_turns(row: dict, resolve: Resolve) -> list[Turn]:
    key = next((key for key in _MESSAGES if key in row), None)
    if key is not None:
        return read_turns(row[key], resolve, key)
    query = next((key for key in _QUERY if key in row), "messages")
    response = next((key for key in _RESPONSE if key in row), "response")
    return [text_turn("user", row.get(query), query), text_turn("assistant", row.get(response), response)]


def _rejected_turns(row: dict, chosen: list[Turn], resolve: Resolve) -> list[Turn]:
    if "rejected_messages" in row:
        return read_turns(row["rejected_messages"], resolve, "rejected_messages")
    value = row.get("rejected_response")
    if value is None:
        return chosen
    if isinstance(value, str):
        return [*chosen[:-1], text_turn("assistant", value, "rejected_response")]
    if not isinstance(value, list):
        raise bad_row("rejected_response", value, "text or a list of messages")
    turns = read_turns(check_list(value, "rejected_response", "messages"), resolve, "rejected_response")
    after_user = max((i for i, turn in enumerate(chosen) if turn.role == "user"), default=-1) + 1
    return [*chosen[:after_user], *turns]


def _rejected_media(row: dict, media: list[MediaRef], resolve: Resolve, kind: type[MediaRef]) -> list[MediaRef]:
    key = f"rejected_{kind.noun}s"
    if key in row:
        return media_refs(row[key], resolve, key, kind)
    media = [ref for ref in media if type(ref) is kind]
    if "rejected_messages" in row and media:
        # To copy the media would be a guess; without any, their absence alone would tell chosen and rejected apart.
        raise RecordError(
            f"{kind.noun.upper()}_COUNT",
            f'"rejected_messages" comes without "{key}"; repeat the {kind.noun}s there',
        )
    return media
