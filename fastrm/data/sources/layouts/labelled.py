"""Text prompts with two responses and a label that says which is better.

| set | prompt | first, second | label |
|---|---|---|---|
| SHP | `history` | `human_ref_A`, `human_ref_B` | `labels`: 1 = the first, 0 = the second |
| HelpSteer3 | `context`, messages | `response1`, `response2` | `overall_preference`, -3 to 3 |
| HelpSteer2's preferences | `prompt` | `response_1`, `response_2` | `preference_strength`, -3 to 3 |
| PandaLM | `instruction`, a line break, `input` | `response1`, `response2` | `annotator1`, ...: 1, 2 or 0 = a tie |

A strength below 0 prefers the first, above 0 the second; 0 is a tie. Its size gives a margin where the source has a
`margin` by which it is multiplied, and else is not used [ours]. PandaLM's annotators
decide by more than half of their votes, otherwise the row is a tie [ours].
"""

from dataclasses import replace
from typing import NamedTuple

from fastrm.data.record import Preference
from fastrm.data.sources.conversation import prompt_messages, read_turns, text_turn
from fastrm.data.sources.draft import Draft, answer, judged
from fastrm.data.sources.media import MEDIA_KEYS, Resolve, row_media
from fastrm.data.sources.values import check_number, check_text
from fastrm.errors import RecordError


class _Columns(NamedTuple):
    prompt: str
    first: str
    second: str
    label: str


_COLUMNS = (
    _Columns("history", "human_ref_A", "human_ref_B", "labels"),
    _Columns("context", "response1", "response2", "overall_preference"),
    _Columns("prompt", "response_1", "response_2", "preference_strength"),
    _Columns("instruction", "response1", "response2", "annotator1"),
)
_STRENGTHS = ("overall_preference", "preference_strength")
_VOTES = tuple(f"annotator{number}" for number in range(1, 6))

KEYS = (*dict.fromkeys(name for columns in _COLUMNS for name in columns), "input", *_VOTES[1:], *MEDIA_KEYS)


def matches(row: dict) -> bool:
    return any(columns.first in row and columns.second in row for columns in _COLUMNS)


def parse(row: dict, resolve: Resolve) -> Draft:
    """Parse a row in this layout. Raises RecordError for a row that cannot be used."""
    named = [c for c in _COLUMNS if c.first in row or c.second in row] or [_COLUMNS[2]]
    columns = next((c for c in named if c.label in row or c.prompt in row), named[0])
    value = row.get(columns.prompt)
    if columns.prompt == "instruction" and row.get("input"):
        value = f"{check_text(value, 'instruction')}\n{check_text(row['input'], 'input')}"
    if isinstance(value, list):
        turns = read_turns(value, resolve, columns.prompt)
    else:
        turns = [text_turn("user", value, columns.prompt)]
    context = {key: value for key, value in row.items() if key != columns.prompt}  # SHP's `history` is its prompt
    prompt = prompt_messages(context, turns, row_media(row, resolve))
    texts = [check_text(row.get(name), name) for name in (columns.first, columns.second)]
    responses = tuple(answer(prompt, text) for text in texts)
    draft = judged(responses, lambda: (_labelled(row, columns.label),), columns[1:3])
    is_strength = draft.problem is None and columns.label in _STRENGTHS
    return replace(draft, strength=abs(row[columns.label])) if is_strength else draft


def _labelled(row: dict, label: str) -> Preference:
    if label in _VOTES:
        return _majority([check_number(row[name], name) for name in _VOTES if name in row])
    return _preference(check_number(row.get(label), label), label)


def _majority(votes: list[float]) -> Preference:
    if not votes or any(vote not in (0, 1, 2) for vote in votes):
        raise RecordError("BAD_PREFERENCE", f'"annotator1" and so on are {votes}, wanted 1, 2 or 0 (a tie) of each')
    first, second = votes.count(1), votes.count(2)
    if 2 * max(first, second) <= len(votes):
        return Preference(0, 1, tie=True)
    return Preference(0, 1) if first > second else Preference(1, 0)


def _preference(label: float, name: str) -> Preference:
    if name == "labels":
        if label not in (0, 1):
            raise RecordError("BAD_PREFERENCE", f'"labels" is {label:g}, wanted 1 (the first is better) or 0')
        return Preference(0, 1) if label == 1 else Preference(1, 0)
    if label == 0:
        return Preference(0, 1, tie=True)
    return Preference(0, 1) if label < 0 else Preference(1, 0)
