"""The second pass: the records of each group, and the number of times that each is trained on.

It works on columns alone, and is a pure function of them and of the configuration. Draws are by a hash of the prompt,
not of `run.seed`: runs of several seeds then train on the same groups, and share a prepared set.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastrm.data.batching import mix
from fastrm.data.group import MAX_MERGED_RESPONSES
from fastrm.data.prepared.units import RecordTable
from fastrm.data_config import SourceConfig

# Salts of the draws: different draws from the same groups must not choose the same ones.
_HOLD_OUT, _CAP, _REPEAT = (np.uint64(salt) for salt in (1, 2, 3))


@dataclass(frozen=True)
class Selection:
    """The G groups of a split.

    Attributes:
        members: record numbers, those of a group together.
        starts: (G + 1,) int64: group g has members[starts[g] : starts[g + 1]].
        times: (G,) int64, how often an epoch holds it; 0: not at all.
        held_out: (G,) bool: belongs to the evaluation, once.
    """

    members: np.ndarray
    starts: np.ndarray
    times: np.ndarray
    held_out: np.ndarray

    @property
    def first(self) -> np.ndarray:
        """The first record (G,) of each group."""
        return self.members[self.starts[:-1]]

    @property
    def is_used(self) -> np.ndarray:
        """(G,) bool: True for groups that are trained on or held out."""
        return (self.times > 0) | self.held_out


def first_copies(table: RecordTable) -> np.ndarray:
    """Return for each record (N,) int64 the first with the same prompt, images, responses and preferences."""
    keys = [table.columns[column][word] for column in ("content", "prompt") for word in ("low", "high")]
    return first_equal(keys)


def select(
    table: RecordTable, is_kept: np.ndarray, sources: Sequence[SourceConfig], *, merge: bool, ties_weigh: int
) -> Selection:
    """Select groups of the records that are kept, in order of their first record.

    Args:
        merge: records of one source with the same prompt and images become one group, of at most
            MAX_MERGED_RESPONSES responses (equal ones counted).
        ties_weigh: preferences that a tie is trained on as: 0 or 2.
    """
    records = np.flatnonzero(is_kept)
    members, group_starts = _merged(table, records) if merge else (records, np.arange(len(records) + 1))
    first = members[group_starts[:-1]]
    columns = table.columns
    num_ties = columns["num_ties"][members].astype(np.int64)
    sums = np.concatenate([[0], np.cumsum(columns["num_preferences"][members] + ties_weigh * num_ties)])
    num_preferences = sums[group_starts[1:]] - sums[group_starts[:-1]]
    prompt, source = table.columns["prompt"][first], table.source[first]
    held_out = _held_out(prompt, source, sources)
    times = _times(prompt["low"], source, table.repeat[first], num_preferences, ~held_out, sources)
    return Selection(members, group_starts, times, held_out)


def _merged(table: RecordTable, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (members, starts) of the groups of these records."""
    prompt, source = table.columns["prompt"], table.columns["source"]
    keys = [prompt["low"][records], prompt["high"][records], source[records], table.source[records]]
    order = np.lexsort((np.arange(len(records)), *keys))  # records of a prompt in reading order
    begins = _begins(keys, order)
    counts = table.columns["num_responses"][records[order]]
    for start, stop in _crowded(begins, counts):
        _cut(begins, counts, start, stop)
    group_starts = np.flatnonzero(begins)
    sizes = np.diff(np.append(group_starts, len(order)))
    by_first = np.argsort(order[group_starts])
    sizes, group_starts = sizes[by_first], group_starts[by_first]
    ends = np.cumsum(sizes)
    within = np.arange(len(order)) - np.repeat(ends - sizes, sizes)
    return records[order[np.repeat(group_starts, sizes) + within]], np.concatenate([[0], ends]).astype(np.int64)


def _begins(keys: Sequence[np.ndarray], order: np.ndarray) -> np.ndarray:
    """Return (n,) bool: True where an element, in this order, differs from the one before it."""
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = False
    for key in keys:
        ordered = key[order]
        begins[1:] |= ordered[1:] != ordered[:-1]
    return begins


def _crowded(begins: np.ndarray, counts: np.ndarray) -> list[tuple[int, int]]:
    """Return (start, stop) of the prompts with more responses than one group takes."""
    run_starts = np.flatnonzero(begins)
    if not len(run_starts):
        return []
    sums = np.add.reduceat(counts.astype(np.int64), run_starts)
    stops = np.append(run_starts[1:], len(counts))
    crowded = (sums > MAX_MERGED_RESPONSES) & (stops - run_starts > 1)
    return list(zip(run_starts[crowded].tolist(), stops[crowded].tolist(), strict=True))


def _cut(begins: np.ndarray, counts: np.ndarray, start: int, stop: int) -> None:
    """Begin a new group wherever the next record would not fit."""
    total = 0
    for place in range(start, stop):
        total += int(counts[place])
        if place > start and total > MAX_MERGED_RESPONSES:
            begins[place] = True
            total = int(counts[place])


def _held_out(prompt: np.ndarray, source: np.ndarray, sources: Sequence[SourceConfig]) -> np.ndarray:
    """Return (G,) bool: groups that are held out.

    A prompt that one source holds out is held out of all, so that it is on one side only.
    """
    chosen = np.zeros(len(prompt), dtype=bool)
    for number, settings in enumerate(sources):
        groups = np.flatnonzero(source == number)
        wanted = settings.held_out if isinstance(settings.held_out, int) else round(settings.held_out * len(groups))
        if wanted:
            chosen[_lowest(prompt["low"][groups], _HOLD_OUT, groups, wanted)] = True
    if not chosen.any():
        return chosen
    words = prompt["low"] ^ mix(prompt["high"])
    return np.isin(words, words[chosen])


def _times(
    word: np.ndarray, source: np.ndarray, file_repeat: np.ndarray, num_preferences: np.ndarray,
    is_train: np.ndarray, sources: Sequence[SourceConfig],
) -> np.ndarray:  # fmt: skip
    """Return (G,) int64: how often an epoch holds each group, after `cap` and then `repeat`."""
    times = np.zeros(len(word), dtype=np.int64)
    for number, settings in enumerate(sources):
        groups = np.flatnonzero((source == number) & is_train)
        if settings.cap is not None:
            drawn = _lowest(word[groups], _CAP, groups, len(groups))
            groups = np.sort(drawn[np.cumsum(num_preferences[drawn]) <= settings.cap])
        for repeat in np.unique(file_repeat[groups]):
            some = groups[file_repeat[groups] == repeat]
            whole, rest = divmod(settings.repeat * float(repeat), 1.0)
            times[some] = int(whole)
            times[_lowest(word[some], _REPEAT, some, round(rest * len(some)))] += 1
    return times


def _lowest(words: np.ndarray, salt: np.uint64, groups: np.ndarray, count: int) -> np.ndarray:
    """Return the `count` of these groups whose prompts hash lowest, lowest first; earlier ones where equal."""
    return groups[np.argsort(mix(words ^ mix(salt)), kind="stable")[:count]]


def first_equal(keys: Sequence[np.ndarray]) -> np.ndarray:
    """Return for each element (n,) int64 the first that is equal in all keys."""
    order = np.lexsort((np.arange(len(keys[0])), *keys))
    begins = _begins(keys, order)
    first = np.empty(len(order), dtype=np.int64)
    first[order] = order[np.flatnonzero(begins)][np.cumsum(begins) - 1] if len(order) else 0
    return first
