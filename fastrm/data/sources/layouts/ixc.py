"""IXC-2.5-Reward's training rows: two whole conversations, ``conversations_a`` (chosen) and ``conversations_b``.

`image` is the path of an image or of a video, or a list of them. Each ``<ImageHere>`` in a prompt is the place of the
next one; where a prompt has none they stand in front of its first user turn. So its training/README.md and
training/data/example.json have it (commit 2974394 of InternLM/InternLM-XComposer, read on 2026-11-30).
"""

import os
import re
from collections.abc import Sequence
from dataclasses import replace

from fastrm.data.record import ImageRef, MediaRef, VideoRef
from fastrm.data.sources.conversation import Turn, prompt_messages, read_turns, response_message
from fastrm.data.sources.draft import Draft, answer, pair
from fastrm.data.sources.media import MEDIA_KEYS, Resolve, file_kind, row_media
from fastrm.errors import RecordError

PLACE = "<ImageHere>"
_NAMES = ("conversations_a", "conversations_b")

KEYS = (*_NAMES, "margin", *MEDIA_KEYS)


def matches(row: dict) -> bool:
    return any(name in row for name in _NAMES)


def parse(row: dict, resolve: Resolve) -> Draft:
    """Parse a row in this layout. Raises RecordError for a row that cannot be used."""
    kinds, media = _media(row, resolve)
    responses = []
    for name in _NAMES:
        *turns, last = read_turns(row.get(name), resolve, name)
        prompt = prompt_messages(row, _placed(turns, kinds, name), media)
        responses.append(answer(prompt, response_message(last, name)))
    draft = pair(*responses, row)
    if found := next((name for name, one in zip(_NAMES, responses, strict=True) if PLACE in one.text), None):
        problem = RecordError("IMAGE_COUNT", f'the response of "{found}" holds {PLACE}; images belong in the prompt')
        return replace(draft, preferences=(), problem=problem)
    return draft


def with_places(text: str, kinds: Sequence[type[MediaRef]] = ()) -> str:
    """Return a text with ``<image>`` or ``<video>`` for each ``<ImageHere>``, by the kinds of its media."""
    following = iter(kinds)
    return re.sub(PLACE, lambda _: f"<{next(following, ImageRef).noun}>", text)


def _placed(turns: list[Turn], kinds: Sequence[type[MediaRef]], name: str) -> list[Turn]:
    count = sum(part.count(PLACE) for turn in turns for part in turn.parts if isinstance(part, str))
    if count not in (0, len(kinds)):
        raise RecordError(
            "IMAGE_COUNT",
            f'the prompt of "{name}" has {PLACE} {count} times, and the row {len(kinds)} images and videos; make them '
            "equal, or leave it out to have them in front",
        )
    placed, left = [], list(kinds) if count else []
    for turn in turns:
        parts = []
        for part in turn.parts:
            number = part.count(PLACE) if isinstance(part, str) else 0
            parts.append(with_places(part, left[:number]) if number else part)
            left = left[number:]
        placed.append(turn._replace(parts=tuple(parts)))
    return placed


def _media(row: dict, resolve: Resolve) -> tuple[list[type[MediaRef]], list[MediaRef]]:
    """Return the kinds of a row's media in its order, and the media as `row_media`, with videos among `image`."""
    given = row.get("image")
    values = list(given) if isinstance(given, (list, tuple)) else [given]
    is_video = [file_kind(_path(value)) == "video" for value in values]
    if not any(is_video) or "videos" in row:
        media = row_media(row, resolve)
        return [type(ref) for ref in media], media
    parts = {name: [v for v, video in zip(values, is_video, strict=True) if video is (name == "videos")]
             for name in ("image", "videos")}  # fmt: skip
    return [VideoRef if video else ImageRef for video in is_video], row_media({**row, **parts}, resolve)


def _path(value: object) -> str:
    value = value.get("path") if isinstance(value, dict) else value
    return os.fspath(value) if isinstance(value, (str, os.PathLike)) else ""
