"""The columns of all records of a split, in reading order. Nothing else of them is in memory."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastrm.data.prepared.records import read_record
from fastrm.data.prepared.units import Unit, load_unit
from fastrm.data.record import Record


@dataclass(frozen=True)
class RecordTable:
    """The columns of a split's N records.

    Attributes:
        units: in reading order.
        columns: (N,) `RECORD`.
        media, texts: as in `UnitContent`, of all units.
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
    contents = [load_unit(folder / unit.name) for unit in units]
    columns = _joined([content.columns for content in contents])
    lengths = [len(content.columns) for content in contents]

    def of_units(values: Iterable, dtype: str) -> np.ndarray:
        return np.repeat(np.array(list(values), dtype=dtype), lengths)

    return RecordTable(
        folder=folder,
        units=units,
        columns=columns,
        media=_joined([content.media for content in contents]),
        texts=_joined([content.texts for content in contents]),
        first_text=starts(columns["num_responses"]),
        unit=of_units(range(len(units)), "<i4"),
        source=of_units((unit.source for unit in units), "<i4"),
        repeat=of_units((unit.file.repeat for unit in units), "<f4"),
    )


def starts(counts: np.ndarray) -> np.ndarray:
    """Return (N,) int64: the sum of all counts before each."""
    ends = np.cumsum(counts, dtype=np.int64)
    return ends - counts


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    joined = np.concatenate(arrays)
    arrays.clear()  # frees the parts, which are as large as the whole
    return joined
