"""One rated response a row, as in HelpSteer2, the responses to one prompt in consecutive rows.

The score is `score`, `rating` or HelpSteer2's `helpfulness` [ours]; its correctness, coherence, complexity and
verbosity are not used.
"""

from fastrm.data.sources.conversation import prompt_messages, text_turn
from fastrm.data.sources.draft import Draft, answer, rated
from fastrm.data.sources.keys import RENDERED_KEYS
from fastrm.data.sources.media import MEDIA_KEYS, Resolve, row_media
from fastrm.data.sources.values import check_number, check_text

_JOINED = "joined_rows"

_SCORES = ("helpfulness", "score", "rating")

KEYS = ("prompt", "response", _SCORES, _JOINED, *MEDIA_KEYS)


def matches(row: dict) -> bool:
    return "prompt" in row and "response" in row and any(key in row for key in _SCORES)


def continues(previous: dict, row: dict) -> bool:
    """Return whether a row has the same prompt as the row before it, with all that is rendered and shown beside it."""
    return all(previous.get(key) == row.get(key) for key in ("prompt", *RENDERED_KEYS, *MEDIA_KEYS))


def join(rows: list[dict]) -> dict:
    """Join the rows of one prompt to the row that `parse` takes."""
    return {**rows[0], _JOINED: rows}


def parse(row: dict, resolve: Resolve) -> Draft:
    """Parse rows in this layout. Raises RecordError for rows that cannot be used."""
    turns = [text_turn("user", row.get("prompt"), "prompt")]
    prompt = prompt_messages(row, turns, row_media(row, resolve))
    rows = [(one, f" of row {i + 1} of the prompt" if i else "") for i, one in enumerate(row.get(_JOINED, [row]))]
    responses = [answer(prompt, check_text(one.get("response"), "response" + where)) for one, where in rows]
    name = next((key for key in _SCORES if key in row), _SCORES[0])
    return rated(responses, lambda: [check_number(one.get(name), name + where) for one, where in rows])
