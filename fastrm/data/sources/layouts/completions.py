"""Rated completions of several models: UltraFeedback and VLFeedback.

``{"instruction" or "prompt", "completions": [{"response", "annotations": {aspect: {"Rating"}}}], "img_path"}``.
Ratings are numbers as text, "N/A" or absent. The score of a completion [ours]:

- UltraFeedback: the mean of its four ratings (which is its `fine-grained_score`), if every completion of the
  row has all four; else `overall_score`, if every one has it; else the mean, of those that have it. So the
  scores of a row are on one scale.
- VLFeedback: the mean of those of its three ratings that are numbers.

A completion without a score, an empty one, and one that repeats the text of an earlier one in the group are left out of
it, and named; the others stay. Scoring takes all of them. UltraFeedback's `custom_system_prompt` is not part of the
prompt; its `critique` of a completion is what critics and judges learn.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

from fastrm.data.record import ImageRef
from fastrm.data.sources.conversation import prompt_messages, text_turn
from fastrm.data.sources.draft import Draft, answer
from fastrm.data.sources.media import MEDIA_KEYS, Resolve, media_refs, row_media
from fastrm.data.sources.values import bad_row, check_list, check_text
from fastrm.errors import RecordError

_FINE_GRAINED = ("helpfulness", "honesty", "instruction_following", "truthfulness")
_VISUAL = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")

KEYS = (("instruction", "prompt"), "completions", "img_path", *MEDIA_KEYS)


def matches(row: dict) -> bool:
    return isinstance(row.get("completions"), (list, dict))


def parse(row: dict, resolve: Resolve) -> Draft:
    """Parse a row in this layout. Raises RecordError for a row that cannot be used."""
    key = "instruction" if "instruction" in row else "prompt"
    media = row_media(row, resolve) + media_refs(row.get("img_path"), resolve, "img_path", ImageRef)
    prompt = prompt_messages(row, [text_turn("user", row.get(key), key)], media)
    completions = _completions(row.get("completions"))
    texts = [check_text(c.get("response"), f"completions[{i}].response") for i, c in enumerate(completions)]
    scores = _scores(completions)
    left_out = dict(_unusable(texts, scores))
    usable = [i for i in range(len(texts)) if i not in left_out]
    reasons = _by_code(left_out)
    responses = tuple(
        replace(answer(prompt, text), critique=said if isinstance(said := one.get("critique"), str) else "")
        for text, one in zip(texts, completions, strict=True)
    )
    return Draft(
        tuple(responses[i] for i in usable),
        scores=tuple(scores[i] for i in usable),
        left_out=reasons,
        all_responses=responses,
        places=tuple(usable),
        problem=_too_few(len(usable), len(texts), reasons) if len(usable) < 2 else None,
    )


def _too_few(num_usable: int, num_completions: int, reasons: tuple[RecordError, ...]) -> RecordError:
    why = "; ".join(error.message for error in reasons) or "the row has no other"
    return RecordError(
        reasons[0].code if reasons else "NO_PREFERENCE",
        f"{num_usable} of {num_completions} completions can be used, wanted 2 or more: {why}",
    )


def _completions(value: object) -> list[dict]:
    """Return the completions of a row; Parquet may hold them as one list for each field."""
    if isinstance(value, dict):
        columns = {key: column for key, column in value.items() if isinstance(column, list)}
        if len({len(column) for column in columns.values()}) != 1:
            raise bad_row("completions", value, "a list of completions, or lists of equal length")
        value = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    completions = list(check_list(value, "completions", "a list of completions"))
    for i, completion in enumerate(completions):
        if not isinstance(completion, dict):
            raise bad_row(f"completions[{i}]", completion, 'an object with "response" and "annotations"')
    return completions


def _scores(completions: list[dict]) -> list[float | None]:
    if any(_annotation(completion, aspect) is not None for completion in completions for aspect in _VISUAL):
        return [_mean(_ratings(completion, _VISUAL)) for completion in completions]
    means = [_fine_grained(completion) for completion in completions]
    if None in means:
        overall = [_number(completion.get("overall_score")) for completion in completions]
        if None not in overall:
            return overall
    return means


def _fine_grained(completion: dict) -> float | None:
    if not completion.get("annotations"):
        return _number(completion.get("fine-grained_score"))
    ratings = _ratings(completion, _FINE_GRAINED)
    return _mean(ratings) if len(ratings) == len(_FINE_GRAINED) else None


def _ratings(completion: dict, aspects: tuple[str, ...]) -> list[float]:
    values = [_number((_annotation(completion, aspect) or {}).get("Rating")) for aspect in aspects]
    return [value for value in values if value is not None]


def _annotation(completion: dict, aspect: str) -> dict | None:
    annotations = completion.get("annotations")
    found = annotations.get(aspect) if isinstance(annotations, dict) else None
    return found if isinstance(found, dict) else None


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _unusable(texts: list[str], scores: list[float | None]) -> Iterator[tuple[int, str]]:
    """Yield (number, code) of the completions that are left out."""
    seen = set()
    for i, (text, score) in enumerate(zip(texts, scores, strict=True)):
        if not text.strip():
            yield i, "EMPTY_RESPONSE"
        elif score is None:
            yield i, "RATING_MISSING"
        elif text in seen:
            yield i, "REPEATED_RESPONSE"
        else:
            seen.add(text)


_REASONS = {
    "EMPTY_RESPONSE": "empty",
    "RATING_MISSING": "without a numeric rating",
    "REPEATED_RESPONSE": "repeating an earlier one",
}


def _by_code(left_out: dict[int, str]) -> tuple[RecordError, ...]:
    """Return one error for each code; it names the completions."""
    found = []
    for code, reason in _REASONS.items():
        names = ", ".join(f"completions[{i}]" for i, its_code in left_out.items() if its_code == code)
        if names:
            found.append(RecordError(code, f"left out, {reason}: {names}"))
    return tuple(found)
