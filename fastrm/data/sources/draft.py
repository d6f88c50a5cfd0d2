"""The last step of every layout: responses and preferences, checked, as a `Record`."""

from dataclasses import dataclass

from fastrm.data.record import Message, Preference, Record, Response
from fastrm.data.sources.conversation import PLACEHOLDER
from fastrm.data.sources.values import check_number
from fastrm.errors import RecordError


@dataclass(frozen=True)
class Draft:
    """What a layout reads from one row."""

    responses: tuple[Response, ...]
    preferences: tuple[Preference, ...]


def answer(prompt: tuple[Message, ...], text: str, name: str, *, strict: bool = False) -> Response:
    """A response to a prompt.

    Args:
        strict: ``<image>`` is never plain text, and a response cannot hold an image.

    Raises:
        RecordError: EMPTY_RESPONSE, or IMAGE_COUNT for a placeholder in a strict layout.
    """
    if not text.strip():
        raise RecordError("EMPTY_RESPONSE", f'"{name}" is empty; write or remove it')
    if strict and PLACEHOLDER in text:
        raise RecordError("IMAGE_COUNT", f'"{name}" holds {PLACEHOLDER}; images belong in the prompt')
    return Response((*prompt, Message("assistant", (text,))))


def pair(chosen: Response, rejected: Response, row: dict) -> Draft:
    """A draft of two responses and one preference, with the row's `margin` if it has one."""
    margin = check_number(row["margin"], "margin") if "margin" in row else 0.0
    return Draft((chosen, rejected), (Preference(0, 1, margin),))


def to_record(draft: Draft, *, record_id: str, source: str, origin: str, require_preferences: bool) -> Record:
    """The record of a draft.

    Raises:
        RecordError: NO_PREFERENCE, or IDENTICAL_RESPONSES for a preference between equal responses.
    """
    if require_preferences and not draft.preferences:
        raise RecordError(
            "NO_PREFERENCE",
            f"there is no preference between the responses (found {len(draft.responses)}); "
            "add `preferences` or scores, or read the row for scoring only",
        )
    for preference in draft.preferences:
        winner, loser = draft.responses[preference.winner], draft.responses[preference.loser]
        if not preference.tie and winner == loser:
            raise RecordError(
                "IDENTICAL_RESPONSES",
                f"response {preference.winner} is preferred to response {preference.loser}, "
                "which is equal to it; remove the preference",
            )
    return Record(record_id, draft.responses, draft.preferences, source, origin)
