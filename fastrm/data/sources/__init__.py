"""Readers for the layouts that preference data comes in.

A source of the configuration comes in: files, a folder, a published set, a data set of the hub. Out comes a `Record`
for each row, or for rows that belong together; a row that cannot be used becomes one line of the quarantine, and
reading goes on. `source_files` gives a source's files, whose rows can be read by range and in other processes;
`read_source` reads them all. Open `reader.py` first, which reads the rows of a file, then the folder `layouts`, whose
modules make records of them.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from fastrm.data.paradigm import TextReading
from fastrm.data.quarantine import Quarantine
from fastrm.data.record import Record
from fastrm.data.sources.digits import PREFIX as DIGITS_PREFIX
from fastrm.data.sources.digits import DigitsFile
from fastrm.data.sources.files import data_files
from fastrm.data.sources.hub import PREFIX as HUB_PREFIX
from fastrm.data.sources.hub import hub_files
from fastrm.data.sources.in_memory import NAME, Rows, RowsFile
from fastrm.data.sources.key_tally import KeyTally
from fastrm.data.sources.layouts import FORMATS, keys_read_by
from fastrm.data.sources.media import any_path, in_folder, path_resolver
from fastrm.data.sources.published import NONE, find_set, set_files
from fastrm.data.sources.reader import RefusedRow, SourceFile
from fastrm.errors import DataError

__all__ = [
    "FORMATS",
    "DigitsFile",
    "KeyTally",
    "RefusedRow",
    "SourceFile",
    "hub_name",
    "is_on_hub",
    "read_source",
    "source_files",
    "unread_lines",
]


def source_files(
    path: str | Path | Rows | None = None,
    *,
    set: str | None = None,
    format: str = "auto",
    images: str | Path | None = None,
    name: str | None = None,
    pairs: str | None = None,
    columns: Mapping[str, str] | None = None,
    ignore: Iterable[str] = (),
) -> list[SourceFile | DigitsFile]:
    """Return the data files of a source, in order.

    Args:
        path: a .jsonl, .json or .parquet file, a folder of them, ``digits:train``, ``digits:eval``, or
            ``hub:owner/name[/config][:split]``, or rows in memory; with `set` the set's folder, None for the hub.
        set: a published set by its name in `PUBLISHED`.
        format: a name of FORMATS; ``auto`` decides for each row by its keys.
        images: folder or .tar/.zip archive that image paths are relative to; default the file's folder, and for rows
            in memory the working folder; ``none``: the rows have no images and videos, and ``<image>`` in them is
            text, as in published sets of text.
        name: see `SourceFile`.
        pairs: see `SourceFile`; None: the set's own, else ``all``.
        columns: the file's name for each key that fastrm reads, where the two differ.
        ignore: keys that are not read, and not reported as unread.

    Raises:
        DataError: the source or the images do not exist or cannot be read at all, or the format is
            unknown.
    """
    if format not in FORMATS:
        wanted = ", ".join(FORMATS)
        raise DataError(f'data source "{path}": format "{format}" is unknown; wanted one of {wanted}')
    path, images = (value if value is None or isinstance(value, Rows) else os.fspath(value) for value in (path, images))
    published = None if set is None else find_set(set)
    is_text = images == NONE or (images is None and published is not None and published.media == NONE)
    images = None if is_text else images
    reading = {
        "name": name or set,
        "columns": tuple((columns or {}).items()),
        "ignore": tuple(ignore),
        "placeholders_are_text": is_text,
    }
    if published is not None:
        layout = published.layout if format == "auto" else format
        return set_files(published, path, images, format=layout, pairs=pairs or published.pairs, **reading)
    if isinstance(path, Rows):
        resolve = any_path if images is None else path_resolver(images)
        return [RowsFile(NAME, resolve, format, pairs=pairs or "all", values=path, **reading)]
    if path is None:
        raise DataError("a data source needs a path or the name of a published set")
    if path.startswith(DIGITS_PREFIX) and format in ("auto", "digits"):
        return [DigitsFile(path.removeprefix(DIGITS_PREFIX), name)]
    if format == "digits":
        raise DataError(f'data source "{path}" has format "digits"; wanted digits:train or digits:eval')
    files = hub_files(path.removeprefix(HUB_PREFIX)) if path.startswith(HUB_PREFIX) else data_files(path)
    resolve = in_folder(os.path.dirname(files[0])) if images is None else path_resolver(images)
    return [SourceFile(file, resolve, format, pairs=pairs or "all", **reading) for file in files]


def is_on_hub(path: str | None, set: str | None) -> bool:
    """Return whether a source is read from the hub."""
    return path is None if set is not None else path is not None and path.startswith(HUB_PREFIX)


def hub_name(path: str | None, set: str | None) -> str:
    """Return the name of a source on the hub, as messages use it.

    Raises:
        DataError: for a set that does not exist.
    """
    return path if set is None else f"{set} ({find_set(set).hub})"


def read_source(
    path: str | Path | Rows | None = None,
    *,
    quarantine: Quarantine,
    keys: dict[str, KeyTally] | None = None,
    require_preferences: bool = True,
    reading: TextReading | None = None,
    **options,
) -> Iterator[Record]:
    """Yield the records of a data source, once each, in the order of its files and rows.

    Args:
        path: as `source_files`, which also takes the options.
        quarantine: takes the rows that cannot be used.
        keys: takes for each file what its rows' keys were.
        require_preferences, reading: see `SourceFile`.

    Raises:
        DataError: as `source_files`, by the call itself; iteration raises what only reading can see.
    """
    files = [file.requiring(require_preferences) for file in source_files(path, **options)]
    files = files if reading is None else [replace(file, reading=reading) for file in files]
    return _read_files(files, quarantine, {} if keys is None else keys)


def _read_files(
    files: list[SourceFile | DigitsFile], quarantine: Quarantine, keys: dict[str, KeyTally]
) -> Iterator[Record]:
    for file in files:
        for item in file.read(keys=keys.setdefault(file.path, KeyTally())):
            if isinstance(item, RefusedRow):
                item.add_to(quarantine)
            else:
                yield item


def unread_lines(keys: Mapping[str, KeyTally]) -> list[str]:
    """Return one line for each file that has unread keys, from the counts of `read_source`."""
    lines = (tally.report(path, keys_read_by(tally.layouts)) for path, tally in keys.items())
    return [line for line in lines if line is not None]
