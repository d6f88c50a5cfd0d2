"""Rows in memory in the place of a data file: a list of dicts, a pandas DataFrame, or a `datasets.Dataset`.

They are read as the rows of a Parquet file are, by the same layouts and with the same refusals. For a run, which other
processes read and which may go on another day, they are written to a file (`write_rows`).
"""

import base64
import hashlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from PIL import Image

from fastrm.data.sources.files import PARQUET_BATCH_ROWS, NumberedRow, batch_rows
from fastrm.data.sources.media import encoded, media_kind
from fastrm.data.sources.reader import SourceFile
from fastrm.data.sources.values import describe
from fastrm.errors import DataError, RecordError
from fastrm.json_files import to_json
from fastrm.storage import whole_file

if TYPE_CHECKING:
    import datasets
    import pandas

RowsLike: TypeAlias = "Sequence[Mapping[str, Any]] | pandas.DataFrame | datasets.Dataset"
NAME = "rows"  # the name of rows in memory in messages and figures


def is_table(value: object) -> bool:
    """Return whether a value is a DataFrame or a Dataset; neither library is imported for it."""
    return _is(value, "pandas", "DataFrame") or _is(value, "datasets", "Dataset")


class Rows:
    """Rows in memory, by range.

    Args:
        values: a list of dicts, a DataFrame, or a Dataset.

    Raises:
        DataError: for anything else.
    """

    def __init__(self, values: RowsLike):
        if not is_table(values):
            if _is(values, "datasets", "DatasetDict", "IterableDatasetDict"):
                raise DataError(f"{NAME}: got a {type(values).__name__} of {', '.join(values)}; name a split of it")
            if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__iter__"):
                raise DataError(f"{NAME}: got {describe(values)}, wanted a list of dicts, a DataFrame or a Dataset")
            values = list(values)  # of a stream, which is read several times
        self._values = values

    def __str__(self) -> str:
        return NAME

    def __len__(self) -> int:
        return len(self._values)

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[NumberedRow]:
        """Yield the rows from `start` up to, not including, `stop` (0-based), numbered from 1."""
        stop = len(self) if stop is None else min(stop, len(self))
        return enumerate(self._read(min(start, stop), stop), start=start + 1)

    def _read(self, start: int, stop: int) -> Iterator[object]:
        if _is(self._values, "datasets", "Dataset"):
            # Arrow's own values: images as their bytes, which are not decoded here.
            part = self._values.with_format("arrow").select(range(start, stop))
            for table in part.iter(batch_size=PARQUET_BATCH_ROWS):
                for batch in table.to_batches():
                    yield from batch_rows(batch)
        elif _is(self._values, "pandas", "DataFrame"):
            names = [str(name) for name in self._values.columns]
            for row in self._values.iloc[start:stop].itertuples(index=False, name=None):
                yield {name: _plain(value) for name, value in zip(names, row, strict=True)}
        else:
            yield from self._values[start:stop]


@dataclass(frozen=True)
class RowsFile(SourceFile):
    """Rows in memory as a source's file."""

    values: Rows | None = None

    def raw_rows(self, start: int = 0, stop: int | None = None) -> Iterator[NumberedRow]:
        return self.values.read(start, stop)

    def count_rows(self) -> int:
        return len(self.values)


def write_rows(values: RowsLike, folder: Path) -> Path:
    """Write rows to a JSON Lines file in the folder, and return it; its name is a digest of what it holds.

    Images and other bytes become data URIs. A file of the same rows is left as it is, so that a run that goes on finds
    the file that it began with.

    Raises:
        DataError: for a value that JSON cannot hold, naming its row.
        StorageError: if the file cannot be written.
    """
    lines = [_line(number, row) for number, row in Rows(values).read()]
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode())
    file = folder / f"{NAME}-{digest.hexdigest()[:16]}.jsonl"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(file, shared=True) as write:
            for line in lines:
                write(line)
    return file


def _line(number: int, row: object) -> str:
    try:
        return to_json(_as_json(row)) + "\n"
    except (TypeError, ValueError, RecursionError, RecordError) as error:
        raise DataError(f"{NAME}:{number}: cannot be written as JSON: {error}; wanted texts, numbers, images") from None


def _as_json(value: Any) -> object:
    if isinstance(value, Mapping):
        if isinstance(value.get("bytes"), bytes):  # as `datasets` keeps an image, with a path that is nowhere here
            return _as_json(value["bytes"])
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    if isinstance(value, Image.Image):
        value = encoded(value, "image")
    if isinstance(value, bytes):
        return f"data:{media_kind(value) or 'image'}/*;base64,{base64.b64encode(value).decode()}"
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise TypeError(f"it holds a Python {type(value).__name__}")


def _plain(value: Any) -> object:
    """Return a cell of a DataFrame as Parquet would give it: lists for arrays, None for what is missing."""
    numpy, pandas = sys.modules["numpy"], sys.modules["pandas"]
    if isinstance(value, numpy.ndarray) and value.ndim == 1:
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, numpy.generic):
        value = value.item()
    is_missing = value is pandas.NA or value is pandas.NaT or (isinstance(value, float) and value != value)
    return None if is_missing else value


def _is(value: object, library: str, *names: str) -> bool:
    """Return whether a value is of one of a library's classes, which it cannot be before somebody imported that."""
    loaded = sys.modules.get(library)
    return loaded is not None and isinstance(value, tuple(getattr(loaded, name) for name in names))
