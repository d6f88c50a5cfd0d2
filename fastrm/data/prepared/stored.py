"""A prepared set on disk: its index as preparing makes it, and as training reads it.

Arrays are mapped, and records are decoded when they are wanted.

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
from fastrm.data.batching import mix
from fastrm.data.group import GroupMedium, GroupSize, join_records, resolve_preferences
from fastrm.data.packing import EncodedGroup
from fastrm.data.prepared.count import Counted
from fastrm.data.prepared.records import read_record
from fastrm.data.prepared.select import Selection, first_equal
from fastrm.data.prepared.units import RecordTable
from fastrm.data.record import Record
from fastrm.errors import DataError, RecordError, StorageError
from fastrm.json_files import to_json

MANIFEST, REFUSED, INDEX, UNITS = "manifest.json", "refused.jsonl", "index", "units"
SPLITS = ("train", "eval")

# Values are kept as narrow as one of them allows (`store` refuses what does not fit) and are widened, or made
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
    """A split of a prepared set, or its groups of some numbers alone, whose counts are those of the split.

    Attributes:
        groups: the size of each, made on demand.
        records: of each group, decoded on demand; picklable, and shared by forked workers.
        fingerprint: changes with the groups' texts, images, preferences and order.
        num_records: in all groups, those of a repeated group once.
        num_ties_ignored: preferences left out for `loss.ties`.
    """

    def __init__(self, folder: Path, split: str, manifest: dict, config: Config, numbers: np.ndarray | None = None):
        arrays = _Arrays(folder)
        entries = arrays.load(split) if numbers is None else arrays.load(split)[numbers]
        counts = manifest["splits"][split]
        self.groups: Sequence[GroupSize] = _Groups(arrays, entries)
        self.records: Sequence[Record] = _Records(folder, arrays, entries, manifest["units"], config)
        self.fingerprint: str = counts["fingerprint"]
        self.num_records: int = counts["num_records"]
        self.num_ties_ignored: int = counts["num_ties_ignored"]
        self.num_preferences: int = counts["num_preferences"]
        self._entries, self._arrays = entries, arrays
        self._made_of, self._sets = (folder, split, manifest, config), counts.get("sets", {})

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def preference_counts(self) -> np.ndarray:
        """The number of preferences of each group, (len,) int64."""
        return self._arrays.groups["num_preferences"][self._entries].astype(np.int64)

    def parts(self, most: int | None = None) -> dict[str, "PreparedSet"]:
        """Return the named sets of an evaluation by their names; one whose name is "" where they have none.

        Args:
            most: groups of each, drawn by a hash of their numbers: the same ones every time; None: all.
        """
        found, start = {}, 0
        for name, size in (self._sets or {"": len(self)}).items():
            drawn = np.sort(np.argsort(mix(np.arange(size, dtype=np.uint64)), kind="stable")[:most])
            found[name] = PreparedSet(*self._made_of, start + drawn)
            start += size
        return found

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
    except NotADirectoryError:
        raise StorageError(f"{folder}: is a file, wanted a folder for prepared data; set data.prepared") from None
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: cannot be read: {error}; delete the folder and prepare again") from error


def fingerprint_of(arrays: Sequence[np.ndarray], settings: object) -> str:
    """Return the SHA-256 of arrays and of the settings that their meaning depends on."""
    digest = hashlib.sha256(to_json(settings, sort_keys=True).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def entries_of(chosen: dict[str, Selection], counted: dict[str, Counted], split: str) -> np.ndarray:
    """Return the numbers of a split's groups in reading order, as often as they are repeated.

    Groups of the training sources have the first numbers, and what they hold out follows the evaluation's own.
    """
    train, held_back = chosen["train"], len(counted["train"].counts)
    selected = counted["train"].counts["selected"]
    numbers = np.arange(held_back, dtype=np.uint32)
    if split == "train":
        return np.repeat(numbers, train.times[selected])
    own = np.arange(held_back, held_back + len(counted["eval"].counts), dtype=np.uint32)
    return np.concatenate([own, numbers[train.held_out[selected]]])


def make_index(
    table: RecordTable, counted: dict[str, Counted], splits: dict[str, np.ndarray], weights: list[list[float]]
) -> dict[str, np.ndarray]:
    """Make the arrays of an index, by name.

    Args:
        splits: `entries_of` each.
        weights: weights of the sources of each split.
    """
    counts = np.concatenate([counted[split].counts for split in SPLITS])
    images = np.concatenate([counted[split].images for split in SPLITS])
    members = np.concatenate([counted[split].members for split in SPLITS])
    return {
        "records": _places(table, weights),
        "groups": _group_rows(counts),
        "members": members,
        "images": _sizes(images),
        **splits,
    }


def _places(table: RecordTable, weights: list[list[float]]) -> np.ndarray:
    """Return the `PLACE` of every record, in a group or not, so that numbers of records stay valid."""
    places = np.empty(len(table), dtype=PLACE)
    for name in ("offset", "length"):
        places[name] = table.columns[name]
    places["content"] = table.columns["ordered"]
    store(places, "unit", table.unit)
    of_unit = [weights[SPLITS.index(unit.split)][unit.source] for unit in table.units]
    places["weight"] = np.array(of_unit)[table.unit]
    return places


def _group_rows(counts: np.ndarray) -> np.ndarray:
    """Return the `GROUP` of every group, and one more."""
    rows = np.zeros(len(counts) + 1, dtype=GROUP)
    for name in ("num_tokens", "num_preferences", "num_attention_pairs", "num_lead_tokens"):
        store(rows[:-1], name, counts[name])
    store(rows[1:], "first_member", np.cumsum(counts["num_members"]))
    store(rows[1:], "first_image", np.cumsum(counts["num_images"]))
    return rows


def store(rows: np.ndarray, name: str, values: np.ndarray) -> None:
    """Write integers of at least 0 into a column, which may be narrower than they are.

    Raises:
        DataError: one of them does not fit. NumPy would store something else.
    """
    largest, most = int(values.max(initial=0)), np.iinfo(rows.dtype[name]).max
    if largest > most:
        raise DataError(
            f"the prepared set's index has room for {name} up to {most:,}, got {largest:,}; divide data.train into "
            "several sets, or lower data.max_tokens_per_group"
        )
    rows[name] = values


def _sizes(images: np.ndarray) -> np.ndarray:
    """Return the `SIZE` of the groups' media; equal content has equal numbers."""
    sizes = np.empty(len(images), dtype=SIZE)
    first = first_equal([images["digest"]["low"], images["digest"]["high"]])
    store(sizes, "key", np.unique(first, return_inverse=True)[1])
    for name in ("height", "width", "frames"):
        sizes[name] = images[name]
    return sizes


def num_ties_ignored(counted: dict[str, Counted], entries: np.ndarray) -> int:
    ties = np.concatenate([counted[split].counts["num_ties_ignored"] for split in SPLITS])
    return int(ties[np.unique(entries)].sum())


def num_records_of(index: dict[str, np.ndarray], entries: np.ndarray) -> int:
    """Return the number of records in the groups of these entries, those of a repeated group once."""
    sizes = np.diff(index["groups"]["first_member"].astype(np.int64))
    return int(sizes[np.unique(entries)].sum())


def fingerprint_of_groups(index: dict[str, np.ndarray], entries: np.ndarray, settings: dict) -> str:
    """Return a split's fingerprint, of its groups in order: their contents, weights and lengths."""
    groups, members = index["groups"], index["members"]
    sizes = np.diff(groups["first_member"].astype(np.int64))[entries]
    first = groups["first_member"][entries].astype(np.int64)
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    places = index["records"][members[np.repeat(first, sizes) + within]]
    counted = groups[["num_tokens", "num_preferences"]][entries]
    arrays = [sizes, places["content"], places["weight"], counted["num_tokens"], counted["num_preferences"]]
    return fingerprint_of(arrays, [settings["loss"], settings["optim"]])
