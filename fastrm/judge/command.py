"""The command `fastrm eval judge:SPEC`: a judge's figures on preferences or on a benchmark."""

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from fastrm.data.record import Record
from fastrm.errors import ConfigError, DataError
from fastrm.evaluate.benchmarks.benchmark import PREFIX as BENCHMARK
from fastrm.evaluate.benchmarks.benchmark import load_benchmark
from fastrm.evaluate.files import print_refused
from fastrm.evaluate.options import RowOptions
from fastrm.evaluate.reading import read_in_order
from fastrm.json_files import to_json
from fastrm.judge.generations import read_generations
from fastrm.judge.metrics import measure
from fastrm.judge.spec import PREFIX, load_spec
from fastrm.model.loading import shortened
from fastrm.storage import whole_file
from fastrm.tables import Table
from fastrm.ui import Display, make_console, message, print_table


def evaluate_judge(
    models: Sequence[str], data: str, rows: RowOptions, generations: Path | None, json_out: Path | None,
    bench_data: str | None = None,
) -> None:  # fmt: skip
    """Print the figures of a judge from stored generations; optionally write them as JSON.

    Raises:
        ConfigError: for a SPEC that cannot be used, or options that do not go together.
        DataError: for data or generations that cannot be read, or, after everything is written, if a line of the
            generations could not be used or a preference was not judged.
    """
    if len(models) != 1:
        others = ", ".join(name for name in models if not name.startswith(PREFIX)) or "several judges"
        raise ConfigError(f"{PREFIX}SPEC is evaluated alone; got {others} beside it: run the command for each")
    name = models[0].removeprefix(PREFIX)
    spec = load_spec(name)
    if generations is None:
        raise ConfigError(f"{models[0]}: name the file of what it wrote: --from generations.jsonl")
    refused: list[str] = []
    with whole_file(json_out) if json_out is not None else nullcontext() as write:
        with Display() as display:
            records = _records(data, rows, bench_data, refused)
            shown = 2 if spec.kind == "pairwise" else 1
            found = read_generations(generations, records, shown, refused)
            report = {"judge": name, "data": data} | measure(spec, records, display.count("reading", found))
        if report["accuracy"] is None:
            reason = refused[0] if refused else f"{generations} has none of its {len(records):,} rows"
            raise DataError(f"{data}: no preference was judged; {reason}")
        report["refused"] = refused
        print_table(make_console(), _table(report))
        if write is not None:
            write(to_json(report, indent=2) + "\n")
    print_refused(refused, "--json lists them all")
    _complain(report, json_out)


def _records(data: str, rows: RowOptions, bench_data: str | None, refused: list[str]) -> list[Record]:
    """Return the rows of a file or of a benchmark.

    Raises:
        DataError: if none can be read, or two have one id, so that it cannot be said which one a text is about.
    """
    if data.startswith(BENCHMARK):
        records = load_benchmark(data, bench_data, rows.images).records
    else:
        records = []
        reading = {"columns": rows.columns, "ignore": rows.ignore}
        for row in read_in_order(data, rows.images, rows.data_format, require_preferences=True, **reading):
            if isinstance(row, Record):
                records.append(row)
            else:
                refused.append(f"{row[1].message} ({row[1].code})")
    repeated = [name for name, count in Counter(record.id for record in records).items() if count > 1]
    if repeated:
        raise DataError(
            f"{data}: {len(repeated):,} ids stand in several rows, so that a text cannot be told to belong to one: "
            f"{shortened(repeated)}; give each row an id of its own"
        )
    return records


def _complain(report: dict, json_out: Path | None) -> None:
    """Name what the figures leave out.

    Raises:
        DataError: if anything is.
    """
    reasons = []
    if report["missing"]:
        reasons.append(f"{len(report['missing']):,} preferences were not judged: {shortened(report['missing'])}")
    if report["refused"]:
        reasons.append(f"{len(report['refused']):,} lines or rows could not be used")
    if report["preferences_in_one_order"]:
        console = make_console(stderr=True)
        message(console, f"{report['preferences_in_one_order']:,} preferences were judged in one order only")
    if reasons:
        where = "" if json_out is None else f"; {json_out} names all"
        raise DataError(f"partial result over {report['preferences']:,} preferences: {'; '.join(reasons)}{where}")


def _table(report: dict) -> Table:
    def share(value: float | None) -> str:
        return "none" if value is None else f"{value:.4f}"

    low, high = report["interval"] or (None, None)
    table = Table("figure", "value", title=f"Judge {report['judge']} on {report['preferences']:,} preferences")
    table.add_row("accuracy, both orders, failures wrong", share(report["accuracy"]))
    table.add_row("its 95 % interval", "none" if low is None else f"{low:.4f} - {high:.4f}")
    table.add_row("accuracy as released (winner shown first)", share(report["accuracy_as_released"]))
    table.add_row("verdicts that turn when the order turns", share(report["position_flip_rate"]))
    table.add_row("verdicts for what is shown first", share(report["first_place_rate"]))
    table.add_row("ties", f"{report['ties']:,}")
    table.add_row("texts without a verdict", f"{report['num_parse_failures']:,} of {report['num_generations']:,}")
    if len(report["sources"]) > 1:
        table.add_section()
        for source, figures in report["sources"].items():
            table.add_row(f"accuracy on {source} ({figures['preferences']:,})", share(figures["accuracy"]))
    return table
