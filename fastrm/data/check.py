"""The work of `fastrm data check`: read the rows of data files as training would, and say what they are read as.

Every row is read as training reads it, with the bytes of its images, by the same code, and tokenised where a model is
named; nothing is written.
"""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from fastrm.data.group import check_distinct, encode_group
from fastrm.data.paradigm import TextReading
from fastrm.data.prepared.content import prompt_hash, record_hash, response_hash, with_digests
from fastrm.data.prepared.findings import PAIR, PairFindings, find_in_pairs, pair_rows
from fastrm.data.prepared.units import ReadSettings, Unit, list_units
from fastrm.data.prepared.workers import run_pieces
from fastrm.data.record import MediaRef, Record
from fastrm.data.sources import KeyTally, RefusedRow
from fastrm.data.template import ConversationEncoder
from fastrm.data_config import SourceConfig
from fastrm.errors import RecordError
from fastrm.limits import MediaLimits

_MAX_EXAMPLES = 2  # the most refused rows that are named for one reason
_RECORD = np.dtype([("content", "<u8"), ("prompt", "<u8"), ("row", "<u4"), ("file", "<u4")])


@dataclass
class Refusals:
    """Rows refused for one reason, with (origin, message) of the first of them."""

    number: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)

    def add(self, number: int, examples: Iterable[tuple[str, str]]) -> None:
        """Count more rows, the first of which have these examples."""
        self.number += number
        self.examples = [*self.examples, *examples][:_MAX_EXAMPLES]


@dataclass
class SourceCheck:
    """The findings in the rows of one source, or of a part of it.

    Attributes:
        files: the paths of its files, in order.
        keys: of each file.
        refused, left_out: by code; rows, and parts of rows that live on without them.
        media: uses of every image and video by its digest, and what it is called.
        num_ties: preferences that prefer neither.
        without: by what they have not, the texts of critics and judges that teach no writing.
        first: the first record.
    """

    files: list[str] = field(default_factory=list)
    keys: dict[str, KeyTally] = field(default_factory=dict)
    refused: dict[str, Refusals] = field(default_factory=dict)
    left_out: dict[str, Refusals] = field(default_factory=dict)
    media: dict[str, tuple[int, str]] = field(default_factory=dict)
    num_ties: int = 0
    without: Counter[str] = field(default_factory=Counter)
    first: Record | None = None
    records: np.ndarray = field(default_factory=lambda: np.empty(0, _RECORD))
    pairs: np.ndarray = field(default_factory=lambda: np.empty(0, PAIR))

    @property
    def num_refused(self) -> int:
        return sum(refused.number for refused in self.refused.values())

    @property
    def num_usable(self) -> int:
        """The number of rows with a record; of a judge's long list there are several."""
        return len(np.unique(self.records["file"].astype(np.uint64) << np.uint64(32) | self.records["row"]))

    @property
    def num_rows(self) -> int:
        """The number of rows with a record or a refusal; rows joined into one record count once."""
        return self.num_usable + self.num_refused

    @property
    def layouts(self) -> Counter[str]:
        """The number of rows by the name of their layout; a row that no layout takes is in none."""
        return self.all_keys.layouts

    @property
    def all_keys(self) -> KeyTally:
        """The keys of all files together."""
        joined = KeyTally()
        for tally in self.keys.values():
            joined.merge(tally)
        return joined

    @property
    def num_prompts(self) -> int:
        """The number of different prompts, images included: the groups that training would make."""
        return len(np.unique(self.records["prompt"]))

    def copies(self, most: int) -> tuple[int, list[tuple[str, str]]]:
        """Return how many records repeat an earlier one, and the places of the first `most` such pairs."""
        _, first, which = np.unique(self.records["content"], return_index=True, return_inverse=True)
        again = np.flatnonzero(first[which] != np.arange(len(self.records)))
        shown = again[:most].tolist()
        return len(again), [(self._place(number), self._place(int(first[which[number]]))) for number in shown]

    @property
    def preferences(self) -> PairFindings:
        """The contradictions and lengths of the preferences."""
        return find_in_pairs(self.pairs)

    def place(self, file: int, row: int) -> str:
        """Return the name of a row in messages: its number, or its origin if there are several files."""
        return f"row {row}" if len(self.files) == 1 else f"{self.files[file]}:{row}"

    def _place(self, number: int) -> str:
        return self.place(int(self.records["file"][number]), int(self.records["row"][number]))

    def add_refusal(self, refusal: RefusedRow) -> None:
        """Count a refused row, or a part of one."""
        found = self.left_out if refusal.partial else self.refused
        found.setdefault(refusal.code, Refusals()).add(1, [(refusal.origin, refusal.message)])

    def merge(self, other: "SourceCheck") -> None:
        """Add the findings in later rows of the same source."""
        for path, tally in other.keys.items():
            self.keys.setdefault(path, KeyTally()).merge(tally)
        for mine, others in ((self.refused, other.refused), (self.left_out, other.left_out)):
            for code, refused in others.items():
                mine.setdefault(code, Refusals()).add(refused.number, refused.examples)
        for digest, (uses, name) in other.media.items():
            known_uses, known_name = self.media.get(digest, (0, name))
            self.media[digest] = (known_uses + uses, known_name)
        self.num_ties += other.num_ties
        self.without += other.without
        self.first = self.first or other.first
        self.records = np.concatenate([self.records, other.records])
        self.pairs = np.concatenate([self.pairs, other.pairs])


@dataclass(frozen=True)
class _RowChecker:
    """A checker of units of rows; `checker(unit)` returns their number and the findings in them."""

    files: list[str]
    limits: MediaLimits
    require_preferences: bool
    encoder: ConversationEncoder | None
    reading: TextReading | None

    def __call__(self, numbered: tuple[int, Unit]) -> tuple[int, SourceCheck]:
        number, unit = numbered
        found, tally, rows = SourceCheck(), KeyTally(), []
        pairs: list[tuple] = []
        file = unit.file.requiring(self.require_preferences)
        for item in file.read(unit.start, unit.stop, tally):
            if isinstance(item, Record):
                try:
                    item = with_digests(item, self.limits)
                    if self.encoder is not None:
                        check_distinct(encode_group(item, self.encoder))
                except RecordError as error:
                    item = RefusedRow(item.source, item.origin, item.id, error.code, error.message)
            if isinstance(item, RefusedRow):
                found.add_refusal(item)
            else:
                rows.append(self._add(found, item, pairs))
        found.keys[file.path] = tally
        found.records, found.pairs = np.array(rows, _RECORD), np.array(pairs, PAIR)
        found.records["file"] = found.pairs["file"] = self.files.index(file.path)
        return number, found

    def _add(self, found: SourceCheck, record: Record, pairs: list[tuple]) -> tuple:
        """Count a record; return its row of `_RECORD`."""
        responses = [response_hash(response) for response in record.responses]
        row = record.original or record
        pairs += pair_rows(row, responses if row is record else [response_hash(one) for one in row.responses])
        found.num_ties += sum(p.tie for p in record.preferences)
        if self.reading is not None and record.original is not None:
            found.without[self.reading.lesson] += self.reading.count_bare(record)
        found.first = found.first or record
        for ref in record.media:
            own = f"that of {record.origin}" if ref.data is not None else nearby(ref)
            uses, name = found.media.get(ref.digest, (0, own))
            found.media[ref.digest] = (uses + 1, name)
        prompt = prompt_hash(row)
        content = record_hash([*responses, prompt], record.preferences)
        return _word(content), _word(prompt), int(record.origin.rpartition(":")[2]), 0


def _word(value: bytes) -> int:
    return int.from_bytes(value[:8], "little")


def check_source(
    source: SourceConfig,
    limits: MediaLimits,
    encoder: ConversationEncoder | None = None,
    *,
    reading: TextReading | None = None,
    require_preferences: bool = True,
    num_workers: int = 1,
    progress=lambda done, total: None,
) -> SourceCheck:
    """Read all rows of a source.

    Args:
        limits: of the bytes of images and videos.
        encoder: of a model, which refuses what it cannot read; None: rows are not tokenised.
        reading: how rows become conversations of a critic or a judge.
        require_preferences: refuse rows that only scoring can use.
        progress: called with rows done and all rows.

    Raises:
        ConfigError, DataError: the source cannot be read at all.
    """
    settings = ReadSettings.within(limits, reading=reading)
    units = list_units("train", [source], settings)
    files = list(dict.fromkeys(unit.file.path for unit in units))
    total, done = sum(unit.stop - unit.start for unit in units), 0
    counter = None if encoder is None else encoder.counting_only()
    checker, found = _RowChecker(files, limits, require_preferences, counter, reading), {}
    for number, part in run_pieces(checker, list(enumerate(units)), num_workers):
        found[number] = part
        done += units[number].stop - units[number].start
        progress(done, total)
    joined = SourceCheck(files=files)
    for number in sorted(found):
        joined.merge(found[number])
    return joined


def nearby(ref: MediaRef) -> str:
    """Return the name of a medium, relative to the working directory where that is shorter."""
    if ref.data is not None:
        return f"of {len(ref.data):,} bytes"
    return min(str(ref), os.path.relpath(str(ref)), key=len)
