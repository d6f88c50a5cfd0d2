"""Texts about responses that rows hold beside them, which critics and judges learn to write.

| key | what it holds |
|---|---|
| `chosen_reason`, `rejected_reason` | a critique of each response of a pair, as MM-RLHF has them |
| `critiques` | a list of texts, one for each response of a list |
| `thinking` | a judge's comparison of the row's two responses, in their order |

A text may be empty. Where no critic and no judge is trained, these keys are not read.
"""

from dataclasses import replace

from fastrm.data.sources.draft import Draft
from fastrm.data.sources.values import bad_row, check_text
from fastrm.errors import RecordError

_OF_PAIRS = {"chosen": "chosen_reason", "rejected": "rejected_reason"}
_OF_LISTS, _THINKING = "critiques", "thinking"
CRITIQUE_KEYS = (*_OF_PAIRS.values(), _OF_LISTS, _THINKING)


def with_critiques(draft: Draft, row: dict) -> Draft:
    """Return a draft whose responses have the critiques of its row.

    Raises:
        RecordError: BAD_ROW for a critique that is not text, or a list of another length; BAD_TEXT.
    """
    if _OF_LISTS in row:
        values, number = row[_OF_LISTS], len(draft.all_responses or draft.responses)
        if not isinstance(values, (list, tuple)) or len(values) != number:
            raise bad_row(_OF_LISTS, values, f"a list of {number} texts, one for each response")
        places = draft.places if draft.all_responses else range(number)  # some of the row's may be left out
        named = [(f"{_OF_LISTS}[{place}]", values[place]) for place in places]
    elif draft.names == tuple(_OF_PAIRS):
        named = [(key, row.get(key)) for key in _OF_PAIRS.values()]
    else:
        return draft
    texts = ["" if value is None else check_text(value, name) for name, value in named]
    responses = zip(draft.responses, texts, strict=True)
    return replace(draft, responses=tuple(replace(one, critique=text or one.critique) for one, text in responses))


def thinking_of(row: dict, draft: Draft) -> str:
    """Return the comparison of a row's two responses; empty if it has none.

    Raises:
        RecordError: BAD_ROW if it is not text, or of a pair whose better response is always the first; BAD_TEXT.
    """
    thinking = check_text(row.get(_THINKING, ""), _THINKING)
    if thinking and draft.names == tuple(_OF_PAIRS):
        raise RecordError(
            "BAD_ROW",
            '"thinking" beside "chosen" and "rejected" would always end in the verdict 1; write "responses": [a, b] '
            'and "preferences": [[1, 0]] where b is better, in an order that does not tell which is',
        )
    return thinking
