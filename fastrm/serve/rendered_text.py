"""Messages recovered from text that a trainer rendered with the model's own chat template.

OpenRLHF, verl and others send a conversation as one text. The marks between its turns are found by rendering known
words: what stands between two of them opens a turn of that role after a turn of this one. The text is cut at those
marks, and the messages are rendered again: only if that gives the same text are they used. A text that cannot be
proved like this is refused, with the place where it differs; nothing is guessed.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from fastrm.data.record import ImageRef, Message, Response
from fastrm.data.sources.conversation import escaped
from fastrm.data.sources.layouts.groups import group_record
from fastrm.data.template import ConversationEncoder
from fastrm.errors import RecordError

_PROBES = (
    ("user", "assistant"), ("user", "assistant", "user", "assistant"),
    ("system", "user", "assistant"), ("system", "user", "assistant", "user", "assistant"),
)  # fmt: skip
_START = ""  # in place of the role before the first turn
_SHOWN = 24  # characters of a text on each side of a difference in messages


class Conversation(NamedTuple):
    """A conversation recovered from rendered text.

    Attributes:
        group: its prompt and one response, as `RewardModel.score` takes them.
        finished: the text held the end of the response's turn; False: the response was cut.
    """

    group: dict
    finished: bool


class _Turn(NamedTuple):
    role: str
    start: int
    text: str


class RenderedTextReader:
    """A reader of conversations that were rendered with one model's chat template.

    Args:
        encoder: of that model.
    """

    def __init__(self, encoder: ConversationEncoder):
        self._encoder = encoder
        self._tokenizer = _own_tokenizer(encoder.tokenizer)
        self._joins: dict[str, dict[str, str]] = {}  # role -> text between its turn and the next -> the next role
        self._closing = ""
        for roles in _PROBES:
            self._note_joins(roles)
        self._image = self._image_markup()
        self._openings = {role: _any_of(joins) for role, joins in self._joins.items()}
        written = [*(join for joins in self._joins.values() for join in joins), self._closing, self._image]
        self._marks = _any_of({mark for text in written for mark in self._special_in(text)})
        self._ends = tuple(sorted(filter(None, encoder.closing), key=len, reverse=True))

    def read(self, text: str, images: Sequence = (), name: str = "text") -> Conversation:
        """Recover the messages of a rendered conversation that ends with the assistant's turn.

        Args:
            text: images as single placeholders, or as runs of one for each token.
            images: of the conversation, in order, as `RewardModel.score` takes them.
            name: of the text, in messages.

        Raises:
            RecordError: RENDERED_TEXT if rendering the messages again does not give the text, IMAGE_COUNT if it has
                other than `len(images)` placeholders.
        """
        if not self._joins:
            raise RecordError(
                "RENDERED_TEXT",
                f"{name}: the model's chat template parts turns by plain text, so that a rendered conversation could "
                "be cut in several ways; send messages",
            )
        text = self._normalised(text)
        *turns, last = self._turns(text, name)
        said, finished = self.response_text(last.text)
        self._check_no_marks(name, text, last._replace(text=said))
        if last.role != "assistant":
            raise _refusal(name, f"ends with a turn of the {last.role}, wanted the assistant's", text, len(text))
        self._check_images(name, turns, len(images))
        head, stand_ins = text[: last.start], [b"image"] * len(images)
        rendered = self._render(turns, stand_ins, said, name)
        if not _same(rendered, head, said, self._closing):
            wanted = head + said + self._closing
            at = _num_equal(wanted, rendered)
            raise _differs(name, wanted, at, rendered[at : at + _SHOWN])
        return Conversation(self._group(turns, list(images), said), finished)

    def read_tokens(self, tokens: list[int], images: Sequence = (), name: str = "tokens") -> Conversation:
        """Recover the messages of a tokenised conversation, as `read`.

        Raises:
            RecordError: as `read`; RENDERED_TEXT if they are not the tokens of a text.
        """
        if not all(0 <= token < self._tokenizer.get_vocab_size() for token in tokens):
            raise RecordError("RENDERED_TEXT", f"{name}: holds a number that is no token of the model")
        text = self._tokenizer.decode(tokens, skip_special_tokens=False)
        if self._tokenizer.encode(text, add_special_tokens=False).ids != tokens:
            raise RecordError(
                "RENDERED_TEXT", f"{name}: are not the tokens that the model's tokenizer makes of their text; send text"
            )
        return self.read(text, images, name)

    def response_text(self, text: str) -> tuple[str, bool]:
        """Return a response without the tokens that end its turn, and whether it had them."""
        if self._closing and text.endswith(self._closing):
            return text.removesuffix(self._closing), True
        # From the end, so that a text of many such tokens takes no longer than another.
        end = len(text)
        while size := next((len(token) for token in self._ends if text.endswith(token, 0, end)), 0):
            end -= size
        if self._closing.startswith(self._ends):
            if text.endswith(self._closing, 0, end):
                end -= len(self._closing)
            begun = (n for n in range(len(self._closing), 0, -1) if text.endswith(self._closing[:n]))
            starts = (len(text) - n for n in begun if self._closing[:n].startswith(self._ends))
            end = min(end, next(starts, end))
        return text[:end], end < len(text)

    def _note_joins(self, roles: tuple[str, ...]) -> None:
        """Note what stands between turns of these roles, unless the template lacks one or has no token there."""
        words = [f"zq{number}qz" for number in range(len(roles))]
        messages = (Message(role, (word,)) for role, word in zip(roles, words, strict=True))
        *joins, closing = self._around(words, Response(tuple(messages))) or [""]
        if not joins or not all(map(self._special_in, joins)):
            return
        self._closing = closing
        for (before, after), join in zip(pairwise((_START, *roles)), joins, strict=True):
            # A join that stands for two roles gives the same text for both.
            self._joins.setdefault(before, {}).setdefault(join, after)

    def _around(self, words: list[str], response: Response) -> list[str]:
        try:
            text = self._encoder.rendered_text(response)
        except RecordError:
            return []
        pieces = []
        for word in words:
            before, found, text = text.partition(word)
            if not found:
                return []
            pieces.append(before)
        return [*pieces, text]

    def _image_markup(self) -> str:
        """Return what the template writes for an image between two texts; empty for a model that reads none."""
        if self._encoder.vision is None:
            return ""
        question = Message("user", ("zq0qz", ImageRef(data=b"image"), "zq1qz"))
        pieces = self._around(["zq0qz", "zq1qz"], Response((question, Message("assistant", ("zq2qz",)))))
        return pieces[1] if pieces else ""

    def _special_in(self, text: str) -> list[str]:
        return [token for token in self._encoder.special_ids if token in text]

    def _normalised(self, text: str) -> str:
        """Return the text with one placeholder for each image, and with the token that begins texts."""
        vision, tokenizer = self._encoder.vision, self._encoder.tokenizer
        if vision is not None:
            names = {number: token for token, number in self._encoder.special_ids.items()}
            one = names[vision.placeholders[ImageRef]]
            opening, closing = ("".join(names[n] for n in ids) for ids in (vision.opening, vision.closing))
            text = re.sub(f"{re.escape(opening)}(?:{re.escape(one)})+{re.escape(closing)}", lambda _: one, text)
        begin = tokenizer.bos_token
        if begin and all(join.startswith(begin) for join in self._joins[_START]) and not text.startswith(begin):
            text = begin + text
        return text

    def _turns(self, text: str, name: str) -> list[_Turn]:
        """Cut a text at the marks between turns."""
        match = self._openings[_START].match(text)
        if match is None:
            nearest = max(self._joins[_START], key=lambda join: _num_equal(join, text))
            at = _num_equal(nearest, text)
            raise _differs(name, text, at, nearest[at : at + _SHOWN])
        turns, role = [], _START
        while match is not None:
            role, start = self._joins[role][match.group()], match.end()
            match = self._openings[role].search(text, start) if role in self._openings else None
            turns.append(_Turn(role, start, text[start : match.start() if match else len(text)]))
            if match is not None:
                self._check_no_marks(name, text, turns[-1])
        return turns

    def _check_no_marks(self, name: str, text: str, turn: _Turn) -> None:
        """Refuse a turn that holds a token of the template: whether it was typed or is one cannot be seen."""
        content = turn.text
        if self._image and turn.role != "assistant":
            content = content.replace(self._image, " " * len(self._image))
        if (match := self._marks.search(content)) is not None:
            what = f"holds {match.group()!r} where the chat template would not write it"
            raise _refusal(name, what, text, turn.start + match.start())

    def _check_images(self, name: str, turns: list[_Turn], num_images: int) -> None:
        places = sum(turn.text.count(self._image) for turn in turns) if self._image else 0
        if places != num_images:
            raise RecordError(
                "IMAGE_COUNT",
                f"{name}: has {places} image placeholders, and {num_images} images were sent with it; send one for "
                "each, since the text alone would be another prompt",
            )

    def _render(self, turns: list[_Turn], images: list, said: str, name: str) -> str:
        try:
            record = group_record(self._group(turns, images, said), 0)
            return self._encoder.rendered_text(record.responses[0])
        except RecordError as error:
            raise RecordError("RENDERED_TEXT", f"{name}: cannot be rendered again: {error.message}") from None

    def _group(self, turns: list[_Turn], images: list, said: str) -> dict:
        waiting = iter(images)
        return group_of([{"role": turn.role, "content": self._content(turn.text, waiting)} for turn in turns], [said])

    def _content(self, text: str, images) -> str | list[dict]:
        first, *others = text.split(self._image) if self._image else [text]
        if not others:
            return text
        parts = [{"type": "text", "text": first}]
        for other in others:
            parts += [{"type": "image", "image": next(images)}, {"type": "text", "text": other}]
        return [part for part in parts if part.get("text") != ""]


def group_of(messages: list[dict], responses: list[str | dict]) -> dict:
    """Return a group in whose texts the placeholders of data sets, such as ``<image>``, are text."""
    has_media = any(isinstance(m.get("content"), list) and any(_is_medium(p) for p in m["content"]) for m in messages)
    # Beside media parts, the placeholders of a prompt are text already.
    return {"messages": messages if has_media else escaped(messages), "responses": escaped(responses)}


def _is_medium(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") != "text"


def _own_tokenizer(tokenizer):
    """Return a copy whose settings no call changes, so that threads may share it."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    return backend


def _any_of(texts) -> re.Pattern:
    """Return a pattern of any of the texts that are not empty, the longest first; of none, one that never matches."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True) if text) or "(?!)")


def _same(rendered: str, head: str, said: str, closing: str) -> bool:
    """Return whether a rendering is the head, the response and its end.

    White space around the response may be missing from it: then the template trims, as `RewardModel.score` does by it.
    """
    if not (rendered.startswith(head) and rendered.endswith(closing)):
        return False
    return rendered[len(head) : len(rendered) - len(closing)].strip() == said.strip()


def _num_equal(first: str, second: str) -> int:
    """Return the number of characters that two texts begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))


def _differs(name: str, text: str, at: int, wanted: str) -> RecordError:
    return _refusal(name, f"differs from the model's chat template, which writes {wanted!r}", text, at)


def _refusal(name: str, what: str, text: str, at: int) -> RecordError:
    shown = text[max(0, at - _SHOWN) : at + _SHOWN]
    return RecordError(
        "RENDERED_TEXT",
        f"{name}: {what}, at character {at:,}, near {shown!r}; render it with this model's chat template, or send "
        "messages",
    )
