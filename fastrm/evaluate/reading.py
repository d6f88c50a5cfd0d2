"""Rows of a data file in their order, the bad ones among the good."""

from collections.abc import Iterator, Mapping, Sequence

from fastrm.data.record import Record
from fastrm.data.sources import KeyTally, read_source
from fastrm.errors import RecordError


class _Refused:
    """Takes the place of the quarantine: a bad row keeps its turn among the good ones."""

    def __init__(self):
        self.rows: list[tuple[str | None, RecordError]] = []

    def add(self, *, source, origin, record_id, code, message, partial=False) -> None:
        if not partial:  # the record that lost a part has a turn of its own
            self.rows.append((record_id, RecordError(code, f"{origin}: {message}")))


def read_in_order(
    data: str,
    images: str | None,
    data_format: str,
    *,
    require_preferences: bool,
    keys: dict[str, KeyTally] | None = None,
    columns: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
) -> Iterator[Record | tuple[str | None, RecordError]]:
    """Records, and (id, RecordError) for rows that are none, in the order of the file.

    Args:
        keys: as `read_source`.
        columns, ignore: as `source_files`.
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
    )
    while True:
        record = next(records, None)
        yield from refused.rows
        refused.rows.clear()
        if record is None:
            return
        yield record
