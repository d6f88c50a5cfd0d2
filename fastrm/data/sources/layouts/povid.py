"""POVID: two whole conversations, ``conversations`` (chosen) and ``rejected_conversations``, about one image.

``<image>`` in the text is always the place of an image.
"""

from fastrm.data.sources.conversation import prompt_messages, read_turns, response_message
from fastrm.data.sources.draft import Draft, answer, pair
from fastrm.data.sources.media import MEDIA_KEYS, Resolve, row_media

KEYS = ("conversations", "rejected_conversations", "margin", *MEDIA_KEYS)


def matches(row: dict) -> bool:
    return "rejected_conversations" in row


def parse(row: dict, resolve: Resolve) -> Draft:
    """Parse a row in this layout. Raises RecordError for a row that cannot be used."""
    media = row_media(row, resolve)
    responses = []
    for name in ("conversations", "rejected_conversations"):
        *turns, last = read_turns(row.get(name), resolve, name)
        prompt = prompt_messages(row, turns, media, replaces_system=True)
        responses.append(answer(prompt, response_message(last, name)))
    return pair(*responses, row)
