"""A prepared set as training reads it: arrays that are mapped, records that are decoded when they are wanted.

manifest.json             settings, files, units, counts; written last
index/records.npy         `PLACE` of every record that was read
      groups.npy          `GROUP` of every group, and one more that ends the last
      members.npy         <u4 numbers of records, those of a group together
      images.npy          `SIZE` of the groups' images and videos
      train.npy eval.npy  <u4 numbers of groups in reading order, a repeated one as often as it is repeated
units/                    the records themselves (units.py)
refused.jsonl             every row that cannot be used, is a copy or contaminated, with the reason
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastrm.config import Config
from fastrm.data.group import GroupMedium, GroupSize, join_records, resolve_preferences
from fastrm.data.packing import EncodedGroup
from fastrm.data.prepared.records import read_record
from fastrm.data.record import Record
from fastrm.errors import RecordError, StorageError
from fastrm.json_files import to_json

MANIFEST, REFUSED, INDEX, UNITS = "manifest.json", "refused.jsonl", "index", "units"
SPLITS = ("train", "eval")

# Values are kept as narrow as one of them allows (`index.store` refuses what does not fit) and are widened, or made
# Python's integers, where they are read.
PLACE = np.dtype(
    [("offset", "<u8"), ("length", "<u4"), ("unit", "<u4"), ("content", "<u8"), ("weight", "<f8")]
)  # weight is that of the source
GROUP = np.dtype(
    [
        ("num_tokens", "<u4"),
        ("num_preferences", "<u4"),
        ("num_attention_pairs", "<u8"),  # the square of the tokens
        ("num_lead_tokens", "<u4"),
        ("first_member", "<u4"),  # a set has at most 2^32 - 1 records, groups and media
        ("first_image", "<u4"),
    ]
)
SIZE = np.dtype([("key", "<u4"), ("height", "<u2"), ("width", "<u2"), ("frames", "<u2")])  # in merged patches


class PreparedSet:
    """A split of a prepared set.

    Attributes:
        groups: the size of each, made on demand.
        records: of each group, decoded on demand; picklable, and shared by forked workers.
        fingerprint: changes with the groups' texts, images, preferences and order.
        num_records: in all groups, those of a repeated group once.
        num_ties_ignored: preferences left out for `loss.ties`.
    """

    def __init__(self, folder: Path, split: str, manifest: dict, config: Config):
        arrays = _Arrays(folder)
        entries = arrays.load(split)
        counts = manifest["splits"][split]
        self.groups: Sequence[GroupSize] = _Groups(arrays, entries)
        self.records: Sequence[Record] = _Records(folder, arrays, entries, manifest["units"], config)
        self.fingerprint: str = counts["fingerprint"]
        self.num_records: int = counts["num_records"]
        self.num_ties_ignored: int = counts["num_ties_ignored"]
        self.num_preferences: int = counts["num_preferences"]
        self._entries, self._arrays = entries, arrays

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def preference_counts(self) -> np.ndarray:
        """The number of preferences of each group, (len,) int64."""
        return self._arrays.groups["num_preferences"][self._entries].astype(np.int64)

    def members(self, number: int) -> list[tuple[str, str, str]]:
        """Return (source, origin, id) of the records in a group."""
        return [(record.source, record.origin, record.id) for record in self.records.parts(number)]

    def check(self, number: int, group: EncodedGroup) -> None:
        """Refuse a group whose media no longer have the size that they were prepared with.

        Raises:
            RecordError: IMAGE_CHANGED or VIDEO_CHANGED.
        """
        spans = {span.ref.key: span for response in group.responses for span in response.media}
        for span, medium in zip(spans.values(), self.groups[number].media, strict=True):
            if (span.size.height, span.size.width, span.size.frames) != tuple(medium[1:]):
                raise RecordError(
                    f"{span.ref.noun.upper()}_CHANGED",
                    f'{span.ref.noun} "{span.ref}" has another size than when it was prepared; prepare the data again',
                )


class _Arrays:
    """The mapped arrays of an index. They are pickled by name."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.records, self.groups, self.members, self.images = (
            self.load(name) for name in ("records", "groups", "members", "images")
        )

    def load(self, name: str) -> np.ndarray:
        path = self._folder / INDEX / f"{name}.npy"
        try:
            return np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise StorageError(f"{path}: cannot be read: {error}; delete the folder and prepare again") from error

    def __reduce__(self):
        return type(self), (self._folder,)


class _Groups(Sequence):
    def __init__(self, arrays: _Arrays, entries: np.ndarray):
        self._arrays, self._entries = arrays, entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, number: int) -> GroupSize:
        place = self._entries[number]
        row, following = self._arrays.groups[place], self._arrays.groups[place + 1]
        images = self._arrays.images[row["first_image"] : following["first_image"]].tolist()
        num_tokens, num_preferences, num_pairs, num_lead_tokens, _, _ = row.item()
        return GroupSize(num_tokens, num_preferences, num_pairs, tuple(map(_group_medium, images)), num_lead_tokens)


def _group_medium(size: tuple[int, int, int, int]) -> GroupMedium:
    return GroupMedium(*size)


class _Records(Sequence):
    """Records of the groups, with final preferences and weights."""

    def __init__(self, folder: Path, arrays: _Arrays, entries: np.ndarray, units: list[str], config: Config):
        self._units = folder / UNITS
        self._arrays, self._entries, self._names, self._config = arrays, entries, units, config

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, number: int) -> Record:
        return resolve_preferences(join_records(self.parts(number)), self._config)[0]

    def parts(self, number: int) -> list[Record]:
        """Return the records that were merged into a group."""
        place = self._entries[number]
        first, stop = self._arrays.groups["first_member"][place : place + 2]
        return [self._part(self._arrays.records[member]) for member in self._arrays.members[first:stop]]

    def _part(self, place: np.void) -> Record:
        offset, length, unit, _, weight = place.item()
        record = read_record(self._units / self._names[unit], offset, length)
        if weight == 1.0:
            return record
        return replace(record, preferences=tuple(replace(p, weight=p.weight * weight) for p in record.preferences))


def read_manifest(folder: Path) -> dict | None:
    """Read the manifest of a finished prepared set; None if the folder holds none.

    Raises:
        StorageError: if it is damaged.
    """
    path = folder / MANIFEST
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: cannot be read: {error}; delete the folder and prepare again") from error


def fingerprint_of(arrays: Sequence[np.ndarray], settings: object) -> str:
    """Return the SHA-256 of arrays and of the settings that their meaning depends on."""
    digest = hashlib.sha256(to_json(settings, sort_keys=True).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()
