"""Rows of .jsonl, .json and .parquet files, one at a time; a bad row does not end the file."""

import json
from collections.abc import Iterator
from pathlib import Path

from fastrm.data.sources.values import describe
from fastrm.errors import DataError, RecordError

SUFFIXES = (".jsonl", ".json", ".parquet")
PARQUET_BATCH_ROWS = 32  # rows may hold images: this bounds the memory, not the speed
_BOM = b"\xef\xbb\xbf"

NumberedRow = tuple[int, object]  # 1-based line or row; a RecordError in place of an unreadable row


def data_files(path: str) -> list[str]:
    """The file itself, or the data files of a folder in the order of their names.

    Raises:
        DataError: the path is missing, not a data file, or a folder without one.
    """
    wanted = f"one of {', '.join(SUFFIXES)}"
    entry = Path(path)
    if not entry.exists():
        raise DataError(f'data source "{path}" does not exist; wanted {wanted}, or a folder of them')
    if entry.is_dir():
        files = sorted(f for f in entry.iterdir() if f.suffix.lower() in SUFFIXES and f.is_file() and f.name[0] != ".")
        if not files:
            raise DataError(f'data source "{path}" is a folder without data files; wanted {wanted}')
        return [str(file) for file in files]
    if entry.suffix.lower() not in SUFFIXES or not entry.is_file():
        raise DataError(f'data source "{path}" is not a data file; wanted {wanted}: convert it')
    return [path]


def read_rows(file: str) -> Iterator[NumberedRow]:
    """The rows of one data file; blank lines are skipped.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows}
    try:
        yield from readers[Path(file).suffix.lower()](file)
    except OSError as error:
        raise DataError(f'data file "{file}" cannot be read: {error.strerror or error}; repair it') from error


def _jsonl_rows(file: str) -> Iterator[NumberedRow]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.strip():
                yield number, _parse_line(line)


def _parse_line(line: bytes) -> object:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return RecordError("BAD_TEXT", f"byte {error.start + 1} of the line is not UTF-8; convert the file to UTF-8")
    except (ValueError, RecursionError) as error:
        return RecordError("BAD_JSON", f"the line is not JSON: {error}; correct or remove it")


def _json_rows(file: str) -> Iterator[NumberedRow]:
    with open(file, "rb") as document:
        content = document.read().removeprefix(_BOM)
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f'data file "{file}" is not JSON in UTF-8: {error}; correct it') from error
    yield from enumerate(_row_list(value, file), start=1)


def _row_list(value: object, file: str) -> list:
    lists = [value]
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
    if len(lists) == 1 and isinstance(lists[0], list):
        return lists[0]
    got = f"an object with {len(lists)} lists" if isinstance(value, dict) else describe(value)
    raise DataError(f'data file "{file}" is {got}; wanted a list of rows, or an object with one such list')


def _parquet_rows(file: str) -> Iterator[NumberedRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        # Without pre_buffer, which would hold whole row groups.
        with pyarrow.parquet.ParquetFile(file, pre_buffer=False) as table:
            for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                for row in _batch_rows(batch):
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as error:
        raise DataError(f'data file "{file}" is damaged after row {number}: {error}; make it again') from error


def _batch_rows(batch) -> list:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return [_row_alone(batch.slice(i, 1)) for i in range(batch.num_rows)]


def _row_alone(batch) -> object:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return RecordError("BAD_TEXT", f"the row has text that is not UTF-8: {error.reason}; convert it")
