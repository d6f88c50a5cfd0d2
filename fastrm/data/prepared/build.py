"""The making of a prepared set: read, select, count, and write the index. A killed pass continues where it stopped."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastrm.config import Config
from fastrm.data.balance import CostModel
from fastrm.data.prepared import count, units
from fastrm.data.prepared.count import COUNT, GROUPS_PER_PIECE, IMAGE, Counted, GroupCounter, Piece, load_counted
from fastrm.data.prepared.decontaminate import collect, find_contaminated, kinds_of
from fastrm.data.prepared.records import read_refusals, refusal_line
from fastrm.data.prepared.report import make_report, write_report
from fastrm.data.prepared.select import Selection, first_copies, select
from fastrm.data.prepared.settings import FORMAT, difference, encoder_key, file_states, read_settings, set_settings
from fastrm.data.prepared.stored import (
    INDEX,
    MANIFEST,
    REFUSED,
    SPLITS,
    UNITS,
    entries_of,
    fingerprint_of,
    fingerprint_of_groups,
    make_index,
    num_records_of,
    num_ties_ignored,
    read_manifest,
)
from fastrm.data.prepared.units import RecordTable, Unit, UnitReader, list_units, load_table
from fastrm.data.prepared.workers import run_pieces
from fastrm.data.record import Record
from fastrm.data.sources import KeyTally, RefusedRow, unread_lines
from fastrm.data.sources.columns import understood
from fastrm.data.template import ConversationEncoder
from fastrm.errors import ConfigError, DataError
from fastrm.json_files import to_json
from fastrm.storage import whole_file, whole_folder, write_whole, writing
from fastrm.ui import Display

_COUNTS, _FILES = "counts", "files.json"


@dataclass
class Preparation:
    """A prepared set in a folder, which is found there or made.

    Attributes:
        is_own: the folder belongs to one run, and may be made anew when the settings change.
        benchmarks: gives the records of `data.decontaminate.against`.
        num_workers: processes.
    """

    config: Config
    folder: Path
    display: Display
    is_own: bool
    benchmarks: Callable[[], Iterable[Record]] = tuple
    num_workers: int = 1
    seconds: dict[str, float] = field(default_factory=dict)
    """The seconds of each pass that this process has made."""

    def find(self) -> bool:
        """Return whether the folder holds a finished set that can be used as it is.

        Raises:
            ConfigError: if it was made under other settings, and is not the run's own.
            StorageError: if it is damaged.
        """
        manifest = read_manifest(self.folder)
        if manifest is None:
            return False
        problem = difference(manifest, self.config)
        if problem is not None and not self.is_own:
            raise ConfigError(
                f"data.prepared {self.folder}: {problem}; prepare into another folder, delete this one, or set it back"
            )
        if problem is None:
            with suppress(OSError):  # left by a process that was killed; it stays where the folder is read only
                self._tidy(manifest["units"])
        return problem is None

    def discard(self) -> None:
        """Discard a run's own set that `find` has found to have other settings or files, and say so."""
        manifest = read_manifest(self.folder)
        if manifest is not None:
            self.display.say(f"prepared set {self.folder}: {difference(manifest, self.config)}; it is made anew")
            (self.folder / MANIFEST).unlink()

    def read(self) -> list[Unit]:
        """Run the first pass: return the units of all splits, read unless they are there.

        Raises:
            DataError, StorageError: a source cannot be read, or the folder cannot be written.
        """
        started = time.perf_counter()
        settings = read_settings(self.config)
        listed = [u for split in SPLITS for u in list_units(split, self.config.data.sources(split).values(), settings)]
        for file in {unit.file: None for unit in listed}:
            if (line := understood(file)) is not None:
                self.display.say(line)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._say_what_changed()
        reader = UnitReader(self.folder / UNITS, settings)
        missing = list({unit.name: unit for unit in listed if not reader.is_done(unit)}.values())
        if len(missing) < len(listed):
            self.display.say(f"reading: {len(listed) - len(missing):,} of {len(listed):,} parts are there already")
        update, total = self.display.task("reading rows"), sum(unit.stop - unit.start for unit in listed)
        done = total - sum(unit.stop - unit.start for unit in missing)
        update(done, total)
        for unit in run_pieces(reader, missing, self.num_workers):
            done += unit.stop - unit.start
            update(done, total)
        self.seconds["read"] = time.perf_counter() - started
        for line in unread_lines(self.keys(listed)):
            self.display.say(line)
        return listed

    def keys(self, listed: Sequence[Unit]) -> dict[str, KeyTally]:
        """Return the tallies of the keys of each file; a file of training and evaluation counts once."""
        tallies: dict[str, KeyTally] = {}
        for unit in {unit.name: unit for unit in listed}.values():
            tallies.setdefault(unit.file.path, KeyTally()).merge(units.unit_keys(self.folder / UNITS / unit.name))
        return tallies

    def training_records(self, listed: Sequence[Unit]) -> Iterator[Record]:
        """Yield the records of the training sources, for training a tokenizer on them."""
        for unit in listed:
            if unit.split == "train":
                yield from units.unit_records(self.folder / UNITS / unit.name)

    def finish(self, listed: Sequence[Unit], encoder: ConversationEncoder, cost: CostModel) -> dict:
        """Run the second and third pass, write index, report and manifest, and return the report.

        Args:
            cost: the cost model of the report's shared work.

        Raises:
            DataError: if no group is left to train on, or a benchmark cannot be read.
            StorageError: if the folder cannot be written.
        """
        if not listed:
            raise DataError("no usable group in 0 records (no rows): the sources of data.train are empty")
        started = time.perf_counter()
        table = load_table(self.folder / UNITS, listed)
        removed = self._remove(table)
        chosen = self._select(table, removed)
        selected = time.perf_counter()
        counted = self._count(table, chosen, encoder)
        self.seconds |= {"select": selected - started, "count": time.perf_counter() - selected}
        started = time.perf_counter()
        splits = {split: entries_of(chosen, counted, split) for split in SPLITS}
        refusals, first = Counter(), None
        with whole_file(self.folder / REFUSED) as write:
            for refusal in self._refusals(table, removed, listed, counted):
                write(refusal_line(refusal))
                refusals[refusal.code] += 1
                first = first or f"first: {refusal.origin}: {refusal.message}; "
        self._check_used(splits, len(table), refusals, first or "")
        sets = self._sizes_of_sets(table, chosen["eval"], counted["eval"], len(splits["eval"]))
        weights = [[source.weight for source in self.config.data.sources(split).values()] for split in SPLITS]
        index = make_index(table, counted, splits, weights)
        self._write_index(index)
        report = make_report(self.config, table, removed, chosen, counted, cost)
        self.seconds["index"] = time.perf_counter() - started
        write_report(report | {"seconds": self.seconds}, self.folder)
        self._write_manifest(counted, splits, listed, index, encoder, sets)
        self._tidy([unit.name for unit in listed])
        return report

    def check_encoder(self, encoder: ConversationEncoder) -> None:
        """Refuse a set that another tokenizer, template or image processor has counted.

        Raises:
            ConfigError: naming what differs.
        """
        counted, now = read_manifest(self.folder)["encoder"], encoder_key(encoder)
        if names := [name for name in now if counted.get(name) != now[name]]:
            raise ConfigError(
                f"prepared set {self.folder}: was counted with another {', '.join(names)}; delete it or set "
                "data.prepared to another folder"
            )

    def _say_what_changed(self) -> None:
        """Name files that have changed since an earlier, unfinished preparation."""
        path, now = self.folder / _FILES, file_states(self.config)
        if path.exists():
            before = json.loads(path.read_text())
            for file in sorted(before.keys() & now.keys()):
                if before[file] != now[file]:
                    self.display.say(f"{file} has changed since the last time: it is read again")
        write_whole(path, to_json(now))

    def _remove(self, table: RecordTable) -> dict[str, np.ndarray]:
        """Return what is not trained on: each record's first equal one (`copy_of`), and matches of each kind."""
        is_train, data = table.is_of("train"), self.config.data
        removed = {"copy_of": np.arange(len(table))}
        if data.deduplicate:
            first = first_copies(table)
            # Training sources are read first, so a copy in an evaluation source never displaces anything.
            removed["copy_of"] = np.where(is_train, first, removed["copy_of"])
        if data.decontaminate is not None:
            limits = read_settings(self.config).limits
            benchmarks = collect(self.benchmarks(), data.decontaminate, limits)
            found = find_contaminated(table, benchmarks, data.decontaminate)
            removed |= {kind: matches & is_train for kind, matches in found.items()}
        return removed

    def _check_used(self, splits: dict[str, np.ndarray], num_records: int, refusals: Counter, first: str) -> None:
        for split, entries in splits.items():
            if getattr(self.config.data, split) and not len(entries):
                reasons = ", ".join(f"{code} {number}" for code, number in refusals.most_common()) or "no rows"
                raise DataError(
                    f"data.{split}: no usable group in {num_records:,} records ({reasons}); {first}see "
                    f"{self.folder / REFUSED}"
                )

    def _select(self, table: RecordTable, removed: dict[str, np.ndarray]) -> dict[str, Selection]:
        kept, data = is_kept(removed), self.config.data
        ties_weigh = 2 if self.config.loss.ties == "half" else 0
        return {
            split: select(
                table, kept & table.is_of(split), list(data.sources(split).values()), merge=data.merge_groups,
                ties_weigh=ties_weigh,
            )
            for split in SPLITS
        }

    def _count(self, table: RecordTable, chosen: dict[str, Selection], encoder) -> dict[str, Counted]:
        used = {split: np.flatnonzero(chosen[split].is_used) for split in SPLITS}
        name = self._name_of_counts(table, chosen, encoder)
        folder = self.folder / _COUNTS / name
        folder.mkdir(parents=True, exist_ok=True)
        pieces = {
            split: [
                Piece(numbers, folder / f"{split}-{number:06d}.npz")
                for number, numbers in enumerate(_cut(used[split], GROUPS_PER_PIECE))
            ]
            for split in SPLITS
        }
        update, total = self.display.task("counting groups"), sum(map(len, used.values()))
        missing = {split: [piece for piece in pieces[split] if not piece.path.exists()] for split in SPLITS}
        done = total - sum(len(piece.numbers) for some in missing.values() for piece in some)
        update(done, total)
        for split in SPLITS:
            counter = GroupCounter(table, chosen[split], encoder.counting_only(), self.config)
            for number in run_pieces(counter, missing[split], self.num_workers):
                done += number
                if number:  # a split without groups has one empty piece
                    update(done, total)
        return {split: load_counted(pieces[split]) for split in SPLITS}

    def _name_of_counts(self, table, chosen, encoder) -> str:
        """Return the name of the counts: a hash of records, groups, encoder and settings."""
        arrays = [
            table.columns["ordered"],
            *(a for s in chosen.values() for a in (s.members, s.starts, s.times, s.held_out)),
        ]
        layout = [COUNT.descr, IMAGE.descr]  # pieces with other columns are not used again
        return fingerprint_of(arrays, [FORMAT, layout, set_settings(self.config), encoder_key(encoder)])[:24]

    def _refusals(self, table, removed, listed, counted) -> Iterator[RefusedRow]:
        for unit in listed:
            yield from read_refusals(self.folder / UNITS / unit.name / units.REFUSED)
        kinds = {kind: matches for kind, matches in removed.items() if kind != "copy_of"}
        for number in np.flatnonzero(~is_kept(removed)).tolist():
            record, first = table.record(number), int(removed["copy_of"][number])
            if first != number:
                code = "DUPLICATE"
                message = f"the same prompt, responses and preferences are at {table.record(first).origin}"
            else:
                code = "CONTAMINATED"
                message = f"a benchmark holds it too, by {', '.join(kinds_of(kinds, number))}"
            yield RefusedRow(record.source, record.origin, record.id, code, message)
        for split in SPLITS:
            yield from count.refusals(counted[split])

    def _write_index(self, index: dict[str, np.ndarray]) -> None:
        folder = self.folder / INDEX
        with writing(folder), whole_folder(folder) as partial:
            for name, array in index.items():
                np.save(partial / f"{name}.npy", array)

    def _sizes_of_sets(self, table: RecordTable, chosen: Selection, counted: Counted, total: int) -> dict[str, int]:
        """Return the number of groups of each named evaluation set, which follow one another; none without names."""
        names, data = self.config.data.eval_names, self.config.data
        if not names:
            return {}
        owner = np.repeat(np.arange(len(data.eval)), [len(sources) for sources in data.eval.values()])
        of_groups = owner[table.source[chosen.first[counted.counts["selected"]]]]
        sizes = {name: int(np.sum(of_groups == number)) for number, name in enumerate(data.eval)}
        sizes |= {name: total - sum(sizes.values()) for name in names[len(sizes) :]}  # what training holds out
        if empty := [name for name, size in sizes.items() if not size]:
            raise DataError(f"data.eval.{empty[0]}: no usable group; see {self.folder / REFUSED}")
        return sizes

    def _write_manifest(self, counted, splits, listed, index, encoder, sets) -> None:
        settings = set_settings(self.config)
        manifest = {
            "format": FORMAT,
            "settings": settings,
            "encoder": encoder_key(encoder),
            "files": file_states(self.config),
            "units": [unit.name for unit in listed],
            "splits": {
                split: {
                    "num_groups": len(splits[split]),
                    "num_records": num_records_of(index, splits[split]),
                    "num_preferences": int(index["groups"]["num_preferences"][splits[split]].sum()),
                    "num_ties_ignored": num_ties_ignored(counted, splits[split]),
                    "fingerprint": fingerprint_of_groups(index, splits[split], settings),
                }
                for split in SPLITS
            },
        }
        if sets:
            manifest["splits"]["eval"]["sets"] = sets
        write_whole(self.folder / MANIFEST, to_json(manifest, indent=1))

    def _tidy(self, names: Sequence[str]) -> None:
        """Remove what only an unfinished preparation needs: all but the units of these names, and the index."""
        shutil.rmtree(self.folder / _COUNTS, ignore_errors=True)
        (self.folder / _FILES).unlink(missing_ok=True)
        for entry in (self.folder / UNITS).iterdir():
            if entry.name not in names:
                shutil.rmtree(entry, ignore_errors=True)


def is_kept(removed: dict[str, np.ndarray]) -> np.ndarray:
    """Return (N,) bool: True for records that are neither a copy nor contaminated."""
    kept = removed["copy_of"] == np.arange(len(removed["copy_of"]))
    for kind, matches in removed.items():
        if kind != "copy_of":
            kept &= ~matches
    return kept


def _cut(numbers: np.ndarray, size: int) -> list[np.ndarray]:
    # At least one piece, though it may be empty, so that every split has arrays.
    return [numbers[first : first + size] for first in range(0, max(1, len(numbers)), size)]
