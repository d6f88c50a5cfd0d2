"""The commands `fastrm score` and `fastrm eval` on data files: rewards, or pair accuracy."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

from fastrm.data.record import Record
from fastrm.data.sources import source_files, unread_lines
from fastrm.data.sources.columns import understood
from fastrm.data.sources.in_memory import Rows
from fastrm.errors import DataError, RecordError
from fastrm.evaluate.accuracy import PairAccuracy
from fastrm.evaluate.ensemble import Ensemble, Rewards
from fastrm.evaluate.judged import Judged, side_by_side
from fastrm.evaluate.models import open_models
from fastrm.evaluate.options import ModelChoice, Outputs, ScoringOptions
from fastrm.evaluate.reading import read_in_order
from fastrm.evaluate.report_page import evaluation_page
from fastrm.evaluate.scoring import CHUNK, NON_FINITE, refuse_non_finite
from fastrm.json_files import to_json
from fastrm.model.loading import shortened
from fastrm.storage import check_output, whole_file
from fastrm.tables import Table
from fastrm.ui import Display, make_console, message, print_table

# The most refused rows that are named on the screen; files name all.
_NAMED = 10

Load = Callable[[], Ensemble]
Scored = tuple[Record | str | None, Rewards | RecordError]


def score_file(choice: ModelChoice, data: str, out: Path, options: ScoringOptions) -> None:
    """Write one line {"id", "rewards"} per group, in input order; several models add "members".

    A refused group has "rewards": null and "error": {"code", "message"}. The file appears under its name when complete.

    Raises:
        ConfigError, DataError, StorageError: for a model, data or output that cannot be used.
        DataError: after everything is written, if no group has rewards or a reward was not finite.
    """
    choice.check()
    if choice.save is not None:
        check_output(choice.save)
    refused: list[str] = []
    broken: list[str] = []
    ids: Counter[str] = Counter()
    done = 0
    with whole_file(out) as write, Display() as display:
        scoring = Scoring(lambda: open_models(choice, options, display), data, options, display, "scoring")
        for record, result in scoring.run(require_preferences=False):
            row = _score_row(record, result)
            write(to_json(row) + "\n")
            done += 1
            ids.update([] if row["id"] is None else [row["id"]])
            if isinstance(result, RecordError):
                named = f"{record.origin}: {result.message}" if isinstance(record, Record) else result.message
                refused.append(named)
                broken += [named] if result.code == NON_FINITE else []
    console = make_console(stderr=True)
    groups = "1 group" if done == 1 else f"{done:,} groups"
    message(console, f"{groups}: {done - len(refused):,} scored, {len(refused):,} refused; {out}")
    if repeated := [name for name, number in ids.items() if number > 1]:
        named = shortened(repeated)
        message(console, f"ids of several lines in {out}: {named}; join by the number of the line, or mend the ids")
    if broken:
        raise DataError(f"{len(broken):,} of {done:,} groups have a reward that is not finite; {broken[0]}")
    if len(refused) == done:
        raise DataError(f"{data}: no group has rewards; first: {refused[0]}; {out} has the reason of each")


def evaluate_file(choice: ModelChoice, data: str, outputs: Outputs, options: ScoringOptions) -> None:
    """Print pair accuracy overall and per source; optionally write it as JSON and as a page.

    Raises:
        ConfigError, DataError, StorageError: for a model, data or output that cannot be used.
    """
    choice.check()
    judged = Judged(2 if choice.compare else 1) if choice.compare or outputs.report is not None else None
    # The outputs are opened before the work, so that a wrong name fails at once.
    with ExitStack() as files:
        figures, html = (path and files.enter_context(whole_file(path)) for path in (outputs.json, outputs.report))
        if choice.save is not None:
            check_output(choice.save)
        with Display() as display:
            report = measure_file(lambda: open_models(choice, options, display), data, options, display, judged)
        names = report["models"]
        print_table(make_console(), side_by_side(judged, names) if choice.compare else _table(report))
        print_refused([f"{row['message']} ({row['code']})" for row in report["refused"]], "--json lists them all")
        if figures is not None:
            if choice.compare:
                kept = {name: report[name] for name in ("members", "refused")}
                report = {"models": names, "comparison": judged.comparison(), **kept}
            figures(to_json(report, indent=2) + "\n")
        if html is not None:
            html(evaluation_page(judged, names, data, options.limits, len(report["refused"])))


class Scoring:
    """A pass of the models over a data file, chunk by chunk.

    Args:
        load: gives the models, when the data has been opened.

    Attributes:
        ensemble: the models, once the first row has been scored.
    """

    def __init__(self, load: Load, data: str | Rows, options: ScoringOptions, display: Display, description: str):
        self.ensemble: Ensemble | None = None
        self._load, self._data, self._options = load, data, options
        self._display, self._update = display, display.task(description, is_brief=True)

    def run(self, *, require_preferences: bool) -> Iterator[Scored]:
        """Yield (record, rewards), or (record or id, RecordError), for each row in order."""
        asked, keys = self._options.rows, {}
        reading = {"columns": asked.columns, "ignore": asked.ignore}
        files = source_files(self._data, images=asked.images, format=asked.data_format, **reading)
        for file in files:
            if (line := understood(file.requiring(require_preferences))) is not None:
                self._display.say(line)
        rows = read_in_order(
            self._data, asked.images, asked.data_format, require_preferences=require_preferences, keys=keys, **reading
        )
        # The data is opened before the models are loaded, so that an unreadable file fails at once.
        chunk, done, total = list(islice(rows, CHUNK)), 0, sum(file.count_rows() for file in files)
        if not chunk:
            raise DataError(f"{self._data}: it has no rows; name a file with a row for each prompt")
        self.ensemble = self._load()
        while chunk:
            yield from self._score(chunk, done, total)
            done += len(chunk)
            chunk = list(islice(rows, CHUNK))
        for line in unread_lines(keys):
            self._display.say(line)

    def _score(self, chunk: list, before: int, total: int) -> Iterator[Scored]:
        def progress(done: int, of: int) -> None:
            self._update(before + len(chunk) * done // of, total)

        options, records = self._options, [row for row in chunk if isinstance(row, Record)]
        results = iter(self.ensemble.score_records(records, options.tokens_per_pack, options.num_workers, progress))
        for row in chunk:
            yield (row, next(results)) if isinstance(row, Record) else row


def measure_file(
    load: Load, data: str | Rows, options: ScoringOptions, display: Display, judged: Judged | None = None
) -> dict:
    """Return pair accuracy overall and per source, as `fastrm eval --json` writes it.

    Args:
        judged: takes every preference, by the two models that it compares, or by all as one.

    Raises:
        ConfigError, DataError, StorageError: for a model or data that cannot be used.
    """
    scoring = Scoring(load, data, options, display, "evaluating")
    accuracy, members, refused = PairAccuracy(), [], []
    for record, result in scoring.run(require_preferences=True):
        if isinstance(result, RecordError):
            message = result.message  # the message of a row that is no record names its place already
            if isinstance(record, Record):
                refuse_non_finite(record.origin, result)
                message = f"{record.origin}: {message}"
            refused.append({"code": result.code, "message": message})
            continue
        accuracy.add(record, result.combined)
        if judged is not None:
            judged.add(record, result.members if judged.num_models > 1 else [result.combined])
        members = members or [PairAccuracy() for _ in result.members]
        for member, rewards in zip(members, result.members, strict=True):
            member.add(record, rewards)
    if not accuracy.num_scored:
        reason = refused[0]["message"] if refused else "all are ties"
        raise DataError(f"{data}: no preference could be evaluated; {reason}")
    report = {**accuracy.report(), **describe(scoring.ensemble), "refused": refused}
    if len(members) > 1:
        named = zip(scoring.ensemble.names, members, strict=True)
        report["members"] = [{"model": name, **member.report()} for name, member in named]
    return report


def print_refused(messages: Sequence[str], where: str) -> None:
    """Name the first refused rows on standard error; `where` has all of them."""
    console = make_console(stderr=True)
    for text in messages[:_NAMED]:
        message(console, f"refused: {text}")
    if len(messages) > _NAMED:
        message(console, f"... and {len(messages) - _NAMED} more; {where}")


def describe(ensemble: Ensemble) -> dict:
    """Describe the models behind the figures, for JSON."""
    return {
        "models": ensemble.names,
        "combine": ensemble.combine if len(ensemble.members) > 1 else None,
        "weights": ensemble.weights,
        "route": None if ensemble.text is None else {"text": ensemble.text_name},
    }


def _score_row(record: Record | str | None, result: Rewards | RecordError) -> dict:
    name = record.id if isinstance(record, Record) else record
    if isinstance(result, RecordError):
        return {"id": name, "rewards": None, "error": {"code": result.code, "message": result.message}}
    members = {"members": result.members} if len(result.members) > 1 else {}
    return {"id": name, "rewards": result.combined, **members}


def _table(report: dict) -> Table:
    members = report.get("members", [])
    reasons = Counter(row["code"] for row in report["refused"])
    caption = [f"{number} {member['model']}" for number, member in enumerate(members, 1)]
    if reasons:
        caption.append(f"rows not counted: {', '.join(f'{code} {number:,}' for code, number in reasons.most_common())}")
    # Names of models are long: numbers stand for them.
    table = Table(
        "source", "preferences", "ensemble" if members else "accuracy", "95 % interval",
        *map(str, range(1, len(members) + 1)),
        title="Pair accuracy (equal rewards count as wrong)", caption="\n".join(caption),
    )  # fmt: skip
    sources = list(report["sources"])
    for source in [*sources, None] if len(sources) > 1 else [None]:
        rows = [part if source is None else part["sources"][source] for part in (report, *members)]
        low, high = rows[0]["interval"]
        table.add_row(
            "all" if source is None else source, f"{rows[0]['preferences']:,}", f"{rows[0]['accuracy']:.4f}",
            f"{low:.4f} - {high:.4f}", *(f"{row['accuracy']:.4f}" for row in rows[1:]),
        )  # fmt: skip
    return table
