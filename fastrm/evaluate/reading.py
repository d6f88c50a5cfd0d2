"""The rows of a data file in their order, good and bad ones."""

from collections.abc import Iterator, Mapping, Sequence

from fastrm.data.paradigm import TextReading
from fastrm.data.record import Record
from fastrm.data.sources import KeyTally, read_source
from fastrm.data.sources.in_memory import Rows
from fastrm.errors import RecordError


class _Refused:
    """A stand-in for the quarantine, with which a bad row keeps its place among the good ones."""

    def __init__(self):
        self.rows: list[tuple[str | None, RecordError]] = []

    def add(self, *, source, origin, record_id, code, message, partial=False) -> None:
        if not partial:  # a record that lost a part is yielded itself
            self.rows.append((record_id, RecordError(code, f"{origin}: {message}")))


def read_in_order(
    data: str | Rows,
    images: str | None,
    data_format: str,
    *,
    require_preferences: bool,
    keys: dict[str, KeyTally] | None = None,
    columns: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    reading: TextReading | None = None,
) -> Iterator[Record | tuple[str | None, RecordError]]:
    """Yield records, and (id, RecordError) for rows that are none, in the order of the file.

    Args:
        keys: as `read_source`.
        columns, ignore: as `source_files`.
        reading: as of `SourceFile`.
    """
    refused = _Refused()
    records = read_source(
        data,
        format=data_format,
        images=images,
        quarantine=refused,
        require_preferences=require_preferences,
        keys=keys,
        columns=columns,
        ignore=ignore,
        reading=reading,
    )
    while True:
        record = next(records, None)
        yield from refused.rows
        refused.rows.clear()
        if record is None:
            return
        yield record
