"""Flat pairs: ``prompt`` or ``question``, ``chosen`` and ``rejected`` as texts, ``image`` or ``images``.

MM-RLHF, RLAIF-V, MMPR, UnifiedReward and TRL's standard format with an explicit prompt; also ``margin``.
"""

from fastrm.data.sources.conversation import prompt_messages, text_turn
from fastrm.data.sources.draft import Draft, answer, pair
from fastrm.data.sources.media import MEDIA_KEYS, Resolve, row_media
from fastrm.data.sources.values import check_text

KEYS = (("prompt", "question"), "chosen", "rejected", "margin", *MEDIA_KEYS)


def matches(row: dict) -> bool:
    answers = [row[key] for key in ("chosen", "rejected") if key in row]
    is_text = isinstance(row.get("prompt", row.get("question")), str)
    return is_text and bool(answers) and not any(isinstance(value, list) for value in answers)


def parse(row: dict, resolve: Resolve) -> Draft:
    """Parse a row in this layout. Raises RecordError for a row that cannot be used."""
    key = "prompt" if "prompt" in row else "question"
    prompt = prompt_messages(row, [text_turn("user", row.get(key), key)], row_media(row, resolve))
    chosen, rejected = (answer(prompt, check_text(row.get(name), name)) for name in ("chosen", "rejected"))
    return pair(chosen, rejected, row)
