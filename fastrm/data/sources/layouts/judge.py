"""Rows for judges: the prompt holds both responses, and the answer says which is better.

- R1-Reward-RL: `message` is a chat in JSON whose text has the sections ``[Question]``, ``[Response 1]``,
  ``[Response 2]`` and ``**Output Format`` (the authors' published template); `answer` is
  ``["<answer>2</answer>"]``; `image` is the image in base64 or its path.
- LLaVA-Critic, pairwise: `conversations` of a judge's question with ``Question: [...]`` and the two responses
  in brackets, and its answer with ``The better response: [first]``, or that they are equally good.

With `paradigm: judge` such a row is trained on as it stands: its own prompt, and its own answer as the judge's text.

A judge's prompt is text, in which a response could look like a section. So each section must stand exactly
once, in order; every other row is refused.
"""

import re
from collections.abc import Callable
from dataclasses import replace

from fastrm.data.record import ImageRef, MediaRef, Preference
from fastrm.data.sources.conversation import Turn, prompt_messages, read_turns, text_turn
from fastrm.data.sources.draft import Draft, answer, judged
from fastrm.data.sources.media import MAX_PATH_CHARS, Resolve, decode_base64, image_refs
from fastrm.data.sources.values import bad_row, check_list, check_text, decode_json
from fastrm.errors import RecordError

_SECTIONS = (r"^#+ \[Question\]:", r"^#+ \[Response 1\]:", r"^#+ \[Response 2\]:", r"^#+ \*\*Output Format")
_BRACKETS = (
    r"^Question: \[",
    r"^(?:The first response|Response 1|Response A): \[",
    r"^(?:The second response|Response 2|Response B): \[",
    r"\][ \t]*(?:\n\s*ASSISTANT:)?\s*\Z",
)
_ANSWER = re.compile(r"\s*<answer>\s*([12])\s*</answer>\s*")
_VERDICT = re.compile(r"The better response: \[(\w+)\]")
_FIRST, _SECOND = ("first", "1", "a"), ("second", "2", "b")

KEYS = ("message", "answer", "question", "conversations", "image")


def matches(row: dict) -> bool:
    has_pair = any(key in row for key in ("prompt", "chosen", "rejected", "responses"))
    return ("message" in row and "answer" in row) or (isinstance(row.get("conversations"), list) and not has_pair)


def parse(row: dict, resolve: Resolve) -> Draft:
    """Parse a row in this layout. Raises RecordError for a row that cannot be used."""
    return _parse_r1_reward(row, resolve) if "message" in row else _parse_llava_critic(row, resolve)


def _parse_r1_reward(row: dict, resolve: Resolve) -> Draft:
    turns, places, images = _message(row, resolve)
    text = "".join(part for turn in turns for part in turn.parts if isinstance(part, str))
    question, first, second = (part.strip() for part in _parts(text, _SECTIONS, "message"))
    if "question" in row and check_text(row["question"], "question").strip() != question:
        raise RecordError("BAD_JUDGE_TEXT", '"question" is not the [Question] of "message"; correct the row')
    draft = _draft(row, question, (first, second), images, lambda: _answered(row.get("answer")))
    return replace(draft, judgement=lambda: answer(prompt_messages(row, turns, places), row["answer"][0].strip()))


def _answered(value: object) -> Preference:
    answers = check_list(value, "answer", 'a list such as ["<answer>2</answer>"]')
    match = _ANSWER.fullmatch(answers[0]) if len(answers) == 1 and isinstance(answers[0], str) else None
    if match is None:
        raise RecordError("BAD_PREFERENCE", '"answer" is not one <answer>1</answer> or <answer>2</answer>; correct it')
    return Preference(0, 1) if match[1] == "1" else Preference(1, 0)


def _message(row: dict, resolve: Resolve) -> tuple[list[Turn], list[MediaRef], list[MediaRef]]:
    """Return the turns of the chat, the images for places in them, and all images.

    Those of the column `image` replace those of the chat.
    """
    written = check_text(row.get("message"), "message")
    try:
        chat = decode_json(written)
    except (ValueError, RecursionError) as error:
        raise RecordError("BAD_JSON", f'"message" is not JSON: {error}; correct it') from error
    image = row.get("image")
    if isinstance(image, str) and len(image) > MAX_PATH_CHARS and not image.startswith("data:"):
        image = decode_base64(image, "image")
    # Paths inside the message are those of the authors' machine; beside embedded images they are not opened.
    ignore = image is not None and image != ""
    turns = read_turns(chat, _no_file if ignore else resolve, "message")
    if not ignore:
        return turns, [], [part for turn in turns for part in turn.parts if isinstance(part, MediaRef)]
    images = image_refs(image, resolve, "image")
    emptied = [
        turn._replace(parts=tuple(type(part) if isinstance(part, MediaRef) else part for part in turn.parts))
        for turn in turns
    ]
    return emptied, images, images


def _no_file(path: str, kind: type[MediaRef] = ImageRef) -> MediaRef:
    return kind(path=path)


def _parse_llava_critic(row: dict, resolve: Resolve) -> Draft:
    turns = read_turns(row.get("conversations"), resolve, "conversations")
    if [turn.role for turn in turns] != ["user", "assistant"]:
        raise bad_row("conversations", row["conversations"], "a judge's question and its answer")
    asked, said = ("".join(part for part in turn.parts if isinstance(part, str)) for turn in turns)
    question, first, second = _parts(asked, _BRACKETS, "conversations")
    if not (question.rstrip().endswith("]") and first.rstrip().endswith("]")):
        raise RecordError("BAD_JUDGE_TEXT", '"conversations" has a bracket that is not closed; remove the row')
    question, first = (part.rstrip().removesuffix("]") for part in (question, first))
    images = image_refs(row.get("image"), resolve, "image")
    draft = _draft(row, question, (first, second), images, lambda: _verdict(said))
    return replace(draft, judgement=lambda: answer(prompt_messages(row, turns[:1], images), said))


def _verdict(said: str) -> Preference:
    named = {name.lower() for name in _VERDICT.findall(said)}
    if len(named) == 1 and named <= {*_FIRST, *_SECOND}:
        return Preference(0, 1) if named <= {*_FIRST} else Preference(1, 0)
    if not named and "equally good" in said:
        return Preference(0, 1, tie=True)
    raise RecordError("BAD_PREFERENCE", '"conversations" has no single verdict "The better response: [first]"')


def _parts(text: str, marks: tuple[str, ...], name: str) -> list[str]:
    """Split a text at four marks, each of which must stand exactly once, in order."""
    found = [list(re.finditer(mark, text, re.MULTILINE)) for mark in marks]
    if any(len(matches) != 1 for matches in found):
        counts = ", ".join(str(len(matches)) for matches in found)
        raise RecordError(
            "BAD_JUDGE_TEXT",
            f'"{name}" has the question, the two responses and the end marked {counts} times, wanted once each: '
            "the responses cannot be told apart; remove the row. A finished conversation that is to be scored belongs "
            'under "messages"',
        )
    spans = [matches[0].span() for matches in found]
    if spans != sorted(spans):
        raise RecordError("BAD_JUDGE_TEXT", f'"{name}" has its sections in another order; remove the row')
    return [text[spans[i][1] : spans[i + 1][0]] for i in range(3)]


def _draft(
    row: dict, question: str, texts: tuple[str, str], images: list[MediaRef], vote: Callable[[], Preference]
) -> Draft:
    prompt = prompt_messages(row, [text_turn("user", question, "question")], images)
    names = ("the first response", "the second response")
    responses = [answer(prompt, text) for text in texts]
    return judged(responses, lambda: (vote(),), names)
