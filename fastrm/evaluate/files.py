"""`fastrm score` and `fastrm eval`: files in, rewards or figures out."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastrm.data.record import Record
from fastrm.data.sources import read_source
from fastrm.errors import DataError, RecordError, StorageError
from fastrm.evaluate.pair_accuracy import PairAccuracy
from fastrm.evaluate.scoring import score_records
from fastrm.model.reward_model import RewardModel
from fastrm.train.display import Display

# Records that are read, scored and written at a time.
CHUNK = 512


class _Refused:
    """Takes the place of the quarantine: a bad row keeps its turn among the good ones."""

    def __init__(self):
        self.rows: list[tuple[str | None, RecordError]] = []

    def add(self, *, source, origin, record_id, code, message) -> None:
        self.rows.append((record_id, RecordError(code, f"{origin}: {message}")))


def read_in_order(data: str, images, data_format, *, require_preferences: bool) -> Iterator:
    """Records, and (id, RecordError) for rows that are none, in the order of the file."""
    refused = _Refused()
    records = read_source(
        data, format=data_format, images=images, quarantine=refused, require_preferences=require_preferences
    )
    while True:
        record = next(records, None)
        yield from refused.rows
        refused.rows.clear()
        if record is None:
            return
        yield record


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """What `score` and `eval` share: where rows and images are found, and how the model runs."""

    images: str | None
    data_format: str
    tokens_per_pack: int
    num_workers: int
    device: str
    dtype: str
    max_image_pixels: int
    max_image_bytes: int


def score_file(model: Path, data: str, out: Path, options: ScoringOptions) -> None:
    """Write one line {"id", "rewards"} per group, in input order.

    A refused group has "rewards": null and "error". The file appears under its name when complete.

    Raises:
        ConfigError, DataError, StorageError: for a model, data or output that cannot be used.
    """
    done = failed = 0
    with _complete_file(out) as write, Display() as display:
        for record, result in _results(model, data, options, display.task("scoring"), require_preferences=False):
            write(json.dumps(_score_row(record, result)) + "\n")
            failed += isinstance(result, RecordError)
            done += 1
    Console(stderr=True).print(f"{done:,} groups scored, {failed:,} of them refused; {out}", markup=False)


def evaluate_file(model: Path, data: str, json_out: Path | None, options: ScoringOptions) -> None:
    """Print pair accuracy overall and per source; optionally write it as JSON.

    Raises:
        ConfigError, DataError, StorageError: for a model, data or output that cannot be used.
    """
    # Opened before the work that it waits for, so that a wrong name fails at once.
    with _complete_file(json_out) if json_out is not None else nullcontext() as write:
        report = _evaluate(model, data, options)
        _print_report(report)
        if write is not None:
            write(json.dumps(report, indent=2) + "\n")


def _evaluate(model: Path, data: str, options: ScoringOptions) -> dict:
    accuracy, refused = PairAccuracy(), []
    with Display() as display:
        for record, result in _results(model, data, options, display.task("evaluating"), require_preferences=True):
            if isinstance(result, RecordError):
                refused.append({"code": result.code, "message": result.message})
            else:
                accuracy.add(record, result)
    if not accuracy.num_scored:
        reasons = refused[0]["message"] if refused else "it has no rows"
        raise DataError(f"{data}: no preference could be evaluated; {reasons}")
    return {**accuracy.report(), "refused": refused}


def _results(model: Path, data: str, options: ScoringOptions, update, *, require_preferences: bool) -> Iterator:
    """(record, rewards) or (record or id, RecordError) for each row, in order."""
    rows = read_in_order(data, options.images, options.data_format, require_preferences=require_preferences)
    # Before the model is loaded, so that data that cannot be read fails at once.
    chunk, done = list(islice(rows, CHUNK)), 0
    network = RewardModel.from_pretrained(
        model,
        device=options.device,
        dtype=options.dtype,
        max_image_pixels=options.max_image_pixels,
        max_image_bytes=options.max_image_bytes,
    ).network
    while chunk:
        yield from _score_chunk(network, chunk, options)
        done += len(chunk)
        update(done, None)
        chunk = list(islice(rows, CHUNK))


def _score_chunk(network, chunk, options: ScoringOptions) -> Iterator[tuple[Record | str | None, object]]:
    records = [row for row in chunk if isinstance(row, Record)]
    results = iter(score_records(network, records, options.tokens_per_pack, options.num_workers))
    for row in chunk:
        yield (row, next(results)) if isinstance(row, Record) else row


@contextmanager
def _complete_file(path: Path) -> Iterator[Callable[[str], None]]:
    """A function that writes text to a file, which appears under its name at the end or not at all.

    Raises:
        StorageError: at once if the file cannot be made; later if it cannot be written.
    """
    if not path.parent.is_dir():
        raise StorageError(f"{path}: there is no folder {path.parent}; make it or name another file")
    if path.is_dir():
        raise StorageError(f"{path}: is a folder; name a file")
    partial = path.with_name(path.name + ".part")
    with _named(path):
        file = partial.open("w")

    def write(text: str) -> None:
        with _named(path):
            file.write(text)

    try:
        yield write
        with _named(path):
            file.close()
            os.replace(partial, path)
    except BaseException:
        # Closing flushes, which fails once more on a full disk; the first error is the one to report.
        with suppress(OSError):
            file.close()
        with suppress(OSError):
            partial.unlink()
        raise


@contextmanager
def _named(path: Path):
    """Only around the output's own operations: an OSError of the scoring is not the output's fault."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written: {error.strerror or error}; make room or name another file"
        ) from None


def _score_row(record, result) -> dict:
    name = record.id if isinstance(record, Record) else record
    if isinstance(result, RecordError):
        return {"id": name, "rewards": None, "error": f"{result.code}: {result.message}"}
    return {"id": name, "rewards": result}


def _print_report(report: dict) -> None:
    Console().print(_table(report))
    refused, console = report["refused"], Console(stderr=True)
    for row in refused[:10]:
        console.print(f"refused: {row['message']} ({row['code']})", markup=False, soft_wrap=True)
    if len(refused) > 10:
        console.print(f"... and {len(refused) - 10} more; --json lists them all", markup=False)


def _table(report: dict) -> Table:
    table = Table(title="Pair accuracy (equal rewards count as wrong)")
    for name in ("source", "pairs", "accuracy", "95 % interval"):
        table.add_column(name, justify="left" if name == "source" else "right")
    sources = list(report["sources"].items())
    for source, row in [*sources, ("all", report)] if len(sources) > 1 else [("all", report)]:
        low, high = row["interval"]
        table.add_row(source, f"{row['preferences']:,}", f"{row['accuracy']:.4f}", f"{low:.4f} - {high:.4f}")
    return table
