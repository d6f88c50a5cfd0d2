"""Reading of one data file of a source: any range of its rows as records and refusals."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import NamedTuple

from fastrm.data.paradigm import TextReading
from fastrm.data.quarantine import Quarantine
from fastrm.data.record import Record, VideoRef
from fastrm.data.sources.critiques import CRITIQUE_KEYS, thinking_of, with_critiques
from fastrm.data.sources.draft import Draft, read_draft, to_record
from fastrm.data.sources.files import NumberedRow, count_rows, file_stem, read_rows
from fastrm.data.sources.key_tally import KeyTally
from fastrm.data.sources.keys import check_unread, read_keys, unread_keys, without_nested
from fastrm.data.sources.layouts import ALL_KEYS, JOINING, LAYOUTS, detect
from fastrm.data.sources.media import Resolve
from fastrm.data.sources.values import bad_row, check_text
from fastrm.errors import RecordError

_AUDIO = ("audio", "audios", "rejected_audios")


class RefusedRow(NamedTuple):
    """A row that cannot be used, or (`partial`) the part of one whose record lives on without it."""

    source: str
    origin: str
    record_id: str
    code: str
    message: str
    partial: bool = False

    def add_to(self, quarantine: Quarantine) -> None:
        quarantine.add(**self._asdict())


@dataclass(frozen=True)
class SourceFile:
    """A data file and the settings for all of its rows. It can be pickled, for workers that read parts of it.

    Attributes:
        path: as `read_rows` takes it, and as origins name it.
        resolve: from the paths of media in its rows.
        format: a name of FORMATS but ``digits``.
        name: `Record.source` of every row; None: the row's own `source`, else the file's stem.
        pairs: ``all`` or ``hard``: which pairs of scored responses become preferences; or ``ratings``.
        margin: see `to_record`.
        require_preferences: refuse rows without preferences, which only scoring can use.
        repeat: how often the set's authors use the file in an epoch (MMPR's `repeat_time`).
        columns: (key that fastrm reads, column of the file that holds it), where the two have other names.
        ignore: keys that are metadata of these rows: they are not read, and not mentioned.
        placeholders_are_text: the rows have no media, and ``<image>`` in them is text.
        reading: rows with preferences become conversations of a critic or a judge; None: they stay as they are.
        rows: ``all``; ``with_media`` refuses rows that have lost their image or video, in a set where each has one;
            ``with_images`` also rows with videos, as not part of the set.
    """

    path: str
    resolve: Resolve
    format: str = "auto"
    name: str | None = None
    pairs: str = "all"
    margin: float | None = None
    require_preferences: bool = True
    repeat: float = 1.0
    rows: str = "all"
    columns: tuple[tuple[str, str], ...] = ()
    ignore: tuple[str, ...] = ()
    placeholders_are_text: bool = False
    reading: TextReading | None = None

    def requiring(self, preferences: bool) -> "SourceFile":
        """Return the same file, whose rows are refused without preferences, or not."""
        return replace(self, require_preferences=preferences)

    def count_rows(self) -> int:
        """Return the number of rows of the file, by which `read` numbers them.

        Raises:
            DataError: if the file as a whole cannot be read.
        """
        return count_rows(self.path)

    def raw_rows(self, start: int = 0, stop: int | None = None) -> Iterator[NumberedRow]:
        """Yield the rows as the file has them, as `read_rows`."""
        return read_rows(self.path, start, stop)

    def read(
        self, start: int = 0, stop: int | None = None, keys: KeyTally | None = None
    ) -> Iterator[Record | RefusedRow]:
        """Yield the records that begin in the rows from `start` up to, not including, `stop` (0-based), in order.

        Ranges that cover the file give together what one full read gives. A row becomes a record, a
        refusal, or a record after a partial refusal.

        Args:
            keys: counts the rows' layouts and the keys that are not read.

        Raises:
            DataError: the file as a whole cannot be read.
        """
        for number, row in self._whole_rows(start, stop):
            yield from self._read_row(number, row, keys or KeyTally())

    def _read_row(self, number: int, row: object, keys: KeyTally) -> Iterator[Record | RefusedRow]:
        stem = file_stem(self.path)
        source, origin = self.name or stem, f"{self.path}:{number}"
        record_id = _row_id(row) or f"{stem}:{number}"
        try:
            present = _present(row)
            own_source = None if self.name else present.get("source")
            if own_source and isinstance(own_source, str):
                source = check_text(own_source, "source")
            draft = self._draft(present, keys)
            record = self._record(draft, present, record_id=check_text(record_id, "id"), source=source, origin=origin)
        except RecordError as error:
            yield RefusedRow(source, origin, record_id, error.code, error.message + _null_keys(row, error))
            return
        for error in draft.left_out if self.require_preferences else ():
            yield RefusedRow(source, origin, record_id, error.code, error.message, partial=True)
        yield from [record] if record.original is None else self.reading.parts(record)

    def _record(self, draft: Draft, row: dict, **names: str) -> Record:
        making = {**names, "pairs": self.pairs, "margin": self.margin}
        reading = self.reading if self.require_preferences else None
        if reading is None:
            return to_record(draft, **making, require_preferences=self.require_preferences)
        if reading.kind == "judge" and draft.judgement is not None:
            is_pair = bool(draft.preferences or draft.problem)  # a problem is raised
            record = to_record(draft, **making, require_preferences=is_pair)
            return reading.convert(record, judgement=draft.judgement())
        record = to_record(with_critiques(draft, row), **making, require_preferences=True)
        return reading.convert(record, thinking_of(row, draft) if reading.kind == "judge" else "")

    def _draft(self, row: dict, keys: KeyTally) -> Draft:
        layout = self._layout(row)
        about = () if self.reading is None else CRITIQUE_KEYS
        unread = unread_keys(row, layout.KEYS, (*self.ignore, *about))
        read = dict.fromkeys((*read_keys(row, layout.KEYS), *(key for key in about if key in row)))
        keys.add(layout.__name__.rpartition(".")[2], tuple(read), unread)
        keys.add_scores(row)
        check_unread(row, unread, layout.KEYS)
        draft = read_draft(
            layout.parse,
            without_nested(row, self.ignore),
            self.resolve,
            is_scored=not self.require_preferences,
            placeholders_are_text=self.placeholders_are_text,
        )
        self._check_media(draft)
        return draft

    def _check_media(self, draft: Draft) -> None:
        if self.rows == "all":
            return
        media = [ref for response in draft.responses for ref in response.media]
        if not media:
            raise RecordError(
                "MEDIA_LOST", "the row has lost its image or video: all of this set have one; complete or remove it"
            )
        if self.rows == "with_images" and any(isinstance(ref, VideoRef) for ref in media):
            raise RecordError("VIDEO_ROW", "the row has a video; this set takes the rows with images only")

    def _layout(self, row: dict) -> ModuleType:
        return detect(row) if self.format == "auto" else LAYOUTS[self.format]

    def _rows(self, start: int, stop: int | None = None) -> Iterator[NumberedRow]:
        """Return the rows of the file under the keys that fastrm reads, without those to ignore."""
        rows = self.raw_rows(start, stop)
        return ((number, self._renamed(row)) for number, row in rows) if self.columns or self.ignore else rows

    def _renamed(self, row: object) -> object:
        if not isinstance(row, dict):
            return row
        columns = {key: column for key, column in self.columns if column in row}
        kept = {
            f"{key} (in the file)" if key in columns else key: value  # another column has taken the name of this key
            for key, value in row.items()
            if key not in self.ignore and key not in columns.values()
        }
        return kept | {key: row[column] for key, column in columns.items()}

    def _whole_rows(self, start: int, stop: int | None) -> Iterator[NumberedRow]:
        """Yield the rows that begin in a range.

        Consecutive rows of one record come as one, with the first's number.
        """
        rows = self._rows(start, stop)
        first = next(rows, None)
        if first is not None and start > 0 and self._joins(first[1]):
            # A record that began before the range belongs to another range.
            previous = self._row_before(start)
            while first is not None and self._continues(previous, first[1]):
                previous, first = first[1], next(rows, None)
        if first is None:
            return
        run = [first]
        for number, row in rows:
            if not self._continues(run[-1][1], row):
                yield self._joined(run)
                run = []
            run.append((number, row))
        if stop is not None and self._joins(run[-1][1]):
            for number, row in self._rows(stop):
                if not self._continues(run[-1][1], row):
                    break
                run.append((number, row))
        yield self._joined(run)

    def _row_before(self, start: int) -> object:
        for place in range(start - 1, -1, -1):
            for _, row in self._rows(place, place + 1):
                return row
        return None

    def _joins(self, row: object) -> bool:
        # The cheap test of keys comes first: every row is tested, and almost none joins.
        if not isinstance(row, dict) or not any(layout.matches(row) for layout in JOINING):
            return False
        try:
            return self._layout(_present(row)) in JOINING
        except RecordError:
            return False

    def _continues(self, previous: object, row: object) -> bool:
        if not (self._joins(row) and self._joins(previous)):
            return False
        layout = self._layout(_present(row))
        return layout is self._layout(_present(previous)) and layout.continues(previous, row)

    def _joined(self, run: list[NumberedRow]) -> NumberedRow:
        number, first = run[0]
        if len(run) == 1 and not self._joins(first):
            return number, first
        return number, self._layout(_present(first)).join([row for _, row in run])


def _present(row: object) -> dict:
    """Return the columns that a row has: Parquet fills those that it does not have with nulls.

    Raises:
        RecordError: the row's own, if it could not be read; BAD_ROW; UNSUPPORTED_MEDIA.
    """
    if isinstance(row, RecordError):
        raise row
    if not isinstance(row, dict):
        raise bad_row("row", row, "an object")
    row = {key: value for key, value in row.items() if value is not None}
    for key in _AUDIO:
        if row.get(key):
            raise RecordError("UNSUPPORTED_MEDIA", f'the row has "{key}"; only text, images and videos work')
    return row


def _null_keys(row: object, error: RecordError) -> str:
    """Return text on the null keys of a row, where they may be the reason why something is missing."""
    if not isinstance(row, dict) or error.code not in ("BAD_ROW", "NO_PREFERENCE"):
        return ""
    names = [f'"{key}"' for key, value in row.items() if value is None and key in ALL_KEYS]
    return f"; null in the row: {', '.join(names)}" if names else ""


def _row_id(row: object) -> str | None:
    value = row.get("id") if isinstance(row, dict) else None
    is_id = isinstance(value, (str, int)) and not isinstance(value, bool) and value != ""
    return str(value) if is_id else None
