"""Rows of .jsonl (or .jsonl.gz), .json and .parquet files, by range; a bad row does not end the file.

A .json file holds one list of rows, or lines of JSON, as SHP's do. A file is a path, or
``ARCHIVE.zip!MEMBER`` for one inside a zip archive (in parts or whole, see archives.py), which is read
without unpacking it.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastrm.data.media.archives import archive_status, open_member
from fastrm.data.sources.values import DUPLICATE_KEY, decode_json, describe, unique_keys
from fastrm.errors import DataError, RecordError, looked_for

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
PARQUET_BATCH_ROWS = 32  # rows may hold images: this bounds the memory, not the speed
BLOCK_BYTES = 2**20  # the size of buffered reads
LFS_POINTER = b"version https://git-lfs.github.com"  # how the file begins that Git LFS leaves for one
_BOM = b"\xef\xbb\xbf"
_IN_ZIP = ".zip!"

NumberedRow = tuple[int, object]  # 1-based line or row; a RecordError in place of an unreadable row


def data_files(path: str) -> list[str]:
    """Return the file itself, or the data files of a folder in the order of their names.

    Raises:
        DataError: if the path is missing, no data file, or a folder without one.
    """
    wanted = f"one of {', '.join(SUFFIXES)}"
    entry = Path(path)
    if not entry.exists():
        raise DataError(f'data source "{path}" does not exist{looked_for(path)}; wanted {wanted}, or a folder of them')
    if entry.is_dir():
        files = sorted(f for f in entry.iterdir() if _has_suffix(f.name) and f.is_file() and f.name[0] != ".")
        if not files:
            raise DataError(f'data source "{path}" is a folder without data files; wanted {wanted}')
        return [_downloaded(str(file)) for file in files]
    if not _has_suffix(entry.name) or not entry.is_file():
        raise DataError(f'data source "{path}" is not a data file; wanted {wanted}: convert it')
    return [_downloaded(path)]


def _downloaded(file: str) -> str:
    """Return the file, unless it is the pointer that Git LFS leaves in the place of one that was not fetched.

    Raises:
        DataError: if it is.
    """
    with suppress(OSError), open(file, "rb") as stream:  # what cannot be read is named where it is read
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise DataError(f'data file "{file}" is a pointer of Git LFS; run git lfs pull in its folder')
    return file


def file_stem(file: str) -> str:
    """Return the name of a data file without folder, archive and suffix."""
    name = file.replace("!", "/").rpartition("/")[2]
    suffix = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")  # rows in memory have none
    return name[: len(name) - len(suffix)]


def stored_in(file: str) -> list[str]:
    """Return the files on disk that hold a data file: itself, or its archive, or the parts of that."""
    archive, in_zip, _ = file.partition(_IN_ZIP)
    return [part for part, _, _ in archive_status(archive + ".zip")] if in_zip else [file]


def _has_suffix(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def read_rows(file: str, start: int = 0, stop: int | None = None) -> Iterator[NumberedRow]:
    """Yield the rows of one data file from row `start` up to, not including, row `stop` (0-based).

    Rows before `start` are not parsed; of a JSON document, which has to be parsed whole, they are not
    yielded. Blank lines are skipped but counted, so that numbers are those of a full read.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    readers = {"lines": _jsonl_rows, "document": _json_rows, "table": _parquet_rows}
    with _naming_damage(file):
        yield from readers[_form(file)](file, start, stop)


def count_rows(file: str) -> int:
    """Return the number of rows of a data file; lines of .jsonl count, blank ones too, and only .json is parsed.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    with _naming_damage(file):
        form = _form(file)
        if form == "lines":
            return _count_lines(file)
        if form == "document":
            return len(_json_list(file))
        with _parquet_file(file) as table:
            return table.metadata.num_rows


def open_data_file(file: str) -> io.BufferedReader:
    """Open a data file, or a member of a zip archive, for reading bytes."""
    archive, in_zip, member = file.partition(_IN_ZIP)
    opened = open_member(archive + ".zip", member) if in_zip else open(file, "rb", 0)  # noqa: SIM115  (the caller closes it)
    # Python code reads what is compressed: in large pieces, not line by line.
    return io.BufferedReader(gzip.open(opened) if file.lower().endswith(".gz") else opened, BLOCK_BYTES)


def _form(file: str) -> str:
    if not file.lower().endswith(".json"):
        return "table" if file.lower().endswith(".parquet") else "lines"
    with open_data_file(file) as document:
        first, second = document.readline().removeprefix(_BOM), document.readline()
    # A file whose first line is an object, and which goes on after it, cannot be one JSON document.
    row = _parse_line(first)
    is_object = isinstance(row, dict) or (isinstance(row, RecordError) and row.code == DUPLICATE_KEY)
    is_lines = second.strip() and is_object
    return "lines" if is_lines else "document"


@contextmanager
def _naming_damage(file: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f'data file "{file}" cannot be read: {error.strerror or error}; repair it') from error
    except (EOFError, zlib.error) as error:
        raise DataError(f'data file "{file}" is cut short or damaged: {error}; make it again') from error


def _jsonl_rows(file: str, start: int, stop: int | None) -> Iterator[NumberedRow]:
    with open_data_file(file) as lines:
        _skip_lines(lines, start)
        for number, line in enumerate(lines, start=start + 1):
            if stop is not None and number > stop:
                return
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.strip():
                yield number, _parse_line(line)


def _skip_lines(lines: io.BufferedReader, count: int) -> None:
    """Advance by whole blocks, in which newlines are counted, then by lines.

    It never seeks back: a compressed file would be unpacked again from its beginning.
    """
    while count > 0 and (block := lines.peek()):
        in_block = block.count(b"\n")
        if in_block >= count:
            for _ in range(count):
                lines.readline()
            return
        lines.read(len(block))
        count -= in_block


def _count_lines(file: str) -> int:
    count, last = 0, b"\n"
    with open_data_file(file) as lines:
        while block := lines.read(BLOCK_BYTES):
            count += block.count(b"\n")
            last = block[-1:]
    return count + (last != b"\n")


def _parse_line(line: bytes) -> object:
    try:
        return decode_json(line.decode())
    except RecordError as error:
        return error
    except UnicodeDecodeError as error:
        return RecordError("BAD_TEXT", f"byte {error.start + 1} of the line is not UTF-8; convert the file to UTF-8")
    except (ValueError, RecursionError) as error:
        return RecordError("BAD_JSON", f"the line is not JSON: {error}; correct or remove it")


def _json_rows(file: str, start: int, stop: int | None) -> Iterator[NumberedRow]:
    yield from enumerate(_json_list(file)[start:stop], start=start + 1)


def _json_list(file: str) -> list:
    errors: list[RecordError] = []

    def unique_or_error(pairs: list[tuple[str, object]]) -> dict | RecordError:
        try:
            return unique_keys(pairs)
        except RecordError as error:
            errors.append(error)
            return error

    value = read_json(file, unique_or_error)
    if isinstance(value, RecordError):
        raise DataError(f'data file "{file}": {value.message}')
    lists = [value]
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
    if len(lists) == 1 and isinstance(lists[0], list):
        return [_error_in(row) or row for row in lists[0]] if errors else lists[0]
    got = f"an object with {len(lists)} lists" if isinstance(value, dict) else describe(value)
    raise DataError(f'data file "{file}" is {got}; wanted a list of rows, or an object with one such list')


def _error_in(value: object) -> RecordError | None:
    """Return the error that stands in the place of an object somewhere in a row."""
    if isinstance(value, RecordError):
        return value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next(filter(None, map(_error_in, parts)), None)


def read_json(file: str, make_object: Callable[[list[tuple[str, object]]], object] | None = None) -> object:
    """Read the value of a JSON file.

    Args:
        make_object: of the keys and values of an object; default: a dict with the last of equal keys.

    Raises:
        DataError: if it is not JSON in UTF-8.
        OSError: if it cannot be opened.
    """
    with open_data_file(file) as document:
        content = document.read().removeprefix(_BOM)
    try:
        return json.loads(content.decode(), object_pairs_hook=make_object)
    except (ValueError, RecursionError) as error:
        raise DataError(f'data file "{file}" is not JSON in UTF-8: {error}; correct it') from error


def _parquet_rows(file: str, start: int, stop: int | None) -> Iterator[NumberedRow]:
    import pyarrow

    number = start
    try:
        with _parquet_file(file) as table:
            stop = min(table.metadata.num_rows, table.metadata.num_rows if stop is None else stop)
            groups, first = _row_groups(table, start, stop)
            for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS, row_groups=groups):
                wanted = batch.slice(max(0, start - first))[: max(0, stop - max(start, first))]
                first += batch.num_rows
                for row in batch_rows(wanted):
                    number += 1
                    yield number, row
                if first >= stop:
                    return
    except pyarrow.ArrowException as error:
        raise DataError(f'data file "{file}" is damaged after row {number}: {error}; make it again') from error


def _parquet_file(file: str):
    import pyarrow
    import pyarrow.parquet

    try:
        # pre_buffer would hold whole row groups in memory.
        return pyarrow.parquet.ParquetFile(open_data_file(file) if _IN_ZIP in file else file, pre_buffer=False)
    except pyarrow.ArrowException as error:
        raise DataError(f'data file "{file}" is damaged after row 0: {error}; make it again') from error


def _row_groups(table, start: int, stop: int) -> tuple[list[int], int]:
    """Return the row groups that hold rows `start` to `stop`, and the number of rows before them."""
    groups, first, end = [], 0, 0
    for group in range(table.metadata.num_row_groups):
        begin, end = end, end + table.metadata.row_group(group).num_rows
        if begin < stop and end > start:
            first = first if groups else begin
            groups.append(group)
    return groups, first


def batch_rows(batch) -> list:
    """Return the rows of an Arrow record batch as plain objects; a RecordError in place of an unreadable row."""
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        rows = [_row_alone(batch.slice(i, 1)) for i in range(batch.num_rows)]
    nested = [field.name for field in batch.schema if _holds_objects(field.type)]
    for row in rows:
        if isinstance(row, dict):
            row.update({name: _without_nulls(row[name]) for name in nested})
    return rows


def _holds_objects(kind) -> bool:
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _holds_objects(kind.value_type)
    return types.is_struct(kind)


def _without_nulls(value: object) -> object:
    """Return the value without the nulls that Parquet adds so that all objects of a column have the same keys.

    A template would render them: in the schema of a tool and in the arguments of a call.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _row_alone(batch) -> object:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return RecordError("BAD_TEXT", f"the row has text that is not UTF-8: {error.reason}; convert it")
