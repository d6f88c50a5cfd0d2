"""A check of a source's `columns`, the file's names for the keys that fastrm reads, on the file's first rows."""

from itertools import islice

from fastrm.data.sources.critiques import CRITIQUE_KEYS
from fastrm.data.sources.digits import DigitsFile
from fastrm.data.sources.key_tally import KeyTally
from fastrm.data.sources.keys import METADATA, nearest
from fastrm.data.sources.layouts import ALL_KEYS
from fastrm.data.sources.reader import RefusedRow, SourceFile
from fastrm.errors import ConfigError, DataError

FIRST_ROWS = 100


def understood(file: SourceFile | DigitsFile) -> str | None:
    """Return one line that says how `columns` map the file's first rows to keys; None for a source without them.

    Raises:
        ConfigError: if `columns` names a key that no layout reads.
        DataError: if none of the first rows has one of the columns, or none of them can be used.
    """
    columns = dict(getattr(file, "columns", ()))
    if not columns:
        return None
    for key in columns:
        if key not in ALL_KEYS and key not in METADATA and key not in CRITIQUE_KEYS:
            near = nearest(key, ALL_KEYS)
            hint = f'did you mean "{near}"?' if near else f"keys: {', '.join(ALL_KEYS)}"
            raise ConfigError(f"columns: {file.path}: no layout reads the key {key!r}; {hint}")
    seen = dict.fromkeys(
        name for _, row in islice(file.raw_rows(0, FIRST_ROWS), FIRST_ROWS) if isinstance(row, dict) for name in row
    )
    for key, column in columns.items():
        if column not in seen:
            near = nearest(column, list(seen))
            hint = f'did you mean "{near}"?' if near else f"they have {', '.join(seen) or 'no columns'}"
            raise DataError(f'columns.{key}: none of the first rows of {file.path} has a column "{column}"; {hint}')
    tally = KeyTally()
    items = list(file.read(0, FIRST_ROWS, tally))
    refused = [item for item in items if isinstance(item, RefusedRow) and not item.partial]
    records = len([item for item in items if not isinstance(item, RefusedRow)])
    if not records:
        raise DataError(f"columns: none of the first rows of {file.path} can be used: {refused[0].message}")
    layouts = ", ".join(name for name, _ in tally.layouts.most_common())
    names = ", ".join(f"{key} = {column}" for key, column in columns.items())
    return (
        f"{file.path}: read as {layouts} with {names}; {records} of the first {records + len(refused)} rows can be used"
    )
