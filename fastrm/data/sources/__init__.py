"""Readers for the layouts that preference data comes in: files in, `Record` out.

A layout is a module with `matches(row)`, which looks at keys and kinds only, and `parse(row, resolve)`,
which returns a `Draft` or raises `RecordError`. Reading goes on after a bad row: each row becomes a
record or one line of the quarantine.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from fastrm.data.quarantine import Quarantine
from fastrm.data.record import Record
from fastrm.data.sources import flat, groups, llamafactory, rated, swift, trl
from fastrm.data.sources.digits import PREFIX as DIGITS_PREFIX
from fastrm.data.sources.digits import digit_records
from fastrm.data.sources.draft import to_record
from fastrm.data.sources.files import data_files, read_rows
from fastrm.data.sources.media import Resolve, in_folder, path_resolver
from fastrm.data.sources.values import bad_row, check_text
from fastrm.errors import DataError, RecordError

# In the order of detection: the first layout that matches a row reads it.
LAYOUTS = {
    "llamafactory": llamafactory,
    "swift": swift,
    "rated": rated,
    "groups": groups,
    "flat": flat,
    "trl": trl,
}
FORMATS = ("auto", *LAYOUTS, "digits")
_OTHER_MEDIA = ("video", "videos", "audio", "audios", "rejected_videos", "rejected_audios")


def read_source(
    path: str | Path,
    *,
    format: str = "auto",
    images: str | Path | None = None,
    name: str | None = None,
    quarantine: Quarantine,
    require_preferences: bool = True,
) -> Iterator[Record]:
    """The records of a data source, in the order of its files and rows.

    Args:
        path: a .jsonl, .json or .parquet file, a folder of them, ``digits:train`` or ``digits:eval``.
        format: a name of FORMATS; ``auto`` decides for each row by its keys.
        images: folder or .tar/.zip archive that image paths are relative to; default the file's folder.
        name: `Record.source` of every row; default the row's own `source`, else the file's stem.
        quarantine: takes the rows that cannot be used.
        require_preferences: refuse groups without preferences, which only scoring can use.

    Raises:
        DataError: the source or the images do not exist or cannot be read at all, or the format is
            unknown. What the call itself can see, it raises; iteration raises the rest.
    """
    path = os.fspath(path)
    if format not in FORMATS:
        wanted = ", ".join(FORMATS)
        raise DataError(f'data source "{path}": format "{format}" is unknown; wanted one of {wanted}')
    if path.startswith(DIGITS_PREFIX) and format in ("auto", "digits"):
        return digit_records(path.removeprefix(DIGITS_PREFIX))
    if format == "digits":
        raise DataError(f'data source "{path}" has format "digits"; wanted digits:train or digits:eval')
    files = data_files(path)
    resolve = in_folder(os.path.dirname(files[0])) if images is None else path_resolver(os.fspath(images))
    return _read_files(files, _RowReader(LAYOUTS.get(format), resolve, name, require_preferences), quarantine)


@dataclass(frozen=True)
class _RowReader:
    """What the rows of one source have in common."""

    layout: ModuleType | None  # None: found for each row
    resolve: Resolve
    name: str | None
    require_preferences: bool

    def read(self, row: object, *, record_id: str, source: str, origin: str) -> Record:
        """The record of one row, or the RecordError of one that cannot be used or read."""
        if isinstance(row, RecordError):
            raise row
        if not isinstance(row, dict):
            raise bad_row("row", row, "an object")
        # Parquet fills the columns that a row does not have with nulls.
        row = {key: value for key, value in row.items() if value is not None}
        for key in _OTHER_MEDIA:
            if row.get(key):
                raise RecordError("UNSUPPORTED_MEDIA", f'the row has "{key}"; only text and images work')
        own_source = None if self.name else row.get("source")
        return to_record(
            (self.layout or _detect(row)).parse(row, self.resolve),
            record_id=check_text(record_id, "id"),
            source=check_text(own_source, "source") if own_source and isinstance(own_source, str) else source,
            origin=origin,
            require_preferences=self.require_preferences,
        )


def _read_files(files: list[str], reader: _RowReader, quarantine: Quarantine) -> Iterator[Record]:
    for file in files:
        stem = Path(file).stem
        source = reader.name or stem
        for number, row in read_rows(file):
            origin = f"{file}:{number}"
            record_id = _row_id(row) or f"{stem}:{number}"
            try:
                record = reader.read(row, record_id=record_id, source=source, origin=origin)
            except RecordError as error:
                quarantine.add(
                    source=source, origin=origin, record_id=record_id, code=error.code, message=error.message
                )
            else:
                yield record


def _detect(row: dict) -> ModuleType:
    for layout in LAYOUTS.values():
        if layout.matches(row):
            return layout
    keys = ", ".join(f'"{key}"' for key in list(row)[:12]) or "none"
    raise RecordError("BAD_ROW", f"no known layout has the keys {keys}; wanted prompt, chosen and rejected, say")


def _row_id(row: object) -> str | None:
    value = row.get("id") if isinstance(row, dict) else None
    is_id = isinstance(value, (str, int)) and not isinstance(value, bool) and value != ""
    return str(value) if is_id else None
