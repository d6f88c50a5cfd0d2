"""A finished conversation, for scoring: the last turn of its messages, the assistant's, is the response.

``{"messages": [{"role", "content"}, ...]}`` with the row's images and videos. Such a row has no preference, so
training refuses it (NO_PREFERENCE), but with `paradigm: judge`: there its last turn is the text that the judge learns.
"""

from fastrm.data.sources.conversation import prompt_messages, read_turns, response_message
from fastrm.data.sources.draft import Draft, answer
from fastrm.data.sources.media import MEDIA_KEYS, Resolve, row_media

_MESSAGES = ("messages", "conversations", "conversation")
KEYS = (_MESSAGES, *MEDIA_KEYS)


def matches(row: dict) -> bool:
    # `conversations` alone belong to the layout `judge`, which is asked earlier.
    key = next((key for key in _MESSAGES if key in row), "messages")
    return isinstance(row.get(key), (list, tuple)) and not any(
        key in row for key in ("chosen", "rejected", "responses")
    )


def parse(row: dict, resolve: Resolve) -> Draft:
    """Parse a row in this layout. Raises RecordError for a row that cannot be used."""
    key = next((key for key in _MESSAGES if key in row), "messages")
    *turns, last = read_turns(row.get(key), resolve, key)
    said = response_message(last, key)
    conversation = answer(prompt_messages(row, turns, row_media(row, resolve)), said)
    return Draft((conversation,), judgement=lambda: conversation)
