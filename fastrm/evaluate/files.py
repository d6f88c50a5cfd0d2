"""`fastrm score` and `fastrm eval`: files in, rewards or figures out."""

import json
import os
from collections.abc import Iterator
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


def score_file(model: Path, data: str, out: Path, *, images, data_format, tokens_per_pack, device, dtype) -> None:
    """Write one line {"id", "rewards"} per group, in input order.

    A refused group has "rewards": null and "error". The file appears under its name when complete.

    Raises:
        ConfigError, DataError, StorageError: for a model, data or output that cannot be used.
    """
    rows = read_in_order(data, images, data_format, require_preferences=False)
    first = list(islice(rows, CHUNK))
    network = RewardModel.from_pretrained(model, device=device, dtype=dtype).network
    partial = out.with_name(out.name + ".part")
    done = failed = 0
    try:
        with Display() as display, partial.open("w") as file:
            update = display.task("scoring")
            chunk = first
            while chunk:
                for record, result in _score_chunk(network, chunk, tokens_per_pack):
                    file.write(json.dumps(_score_row(record, result)) + "\n")
                    failed += isinstance(result, RecordError)
                    done += 1
                update(done, None)
                chunk = list(islice(rows, CHUNK))
        os.replace(partial, out)
    except OSError as error:
        raise StorageError(f"{out}: cannot be written: {error.strerror}; {done} groups were scored") from None
    Console(stderr=True).print(f"{done:,} groups scored, {failed:,} of them refused; {out}", markup=False)


def evaluate_file(model: Path, data: str, json_out, *, images, data_format, tokens_per_pack, device, dtype) -> None:
    """Print pair accuracy overall and per source; optionally write it as JSON.

    Raises:
        ConfigError, DataError, StorageError: for a model or data that cannot be used.
    """
    rows = read_in_order(data, images, data_format, require_preferences=True)
    first = list(islice(rows, CHUNK))
    network = RewardModel.from_pretrained(model, device=device, dtype=dtype).network
    accuracy, refused = PairAccuracy(), []
    with Display() as display:
        update, done, chunk = display.task("evaluating"), 0, first
        while chunk:
            for record, result in _score_chunk(network, chunk, tokens_per_pack):
                if isinstance(result, RecordError):
                    refused.append({"code": result.code, "message": result.message})
                else:
                    accuracy.add(record, result)
                done += 1
            update(done, None)
            chunk = list(islice(rows, CHUNK))
    if not accuracy.num_preferences:
        reasons = refused[0]["message"] if refused else "it has no rows"
        raise DataError(f"{data}: no preference could be evaluated; {reasons}")
    report = {**accuracy.report(), "refused": refused}
    Console().print(_table(report))
    for row in refused[:10]:
        Console(stderr=True).print(f"refused: {row['message']} ({row['code']})", markup=False, soft_wrap=True)
    if len(refused) > 10:
        Console(stderr=True).print(f"... and {len(refused) - 10} more; --json lists them all", markup=False)
    if json_out is not None:
        json_out.write_text(json.dumps(report, indent=2) + "\n")


def _score_chunk(network, chunk, tokens_per_pack) -> Iterator[tuple[Record | str | None, object]]:
    """(record, rewards) or (record or id, RecordError), in order."""
    records = [row for row in chunk if isinstance(row, Record)]
    results = iter(score_records(network, records, tokens_per_pack))
    for row in chunk:
        yield (row, next(results)) if isinstance(row, Record) else row


def _score_row(record, result) -> dict:
    name = record.id if isinstance(record, Record) else record
    if isinstance(result, RecordError):
        return {"id": name, "rewards": None, "error": f"{result.code}: {result.message}"}
    return {"id": name, "rewards": result}


def _table(report: dict) -> Table:
    table = Table(title="Pair accuracy (equal rewards count as wrong)")
    for name in ("source", "pairs", "accuracy", "95 % interval"):
        table.add_column(name, justify="left" if name == "source" else "right")
    sources = list(report["sources"].items())
    for source, row in [*sources, ("all", report)] if len(sources) > 1 else [("all", report)]:
        low, high = row["interval"]
        table.add_row(source, f"{row['preferences']:,}", f"{row['accuracy']:.4f}", f"{low:.4f} - {high:.4f}")
    return table
