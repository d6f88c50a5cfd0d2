"""A judge's text by its parts: the prompt that shows two responses, what the judge thinks of them, and its answer.

``{"prompt", "thinking", "answer"}``, in the form of R1-Reward's supervised step, whose own rows are not public [ours]:
`prompt` is the judge's whole prompt, text or messages, with the row's images; `answer` is 1 or 2, or that in an
<answer> tag. The judge's turn is ``<think>thinking</think><answer>answer</answer>``. Only `paradigm: judge` is trained
on such rows; for others they have no preference.
"""

import re

from fastrm.data.sources.conversation import prompt_messages, read_turns, text_turn
from fastrm.data.sources.draft import Draft, answer
from fastrm.data.sources.media import MEDIA_KEYS, Resolve, row_media
from fastrm.data.sources.values import check_text
from fastrm.errors import RecordError
from fastrm.prompts.verdicts import Verdict, write_verdict

_ANSWER = re.compile(r"\s*(?:<answer>)?\s*([12])\s*(?:</answer>)?\s*")

KEYS = ("prompt", "thinking", "answer", *MEDIA_KEYS)


def matches(row: dict) -> bool:
    has_pair = any(key in row for key in ("chosen", "rejected", "responses"))
    return all(key in row for key in ("prompt", "thinking", "answer")) and not has_pair


def parse(row: dict, resolve: Resolve) -> Draft:
    """Parse a row in this layout. Raises RecordError for a row that cannot be used."""
    prompt = row["prompt"]
    turns = read_turns(prompt, resolve, "prompt") if isinstance(prompt, list) else [text_turn("user", prompt, "prompt")]
    verdict, thinking = _verdict(row["answer"]), check_text(row["thinking"], "thinking")
    said = write_verdict("r1_reward", verdict, thinking)
    conversation = answer(prompt_messages(row, turns, row_media(row, resolve)), said)
    return Draft((conversation,), judgement=lambda: conversation)


def _verdict(value: object) -> Verdict:
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    match = _ANSWER.fullmatch(str(value))
    if match is None or isinstance(value, (bool, float)):
        raise RecordError("BAD_PREFERENCE", f'"answer" is {value!r:.60}, wanted 1 or 2, the better response\'s number')
    return Verdict(int(match[1]))
