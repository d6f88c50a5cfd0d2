"""The arrays of an index (see stored.py), made from the results of the passes."""

import numpy as np

from fastrm.data.prepared.count import Counted
from fastrm.data.prepared.select import Selection, first_equal
from fastrm.data.prepared.stored import GROUP, PLACE, SIZE, SPLITS, fingerprint_of
from fastrm.data.prepared.table import RecordTable
from fastrm.errors import DataError


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
