"""Arenas: two models' whole conversations and a vote (WildVision-Battle, VisionArena-Battle).

`winner` is model_a, model_b, tie or tie (bothbad). The prompt of each response is its own model's
conversation up to it; earlier answers of the two models differ. An embedded image belongs to the first
user turn unless placeholders or image parts say otherwise.
"""

from reprlib import repr as brief

from fastrm.data.record import Preference
from fastrm.data.sources.conversation import prompt_messages, read_turns, response_message
from fastrm.data.sources.draft import Draft, answer, judged
from fastrm.data.sources.media import MEDIA_KEYS, Resolve, row_media
from fastrm.errors import RecordError

_VOTES = {
    "model_a": Preference(0, 1),
    "model_b": Preference(1, 0),
    "tie": Preference(0, 1, tie=True),
    "tie (bothbad)": Preference(0, 1, tie=True),
}

KEYS = ("conversation_a", "conversation_b", "winner", *MEDIA_KEYS)


def matches(row: dict) -> bool:
    return "conversation_a" in row and "conversation_b" in row


def parse(row: dict, resolve: Resolve) -> Draft:
    """Parse a row in this layout. Raises RecordError for a row that cannot be used."""
    media = row_media(row, resolve)
    names, responses = ("conversation_a", "conversation_b"), []
    for name in names:
        *turns, last = read_turns(row.get(name), resolve, name)
        prompt = prompt_messages(row, turns, media)
        responses.append(answer(prompt, response_message(last, name)))
    return judged(responses, lambda: (_vote(row.get("winner")),), names)


def _vote(winner: object) -> Preference:
    vote = _VOTES.get(winner) if isinstance(winner, str) else None
    if vote is None:
        raise RecordError("BAD_PREFERENCE", f'"winner" is {brief(winner)}, wanted one of {", ".join(_VOTES)}')
    return vote
