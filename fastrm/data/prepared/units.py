"""The first pass: units of the sources' rows, which are folders of checked records with their hashes.

    units/<name>/records.jsonl    `encode_record` of every record, one a line
                 columns.npy      `RECORD` of every record
                 media.npy        `MEDIUM` of every record's distinct media
                 texts.npy        `TEXT` of every response; empty unless wanted
                 media.bin        bytes of media that were embedded in rows
                 refused.jsonl    rows that cannot be used

A unit is a range of rows of one file. Its folder appears when it is complete, under a name that says what it
was read from: a unit that is there need not be read again, whatever became of the process that wrote it.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from fastrm.data.paradigm import TextReading
from fastrm.data.prepared.content import (
    HASH,
    first_word,
    is_short,
    name_hash,
    ordered_hash,
    perceptual_hash,
    prompt_hash,
    question_hash,
    record_hash,
    response_hash,
    text_hash,
    two_words,
    with_digests,
)
from fastrm.data.prepared.findings import PAIR, pair_rows
from fastrm.data.prepared.records import (
    MEDIA_BYTES,
    RECORDS,
    decode_record,
    encode_record,
    read_record,
    refusal_line,
)
from fastrm.data.record import ImageRef, Record
from fastrm.data.sources import DigitsFile, KeyTally, RefusedRow, SourceFile, source_files
from fastrm.data.sources.files import stored_in
from fastrm.data_config import SourceConfig
from fastrm.errors import DataError, RecordError, StorageError
from fastrm.json_files import to_json
from fastrm.limits import MediaLimits
from fastrm.storage import whole_folder

FORMAT = 6  # format of a unit's files, and of the rules by which rows are read; with another all are read again
# A unit is work of a second or two: a kill loses it, and one worker takes it at a time.
ROWS_PER_UNIT = 8192
COLUMNS, MEDIA, TEXTS, REFUSED = "columns.npy", "media.npy", "texts.npy", "refused.jsonl"
KEYS, PAIRS = "keys.json", "pairs.npy"

# Values of one record, as narrow as that allows; code that adds or multiplies counts widens them to int64 first.
RECORD = np.dtype(
    [
        ("offset", "<u8"),  # first byte in records.jsonl
        ("length", "<u4"),  # bytes, below 4 GiB: media are in a file of their own
        ("prompt", HASH),
        ("content", HASH),  # independent of the order of responses
        ("ordered", "<u8"),
        ("question", "<u8"),
        ("source", "<u8"),  # hash of `Record.source`
        ("num_responses", "<u4"),
        ("num_texts", "<u4"),  # responses of the row, whatever conversations are made of them; 0 unless wanted
        ("num_media", "<u4"),
        ("num_preferences", "<u4"),  # without ties
        ("num_ties", "<u4"),
        ("num_bare", "<u4"),  # of the texts of critics and judges, `TextReading.count_bare`
    ]
)
TEXT = np.dtype([("hash", "<u8"), ("is_short", "?")])
MEDIUM = np.dtype([("digest", HASH), ("looks", "<u8"), ("is_comparable", "?")])


@dataclass(frozen=True)
class ReadSettings:
    """The settings that decide how rows are read.

    Attributes:
        texts, looks: compute the hashes that decontamination by texts, and by the looks of images, needs.
        reading: how rows become conversations of a critic or a judge; None: they are taken as they are.
    """

    max_image_bytes: int
    max_image_pixels: int
    max_video_bytes: int
    texts: bool = False
    looks: bool = False
    reading: TextReading | None = None

    @classmethod
    def within(cls, limits: MediaLimits, **settings) -> "ReadSettings":
        """Return the settings of reading with limits, of which that of a video's seconds is kept elsewhere."""
        return cls(limits.max_image_bytes, limits.max_image_pixels, limits.max_video_bytes, **settings)

    @property
    def limits(self) -> MediaLimits:
        return MediaLimits(self.max_image_bytes, self.max_image_pixels, self.max_video_bytes)


@dataclass(frozen=True)
class Unit:
    """A range of rows, `start` to `stop`, of a file of source number `source` of a split; `name` is its folder's."""

    split: str
    source: int
    file: SourceFile | DigitsFile
    start: int
    stop: int
    name: str


def list_units(split: str, sources: Iterable[SourceConfig], settings: ReadSettings) -> list[Unit]:
    """Divide a split's sources into units, in reading order.

    Raises:
        DataError: if a source cannot be read.
    """
    units = []
    for number, source in enumerate(sources):
        for place, file in enumerate(open_source(source, settings.reading)):
            num_rows = file.count_rows()
            # A JSON document is parsed whole, whichever rows are wanted, so that it is one unit.
            size = num_rows if file.path.lower().endswith(".json") else ROWS_PER_UNIT
            for start in range(0, num_rows, max(1, size)):
                stop = min(start + size, num_rows)
                key = [FORMAT, source_key(source), place, file.path, file_status(file.path), start, stop]
                name = hashlib.sha256(to_json([key, asdict(settings)]).encode()).hexdigest()[:24]
                units.append(Unit(split, number, file, start, stop, name))
    return units


def open_source(source: SourceConfig, reading: TextReading | None = None) -> list[SourceFile | DigitsFile]:
    """Return the data files of a source, whose rows are read as a critic or a judge needs them.

    Raises:
        DataError: as `source_files`, or for digits as ratings.
    """
    files = source_files(
        source.path,
        set=source.set,
        format=source.format,
        images=source.images,
        name=source.name,
        pairs=source.pairs,
        columns=source.columns,
        ignore=source.ignore,
    )
    if reading is not None:
        files = [replace(file, reading=reading) for file in files]
    if source.margin is None and source.pairs != "ratings":
        return files
    if isinstance(files[0], DigitsFile):
        raise DataError(f"{source.path}: its preferences have no scores; leave pairs: ratings and margin out")
    return [replace(file, margin=source.margin) for file in files]


def source_key(source: SourceConfig) -> dict:
    """Return the settings of a source that decide which records its files give."""
    keys = {"path", "set", "format", "images", "name", "pairs", "columns", "ignore"}
    return source.model_dump(include=keys if source.margin is None else keys | {"margin"})


def file_status(path: str) -> tuple[int, int] | None:
    """Return (bytes, time of change in ns) of a data file or its archive; None if it is not there."""
    try:
        states = [os.stat(part) for part in stored_in(path)]
    except OSError:
        return None
    return (sum(s.st_size for s in states), max(s.st_mtime_ns for s in states)) if states else None


class UnitReader:
    """A reader of units into a folder; `reader(unit)` returns the unit when its folder is there."""

    def __init__(self, folder: Path, settings: ReadSettings):
        self.folder, self.settings = folder, settings

    def __call__(self, unit: Unit) -> Unit:
        keys = KeyTally()
        done = self.folder / unit.name
        try:
            with whole_folder(done) as partial:
                with _UnitWriter(partial, self.settings) as writer:
                    for item in unit.file.read(unit.start, unit.stop, keys):
                        writer.add(item)
                (partial / KEYS).write_text(to_json(keys.to_json()))
        except OSError as error:
            where = error.filename or done
            raise StorageError(f"{where}: {error.strerror}; free space, or choose another folder") from error
        return unit

    def is_done(self, unit: Unit) -> bool:
        return (self.folder / unit.name).is_dir()


class _UnitWriter:
    """The files of a unit, while its rows are read."""

    def __init__(self, folder: Path, settings: ReadSettings):
        self.folder, self.settings = folder, settings
        self._columns: list[tuple] = []
        self._media: list[tuple] = []
        self._texts: list[tuple] = []
        self._pairs: list[tuple] = []
        self._embedded: dict[str, tuple[int, int]] = {}
        self._offset = self._media_offset = 0

    def __enter__(self) -> "_UnitWriter":
        self._files = ExitStack()
        self._records = self._files.enter_context(open(self.folder / RECORDS, "wb"))
        self._refused = self._files.enter_context(open(self.folder / REFUSED, "wb"))
        self._bytes = self._files.enter_context(open(self.folder / MEDIA_BYTES, "wb"))
        return self

    def __exit__(self, kind, *_) -> None:
        self._files.close()
        if kind is None:
            np.save(self.folder / COLUMNS, np.array(self._columns, dtype=RECORD))
            np.save(self.folder / MEDIA, np.array(self._media, dtype=MEDIUM))
            np.save(self.folder / TEXTS, np.array(self._texts, dtype=TEXT))
            np.save(self.folder / PAIRS, np.array(self._pairs, dtype=PAIR))

    def add(self, item: Record | RefusedRow) -> None:
        if isinstance(item, RefusedRow):
            self._refuse(item)
            return
        try:
            record = with_digests(item, self.settings.limits)
            media = [self._medium(ref) for ref in record.media]
        except RecordError as error:
            self._refuse(RefusedRow(item.source, item.origin, item.id, error.code, error.message))
        else:
            self._write(record, media)

    def _write(self, record: Record, media: list[tuple]) -> None:
        line = encode_record(record, self._embed) + b"\n"
        self._records.write(line)
        responses = [response_hash(response) for response in record.responses]
        row = record.original or record
        num_ties = sum(p.tie for p in record.preferences)
        self._columns.append(
            (
                self._offset,
                len(line),
                two_words(prompt_hash(row)),
                two_words(record_hash(responses, record.preferences)),
                first_word(ordered_hash(responses, record.preferences)),
                first_word(question_hash(row)) if self.settings.texts else 0,
                first_word(name_hash(record.source)),
                len(responses),
                len(row.responses) if self.settings.texts else 0,
                len(media),
                len(record.preferences) - num_ties,
                num_ties,
                0 if self.settings.reading is None else self.settings.reading.count_bare(record),
            )
        )
        self._offset += len(line)
        self._media += media
        own = responses if row is record else [response_hash(response) for response in row.responses]
        self._pairs += pair_rows(row, own)
        if self.settings.texts:
            self._texts += [(first_word(text_hash(one.text)), is_short(one.text)) for one in row.responses]

    def _medium(self, ref) -> tuple:
        looks = None
        if self.settings.looks and isinstance(ref, ImageRef):
            looks = perceptual_hash(ref, self.settings.limits)
        return two_words(bytes.fromhex(ref.digest)), looks or 0, looks is not None

    def _embed(self, data: bytes, digest: str) -> tuple[int, int]:
        if digest not in self._embedded:
            self._bytes.write(data)
            self._embedded[digest] = (self._media_offset, len(data))
            self._media_offset += len(data)
        return self._embedded[digest]

    def _refuse(self, refusal: RefusedRow) -> None:
        self._refused.write(refusal_line(refusal))


def unit_keys(folder: Path) -> KeyTally:
    """Load the tally of the keys of a finished unit's rows."""
    return KeyTally.from_json(json.loads((folder / KEYS).read_text()))


def unit_records(folder: Path) -> Iterator[Record]:
    """Yield all records of a finished unit, in order."""
    with open(folder / RECORDS, "rb") as lines:
        for line in lines:
            yield decode_record(line, os.fspath(folder / MEDIA_BYTES))


@dataclass(frozen=True)
class RecordTable:
    """The columns of a split's N records.

    Attributes:
        units: in reading order.
        columns: (N,) `RECORD`.
        media: `MEDIUM`, num_media for each record.
        texts: `TEXT`, num_texts for each record; empty unless wanted.
        first_text: (N,) int64, place of a record's first response among `texts`.
        unit: (N,) int32, number of its unit.
        source: (N,) int32, number of its source in the configuration.
        repeat: (N,) float32, of its file (`SourceFile.repeat`).
    """

    folder: Path
    units: Sequence[Unit]
    columns: np.ndarray
    media: np.ndarray
    texts: np.ndarray
    first_text: np.ndarray
    unit: np.ndarray
    source: np.ndarray
    repeat: np.ndarray

    def __len__(self) -> int:
        return len(self.columns)

    def is_of(self, split: str) -> np.ndarray:
        """Return (N,) bool: True for records of a split's own sources."""
        return np.array([unit.split == split for unit in self.units], dtype=bool)[self.unit]

    @property
    def is_text_only(self) -> np.ndarray:
        """(N,) bool: True for records without media."""
        return self.columns["num_media"] == 0

    def record(self, number: int) -> Record:
        """Decode one record."""
        row = self.columns[number]
        return read_record(self.folder / self.units[self.unit[number]].name, int(row["offset"]), int(row["length"]))

    def owner_of_media(self) -> np.ndarray:
        """Return the record number (M,) int64 of each medium."""
        return np.repeat(np.arange(len(self)), self.columns["num_media"])


def load_table(folder: Path, units: Sequence[Unit]) -> RecordTable:
    """Load the columns of finished units."""
    parts = [np.load(folder / unit.name / COLUMNS) for unit in units]
    lengths = [len(part) for part in parts]
    columns = _joined(parts)

    def of_units(values: Iterable, dtype: str) -> np.ndarray:
        return np.repeat(np.array(list(values), dtype=dtype), lengths)

    return RecordTable(
        folder=folder,
        units=units,
        columns=columns,
        media=_joined([np.load(folder / unit.name / MEDIA) for unit in units]),
        texts=_joined([np.load(folder / unit.name / TEXTS) for unit in units]),
        first_text=np.cumsum(columns["num_texts"], dtype=np.int64) - columns["num_texts"],
        unit=of_units(range(len(units)), "<i4"),
        source=of_units((unit.source for unit in units), "<i4"),
        repeat=of_units((unit.file.repeat for unit in units), "<f4"),
    )


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    joined = np.concatenate(arrays)
    arrays.clear()  # frees the parts, which are as large as the whole
    return joined
