"""Rated lists: ``{"prompt" or "messages", "responses": [{"text", "score"}, ...]}``, as in caption contests.

Each pair of responses becomes a preference for the higher score, equal scores a tie.
"""

from fastrm.data.sources.draft import Draft, answer
from fastrm.data.sources.groups import PROMPT_KEYS, row_prompt
from fastrm.data.sources.media import MEDIA_KEYS, Resolve
from fastrm.data.sources.values import bad_row, check_list, check_number, check_text

_TEXT_KEYS = ("text", "caption", "response", "completion", "content", "answer", "output")

KEYS = (PROMPT_KEYS, "responses", *MEDIA_KEYS)


def matches(row: dict) -> bool:
    responses = row.get("responses")
    first = responses[0] if isinstance(responses, list) and responses else None
    # A turn without a score is a response of `groups`.
    return isinstance(first, dict) and ("score" in first or "role" not in first)


def parse(row: dict, resolve: Resolve) -> Draft:
    """See the module. Raises RecordError for a row that cannot be used."""
    prompt = row_prompt(row, resolve)
    responses, scores = [], []
    for i, rated in enumerate(check_list(row.get("responses"), "responses", "a list of rated texts")):
        text, score = _rated(rated, f"responses[{i}]")
        responses.append(answer(prompt, text, f"responses[{i}]"))
        scores.append(score)
    return Draft(tuple(responses), scores=tuple(scores))


def _rated(value: object, name: str) -> tuple[str, float]:
    if not isinstance(value, dict):
        raise bad_row(name, value, 'an object with "text" and "score"')
    key = next((key for key in _TEXT_KEYS if value.get(key) is not None), "text")
    return check_text(value.get(key), f"{name}.{key}"), check_number(value.get("score"), f"{name}.score")
