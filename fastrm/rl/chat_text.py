"""Prompts that a trainer hands over as rendered text, read back to messages.

The templates of Qwen, InternVL and SmolLM (ChatML) and of Llama 3 are known by their marks; the reward model's own
template, which may be another, then renders the messages anew. A text with the marks of a template that is not known
is refused: its marks would be scored as words of the user.
"""

import re

from fastrm.errors import DataError, RecordError

# The mark of a turn's start, what parts its role from its text, and the mark of its end.
_TEMPLATES = (("<|im_start|>", "\n", "<|im_end|>"), ("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"))
# The tokens of an image. InternVL's template puts a line end behind them.
_IMAGE = re.compile(
    r"<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>|(?:<\|image_pad\|>)+"
    r"|<img>(?:<IMG_CONTEXT>)+</img>\n?|(?:<IMG_CONTEXT>)+\n?"
)
# The tokens that begin texts.
_BEGIN = re.compile(
    r"\s*(?:<s>|<bos>|\[gMASK\]<sop>|<\|begin_of_text\|>|<\|startoftext\|>|<\uff5cbegin▁of▁sentence\uff5c>)"
)
_ENDS = (
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "</s>", "<eos>",
    "<end_of_turn>", "<\uff5cend▁of▁sentence\uff5c>",
)  # fmt: skip
# What looks like a special token: <|name|> of most models, <｜name｜> of DeepSeek, <|name> and <name|> of Gemma 4.
_TOKEN = re.compile(r"<\|[^\s<>|]{1,40}\|?>|<[^\s<>|]{1,40}\|>|<\uff5c[^\s<>\uff5c]{1,40}\uff5c>")
# The marks of other templates, which a text of a known one may hold as words: Gemma, Mistral, Llama 2, Vicuna.
_OTHER = re.compile(r"<(?:start|end)_of_turn>|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS)\]|<</?SYS>>|</s>")
# What Llama 3.1 and later write before the system's text; their template would write it a second time.
_DATES = re.compile(r"(?:Environment: ipython\n)?Cutting Knowledge Date: [^\n]+\nToday Date: [^\n]+\n\n")
# A begun turn may hold what opens the model's thoughts; other words in it would be missing from the response.
_THOUGHTS = re.compile(r"(?:\s*</?think>)*\s*")


def read_chat(text: str) -> list[dict]:
    """Return the messages of a rendered prompt, without the begun turn of the assistant at its end.

    A text without marks of a template is one turn of the user. A run of image tokens is one image part.

    Raises:
        RecordError: RENDERED_TEXT for marks that are not known, or not where the known templates write them.
    """
    for start, middle, end in _TEMPLATES:
        if start in text:
            head, *turns = text.split(start)
            if _without_begin(head).strip():
                raise _refusal("has words before its first turn", head)
            messages = [_turn(turn, middle, end, turn is turns[-1]) for turn in turns]
            return [message for message in messages if message is not None]
    text = _without_begin(text)
    for marks in (_TOKEN, _OTHER):
        _check_no_marks(text, marks)
    return [_message("user", text)]


def read_response(text: str) -> str:
    """Return a response without the marks that end its turn."""
    text = text.strip()
    while end := next((end for end in _ENDS if text.endswith(end)), None):
        text = text.removesuffix(end).rstrip()
    return text


def split_response(query: str, prompt: str, name: str) -> str:
    """Return what follows a prompt in the decoded tokens of prompt and response.

    These may have a run of tokens for each image of the prompt, and the token that begins texts.

    Args:
        name: of the query, in messages.

    Raises:
        DataError: if the query does not begin with the prompt.
    """
    pieces = _IMAGE.split(_without_begin(prompt))
    pattern = f"(?:{_BEGIN.pattern})?" + f"(?:{_IMAGE.pattern})".join(map(re.escape, pieces))
    match = re.match(pattern, query)
    if match is None:
        raise DataError(
            f"{name} does not begin with its prompt, so that the response in it is not known: got {query[:80]!r}, "
            f"wanted {prompt[:80]!r}; use the agent of docs/rl.md, which reads the response's tokens"
        )
    return query[match.end() :]


def _without_begin(text: str) -> str:
    match = _BEGIN.match(text)
    return text if match is None else text[match.end() :]


def _turn(turn: str, middle: str, end: str, is_last: bool) -> dict | None:
    """Return the message of a turn; None for one without words: the begun one, or a system's of nothing but dates."""
    role, _, said = turn.partition(middle)
    said, is_ended, rest = said.partition(end)
    role = role.strip()
    if rest.strip():
        raise _refusal("has words between two turns", rest)
    if not is_ended:
        if not is_last or role != "assistant":
            raise _refusal(f"has a turn without {end}", turn)
        if not _THOUGHTS.fullmatch(said):
            raise _refusal("begins the response, which would be scored without these words", said)
        return None
    if role == "system" and (dates := _DATES.match(said)):
        said = said[dates.end() :]
        if not said:
            return None
    _check_no_marks(said, _TOKEN)
    return _message(role, said)


def _check_no_marks(text: str, marks: re.Pattern) -> None:
    if found := marks.search(_IMAGE.sub("", text)):
        raise _refusal(f"holds {found.group()!r}, a mark of no chat template that is known here", text)


def _refusal(what: str, near: str) -> RecordError:
    said = f"its prompt is rendered text that {what}, near {near[:80]!r}; give the prompt as messages (docs/rl.md)"
    return RecordError("RENDERED_TEXT", said)


def _message(role: str, said: str) -> dict:
    if not _IMAGE.search(said):
        return {"role": role, "content": said}
    texts = _IMAGE.split(said)
    parts = [part for text in texts for part in ({"type": "text", "text": text}, {"type": "image"})][:-1]
    return {"role": role, "content": [part for part in parts if part.get("text") != ""]}
