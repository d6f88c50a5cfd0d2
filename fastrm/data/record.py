"""The typed record that every reader produces and everything else consumes.

A record is one prompt with N >= 1 responses and the preferences between them. Each response carries
its whole conversation, so that a prompt or images that differ between two responses need no special
case: what they share is found later, from the tokens (`tree.py`).
"""

import hashlib
import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

ROLES = ("system", "user", "assistant", "tool", "developer", "ipython", "function", "environment")


@dataclass(frozen=True)
class MediaRef:
    """The place of an image's or a video's encoded bytes; nothing is opened until they are needed.

    It has exactly one form: a file (`path`), a member of a tar or zip archive (`path` and `member`), a part of a
    file (`path` and `span`: first byte and number of bytes), or encoded bytes (`data`). `digest` is the SHA-256 of the
    encoded bytes in hexadecimal digits, if it was computed. `noun` is the kind's name in messages, with which its codes
    of refusal begin.
    """

    noun: ClassVar[str]
    path: str | None = None
    member: str | None = None
    data: bytes | None = field(default=None, repr=False)
    span: tuple[int, int] | None = None
    digest: str | None = field(default=None, repr=False)

    @cached_property
    def key(self) -> str:
        """The key of the content: equal keys mean equal content, which is decoded once and shares its tokens."""
        if self.digest is not None:
            return "bytes:" + self.digest
        if self.data is not None:
            return "bytes:" + hashlib.sha256(self.data).hexdigest()
        return self._place(os.path.realpath(self.path))

    def __str__(self) -> str:
        return f"<{len(self.data):,} bytes in the record>" if self.data is not None else self._place(self.path)

    def _place(self, path: str) -> str:
        if self.span is not None:
            return f"{path}@{self.span[0]}+{self.span[1]}"
        return f"{path}!{self.member}" if self.member is not None else path


class ImageRef(MediaRef):
    """A JPEG, PNG or WebP image."""

    noun = "image"


class VideoRef(MediaRef):
    """A video file, or a folder of frames: on disk (form `path`), or in an archive (`member`)."""

    noun = "video"


Part = str | MediaRef  # a run of text, an image or a video


@dataclass(frozen=True)
class Message:
    """A turn of a conversation: a role from ROLES and its content in order.

    `fields` is everything else that a chat template may render of it (tool_calls, reasoning_content, name, ...): a JSON
    object in text, in the order in which it was written, since templates keep that order; empty for none.
    """

    role: str
    parts: tuple[Part, ...]
    fields: str = ""

    @property
    def key(self) -> tuple:
        """The key of a turn: equal keys mean equal turns, with equal media."""
        return (self.role, self.fields, *(p.key if isinstance(p, MediaRef) else (p,) for p in self.parts))

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True)
class Response:
    """A response with the conversation that it ends: the last message is the assistant's.

    `arguments` are further arguments of the chat template (tools, documents, ...): JSON in text; empty if none.
    `critique` is a text about it that its row holds, empty if none: what critics and judges learn to write. It is no
    part of the conversation.
    """

    messages: tuple[Message, ...]
    arguments: str = ""
    critique: str = field(default="", compare=False)

    @property
    def key(self) -> tuple:
        """The key of a conversation: equal keys mean that a chat template renders the same, with the same media."""
        return (self.arguments, *(message.key for message in self.messages))

    @property
    def prompt_key(self) -> tuple:
        """The `key` without the last message."""
        return self.key[:-1]

    @property
    def text(self) -> str:
        return self.messages[-1].text

    @property
    def media(self) -> tuple[MediaRef, ...]:
        """The images and videos of the conversation, in the order of their places."""
        return tuple(p for m in self.messages for p in m.parts if isinstance(p, MediaRef))


@dataclass(frozen=True)
class Preference:
    """A preference for `winner` over `loser` (indices into the responses).

    `margin` is subtracted from the reward difference, `weight` multiplies the loss term. A tie says
    that neither is preferred; `loss.ties` decides what happens with it. The rating of a single response
    is its preference over itself, with the rating as margin: what `loss.kind: mse` trains on.
    `again` marks a judge's text that shows a preference once more, in the other order.
    """

    winner: int
    loser: int
    margin: float = 0.0
    weight: float = 1.0
    tie: bool = False
    again: bool = field(default=False, compare=False)

    @property
    def is_rating(self) -> bool:
        return self.winner == self.loser

    @property
    def responses(self) -> tuple[int, ...]:
        """The responses that it is about: two, or the one that is rated."""
        return (self.winner,) if self.is_rating else (self.winner, self.loser)


@dataclass(frozen=True)
class Record:
    """A prompt, its responses, and the preferences between them.

    `origin` is `file:row` for messages and reports; `source` names the set for per-source metrics. `original` is the
    record as its row has it, where this one holds a critic's or a judge's conversations about it (paradigm.py); it is
    not stored.
    """

    id: str
    responses: tuple[Response, ...]
    preferences: tuple[Preference, ...]
    source: str
    origin: str
    original: "Record | None" = field(default=None, compare=False, repr=False)

    @property
    def prompt_key(self) -> tuple:
        """The key of the prompt, its images and template arguments; records of equal keys merge into one group."""
        return self.responses[0].prompt_key

    @property
    def media(self) -> tuple[MediaRef, ...]:
        """The distinct images and videos of all responses, in order of first use."""
        return tuple({ref.key: ref for r in self.responses for ref in r.media}.values())
