"""Rated lists: ``{"prompt" or "messages", "responses": [{"text", "score"}, ...]}``, as in caption contests.

Each pair of responses becomes a preference for the higher score, equal scores a tie.
"""

from fastrm.data.record import Message
from fastrm.data.sources.conversation import response_message
from fastrm.data.sources.draft import Draft, answer, rated
from fastrm.data.sources.keys import RATED_TEXTS, is_turn
from fastrm.data.sources.layouts.groups import PROMPT_KEYS, read_response, row_prompt
from fastrm.data.sources.media import MEDIA_KEYS, Resolve
from fastrm.data.sources.values import bad_row, check_list, check_number, check_text

KEYS = (PROMPT_KEYS, "responses", *MEDIA_KEYS)


def matches(row: dict) -> bool:
    responses = row.get("responses")
    first = responses[0] if isinstance(responses, list) and responses else None
    # A turn without a score is a response in the layout `groups`.
    return isinstance(first, dict) and ("score" in first or not is_turn(first))


def parse(row: dict, resolve: Resolve) -> Draft:
    """Parse a row in this layout. Raises RecordError for a row that cannot be used."""
    prompt = row_prompt(row, resolve)
    values = check_list(row.get("responses"), "responses", "a list of rated texts")
    responses = [answer(prompt, _said(value, resolve, f"responses[{i}]")) for i, value in enumerate(values)]
    return rated(
        responses, lambda: [check_number(value.get("score"), f"responses[{i}].score") for i, value in enumerate(values)]
    )


def _said(value: object, resolve: Resolve, name: str) -> str | Message:
    if not isinstance(value, dict):
        raise bad_row(name, value, 'an object with "text" and "score"')
    if is_turn(value):
        turn = {key: item for key, item in value.items() if key != "score"}
        return response_message(read_response(turn, resolve, name), name)
    key = next((key for key in RATED_TEXTS if value.get(key) is not None), "text")
    return check_text(value.get(key), f"{name}.{key}")
