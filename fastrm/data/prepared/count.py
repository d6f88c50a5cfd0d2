"""The third pass: the tokens and media of each group, or the reason why it cannot be trained on.

A merged group that is too long, or of which a part is bad, is split into halves, so that one record does not exclude
the others.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastrm.config import Config
from fastrm.data.group import (
    GroupSize,
    check_distinct,
    check_length,
    encode_group,
    join_records,
    resolve_preferences,
)
from fastrm.data.packing import EncodedGroup
from fastrm.data.prepared.content import HASH, two_words
from fastrm.data.prepared.records import parse_refusals, refusal_line
from fastrm.data.prepared.select import Selection
from fastrm.data.prepared.units import RecordTable
from fastrm.data.record import Record
from fastrm.data.sources import RefusedRow
from fastrm.data.template import ConversationEncoder
from fastrm.data.tree import causal_pairs
from fastrm.errors import RecordError
from fastrm.storage import write_whole

# A piece is work of a few seconds: a kill loses it, and one worker takes it at a time.
GROUPS_PER_PIECE = 2048

# Every column is int64 whatever its values need: sums over an epoch, and products of two columns, are made of
# them, and NumPy keeps a column's width in both without a word.
COUNT = np.dtype(
    [
        ("selected", "<i8"),  # number, among the selected, of this group or the one that it was split from
        ("num_tokens", "<i8"),  # at most data.max_tokens_per_group
        ("num_preferences", "<i8"),
        ("num_attention_pairs", "<i8"),  # at most n (n + 1) / 2 of n tokens of all responses
        ("num_lead_tokens", "<i8"),
        ("num_unshared_tokens", "<i8"),  # of the conversations of every preference, each by itself
        ("num_unshared_pairs", "<i8"),  # query-key pairs of these conversations
        ("num_ties_ignored", "<i8"),
        ("num_responses", "<i8"),
        ("num_members", "<i8"),
        ("num_images", "<i8"),
    ]
)
# Merged patches; an image of 65,536 patches of 28 pixels in a row would be of 1.8 million pixels.
IMAGE = np.dtype([("digest", HASH), ("height", "<u2"), ("width", "<u2"), ("frames", "<u2")])


class Counted(NamedTuple):
    """Groups that fit, in order, and the refusals.

    Attributes:
        counts: (G,) `COUNT`.
        images: `IMAGE` of all their media.
        members: record numbers of all their members.
        refused: refusals as JSON Lines, (bytes,) uint8.
        refused_of: number, among the selected, of the group that each refused record was in.
    """

    counts: np.ndarray
    images: np.ndarray
    members: np.ndarray
    refused: np.ndarray
    refused_of: np.ndarray


class Piece(NamedTuple):
    """The numbers of selected groups for one piece of work, whose result is written to `path`."""

    numbers: np.ndarray
    path: Path


@dataclass(frozen=True)
class GroupCounter:
    """A counter of pieces of a selection; `counter(piece)` returns its number of groups when its file is written."""

    table: RecordTable
    selection: Selection
    encoder: ConversationEncoder
    config: Config

    def __call__(self, piece: Piece) -> int:
        counted = self.count(piece.numbers)
        file = io.BytesIO()
        np.savez(file, **counted._asdict())
        write_whole(piece.path, file.getvalue())
        return len(piece.numbers)

    def count(self, numbers: Sequence[int]) -> Counted:
        """Count selected groups."""
        rows, images, members, refused, refused_of = [], [], [], [], []
        for number in numbers:
            own = self.selection.members[self.selection.starts[number] : self.selection.starts[number + 1]]
            parts = [self.table.record(int(record)) for record in own]
            for fit in _fit(parts, self.encoder, self.config, refused):
                rows.append(_row(number, fit))
                images += [
                    (two_words(bytes.fromhex(key.removeprefix("bytes:"))), height, width, frames)
                    for key, height, width, frames in fit.counted.media
                ]
                members.append(own[fit.place : fit.place + fit.num_members])
            refused_of += [number] * (len(refused) - len(refused_of))
        lines = b"".join(map(refusal_line, refused))
        return Counted(
            np.array(rows, dtype=COUNT),
            np.array(images, dtype=IMAGE),
            np.concatenate([*members, np.empty(0, dtype=np.int64)]).astype("<u4"),
            np.frombuffer(lines, dtype=np.uint8),
            np.array(refused_of, dtype="<u4"),
        )


def load_counted(pieces: Sequence[Piece]) -> Counted:
    """Load the counts of all pieces, in order."""
    contents = []
    for piece in pieces:
        with np.load(piece.path) as arrays:
            contents.append(Counted(*(arrays[name] for name in Counted._fields)))
    return Counted(*(np.concatenate(arrays) for arrays in zip(*contents, strict=True)))


def refusals(counted: Counted) -> Iterator[RefusedRow]:
    """Yield the refusals of counting in order, one at a time, as there may be millions."""
    return parse_refusals(io.BytesIO(counted.refused.data))


class _Fit(NamedTuple):
    """A group of `num_members` records from `place` on, out of those that were to be one group."""

    place: int
    num_members: int
    group: EncodedGroup
    counted: GroupSize
    num_ties_ignored: int


def _row(number: int, fit: _Fit) -> tuple:
    group, counted = fit.group, fit.counted
    pairs = [causal_pairs(len(response.tokens)) for response in group.responses]
    return (
        number,
        counted.num_tokens,
        counted.num_preferences,
        counted.num_attention_pairs,
        counted.num_lead_tokens,
        group.num_unshared_tokens,
        sum(pairs[number] for p in group.preferences for number in p.responses),
        fit.num_ties_ignored,
        len(group.responses),
        fit.num_members,
        len(counted.media),
    )


def _fit(
    parts: list[Record], encoder: ConversationEncoder, config: Config, refused: list[RefusedRow], place: int = 0
) -> list[_Fit]:
    """Make one group of the records, or several."""
    try:
        record, num_ignored = resolve_preferences(join_records(parts), config)
        group = encode_group(record, encoder)
        counted = GroupSize.of(group, config.data.share_prefixes)
        check_length(counted.num_tokens, config)
        check_distinct(group)
        if not record.preferences:
            raise RecordError("ONLY_TIES", "every preference is a tie; set loss.ties: half to train on ties")
        return [_Fit(place, len(parts), group, counted, num_ignored)]
    except RecordError as error:
        if len(parts) == 1 or error.code == "ONLY_TIES":
            refused += [RefusedRow(part.source, part.origin, part.id, error.code, error.message) for part in parts]
            return []
    middle = len(parts) // 2
    first = _fit(parts[:middle], encoder, config, refused, place)
    return first + _fit(parts[middle:], encoder, config, refused, place + middle)
