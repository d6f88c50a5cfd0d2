"""The command `fastrm eval` of a judge:SPEC, or of a critic's or judge's folder: its figures on preferences."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path

from fastrm.data.paradigm import TextReading
from fastrm.data.record import Record
from fastrm.errors import ConfigError, DataError, InterruptedRun, option
from fastrm.evaluate.benchmarks.benchmark import PREFIX as BENCHMARK
from fastrm.evaluate.benchmarks.benchmark import Benchmark, load_benchmark
from fastrm.evaluate.benchmarks.report import figures_table as benchmark_table
from fastrm.evaluate.files import print_refused
from fastrm.evaluate.options import JudgeTexts, RowOptions, ScoringOptions
from fastrm.evaluate.reading import read_in_order
from fastrm.json_files import to_json
from fastrm.judge.benchmarked import measure_benchmark
from fastrm.judge.critics import describe_critiques, read_rewards, scorer_of
from fastrm.judge.generations import Generation, given_critiques, read_generations
from fastrm.judge.metrics import Said, describe_texts, measure, read_verdicts
from fastrm.judge.questions import JudgeQuestion, Refusal, make_questions
from fastrm.judge.report import complain, figures_table
from fastrm.judge.store import GenerationStore
from fastrm.model.loading import shortened
from fastrm.model.paradigms import is_writer, stored_paradigm
from fastrm.prompts.spec import PREFIX, JudgeSpec, load_spec
from fastrm.storage import whole_file
from fastrm.ui import Display, make_console, message, print_table
from fastrm.yaml_files import validate


@dataclass(frozen=True)
class JudgeOptions:
    """The options of a judge.

    Attributes:
        rows: the ways to read the data.
        texts: what it wrote, or the place of what it writes.
        bench_data: the folder of a benchmark's files; None: from the hub.
        json_out: the file to write the figures to, or None.
        scoring: the settings of a critic's scorer, but for the rows; device and dtype are those of a model that writes
            here too.
    """

    rows: RowOptions
    texts: JudgeTexts
    bench_data: str | None = None
    json_out: Path | None = None
    scoring: ScoringOptions = field(default_factory=ScoringOptions)


def evaluate_judge(models: Sequence[str], data: str, options: JudgeOptions) -> None:
    """Print the figures of a judge, from texts that are there or that it writes now; optionally write them as JSON.

    Args:
        models: one judge:SPEC, or the folder of a critic or judge that fastrm trained.

    Raises:
        ConfigError: for a SPEC that cannot be used, or options that do not go together.
        ServerError: for a server that gives no answer; texts that came before are kept.
        InterruptedRun: where it was stopped; texts are kept.
        DataError: for data or generations that cannot be read, or, after everything is written, if a line of the
            generations could not be used or a preference was not judged.
    """
    name, spec = choose(models, options.texts)
    refuse_unused(models[0], spec, options)
    refused: list[str] = []
    with whole_file(options.json_out) if options.json_out is not None else nullcontext() as write:
        with Display() as display:
            benchmark = _benchmark(data, options)
            records = _records(data, benchmark, options, spec, refused)
            report = {"judge": name, "data": data}
            found = list(_texts(name, spec, records, options, refused, display))
            if spec.kind == "critic":
                said = read_rewards(spec, records, found, options.scoring, display, refused)
                report |= measure(spec, records, said) | describe_critiques(spec, found)
            else:
                said, released = (read_verdicts(spec, found, as_released=rule) for rule in (False, True))
                report |= measure(spec, records, said, released) | describe_texts(found)
        if report["accuracy"] is None and not report["rewards"]:
            place = options.texts.written or data
            reason = refused[0] if refused else f"{place} has no text about one of its {len(records):,} rows"
            raise DataError(f"{data}: no preference was judged; {reason}")
        report["refused"] = refused
        print_table(make_console(), figures_table(report))
        if benchmark is not None:
            report |= _of_benchmark(spec, benchmark, records, said, report["rewards"])
        if write is not None:
            write(to_json(report, indent=2) + "\n")
    print_refused(refused, "--json lists them all")
    complain(report, options.json_out)


def _of_benchmark(spec: JudgeSpec, benchmark: Benchmark, records: Sequence[Record], said: Said, rewards: list) -> dict:
    """Return a benchmark's own figures, and print them."""
    figures, evaluation = measure_benchmark(spec, benchmark, records, said, rewards)
    if evaluation is not None:
        print_table(make_console(), benchmark_table(evaluation))
    else:
        message(make_console(), f"{benchmark.title}: {figures['metrics_note']}")
    return figures


def choose(models: Sequence[str], texts: JudgeTexts) -> tuple[str, JudgeSpec]:
    """Return the name of a judge or critic, and its SPEC with the settings of the command line.

    Raises:
        ConfigError: for more than one, a SPEC that cannot be used, or one that has no texts.
    """
    if len(models) != 1:
        alone = next(name for name in models if name.startswith(PREFIX) or is_writer(name))
        others = ", ".join(name for name in models if name != alone) or "itself"
        raise ConfigError(f"{alone} is evaluated alone; got {others} beside it: run the command for each")
    texts.check()
    if models[0].startswith(PREFIX):
        name = models[0].removeprefix(PREFIX)
        spec = load_spec(name)
    else:  # a folder
        name = models[0]
        tree = stored_paradigm(name)["spec"] | {"generator": {"model": name}}
        spec = validate(JudgeSpec, tree, {}, f"{name}/config.json")
    given = {"max_tokens": texts.max_tokens, "temperature": texts.temperature}
    tree = spec.model_dump()
    tree["decoding"] |= {key: value for key, value in given.items() if value is not None}
    spec = validate(JudgeSpec, tree | ({} if texts.votes is None else {"votes": texts.votes}), {}, models[0])
    if texts.given and spec.kind != "critic":
        raise ConfigError(f"--given-critiques is for a critic; {models[0]} is a {spec.kind} judge")
    if spec.generator is None and texts.written is None and not texts.given:
        raise ConfigError(
            f"{models[0]}: it names no generator; add one in a YAML file with extends: {name} (docs/judges.md), or "
            "name texts that it wrote: --from generations.jsonl"
        )
    if spec.generator is None and texts.max_tokens is not None:
        raise ConfigError(f"--max-tokens: of no use for texts of a SPEC that names no generator; got {models[0]}")
    fixed = {} if spec.generator is None else spec.generator.extra_body
    of_server = {"max_tokens": ("max_tokens", "max_completion_tokens"), "temperature": ("temperature",)}
    for setting, fields in of_server.items():
        if given[setting] is not None and (named := [one for one in fields if one in fixed]):
            said = f"since the SPEC's generator.extra_body says {named[0]}: change it there"
            raise ConfigError(f"--{setting.replace('_', '-')}: of no use, {said}")
    if spec.kind == "critic":
        scorer_of(spec)  # before texts are written for it
    return name, spec


def refuse_unused(name: str, spec: JudgeSpec, options: JudgeOptions) -> None:
    """Refuse settings of models that score for a judge, which has none.

    Raises:
        ConfigError: naming the options.
    """
    if spec.kind == "critic":
        return
    writes_here = options.texts.written is None and spec.generator.url is None
    used = {"rows", "limits"} | ({"device", "dtype"} if writes_here else set())
    used |= {"max_image_pixels", "max_image_bytes"} if options.texts.written is None else set()
    usual, given = ({**vars(one), **vars(one.limits)} for one in (ScoringOptions(), options.scoring))
    if unused := [option(key) for key in given if given[key] != usual[key] and key not in used]:
        where = "a judge that writes here" if writes_here else "texts that are written elsewhere"
        raise ConfigError(f"{', '.join(unused)}: of no use for {where}; got {name}: leave them out")


def _texts(
    name: str, spec: JudgeSpec, records: Sequence[Record], options: JudgeOptions, refused: list[str], display: Display
) -> Iterable[Generation]:
    """Return texts about records: those of the rows, those of a file, or new ones."""
    texts = options.texts
    if texts.given:
        return given_critiques(records)
    if texts.written is not None:
        by_key = spec.generator is not None
        lines = read_generations(texts.written, records, len(spec.shown), refused, by_key=by_key)
        read = display.count("reading", lines)
        return _current(spec, records, list(read), refused)
    place = Path(name)
    stem = place.resolve().parent.name if place.name == "model" else place.stem  # a run's folder is runs/NAME/model
    file = texts.generations or Path("runs", "judges", f"{stem}.jsonl")
    return generate(spec, records, file, options.scoring, display, refused)


def _current(
    spec: JudgeSpec, records: Sequence[Record], read: Sequence[Generation], refused: list[str]
) -> list[Generation]:
    """Return the texts that answer what a SPEC asks about records; texts without a key are taken as they are.

    A file in which fastrm kept texts may hold those of older SPECs, models and rows too, which would count as votes.
    They are added to `refused`.

    Raises:
        DataError: of a SPEC without a generator, which cannot tell them apart, for more texts than votes.
    """
    found = [one for one in read if not one.key]
    if spec.generator is None:
        once = {(one.id, one.order, one.key): one for one in read if one.key}
        counts = Counter((one.id, one.order) for one in once.values())
        for one in once.values():
            if (count := counts[one.id, one.order]) > spec.votes:
                raise DataError(
                    f"{one.origin}: row {one.id!r} has {count:,} texts that fastrm kept in the order "
                    f"{list(one.order)}, and the judge has {spec.votes:,} vote(s): some are of older SPECs, models or "
                    "rows; name the SPEC with the generator that wrote them, or give the --votes and --temperature of "
                    "the run"
                )
        return [*found, *once.values()]
    kept = {one.key: one for one in read if one.key}
    taken: set[tuple] = set()
    # A row that cannot be shown here may have been judged by another program.
    judged_elsewhere, unshown = {one.id for one in found}, {}
    for questions in rounds(spec, records, found, unshown) if kept else ():
        # In the order of the questions, as `generate` has them: the figures of a file are to the bit those of the run.
        asked = dict.fromkeys((one.id, one.order, one.key) for one in questions if one.key in kept)
        new = [text for text in asked if text not in taken]
        if not new:  # as where a bracket's next round was not kept
            break
        taken.update(new)
        found += [replace(kept[key], id=name, order=order) for name, order, key in new]
    refused += [reason for name, reason in unshown.items() if name not in judged_elsewhere]
    current = {key for _, _, key in taken}
    refused += [
        f"{one.origin}: left out: not asked by this SPEC about these rows, but of another SPEC, model, option or row"
        for one in read if one.key and one.key not in current
    ]  # fmt: skip
    return found


def generate(
    spec: JudgeSpec, records: Sequence[Record], path: Path, options: ScoringOptions, display: Display,
    refused: list[str],
) -> list[Generation]:  # fmt: skip
    """Return what a judge writes about records; what the file has already is not written again.

    Args:
        options: whose device and dtype are those of a model that writes here.
        refused: takes the reasons for rows that the judge cannot be shown, and for questions that have no text; others
            are asked all the same.

    Raises:
        ConfigError, DataError: for a model or template that cannot be used.
        ServerError: for a server that gives no answer.
        InterruptedRun: where it was stopped. In each case the file keeps the texts so far.
    """
    store = GenerationStore(path)
    found, asked, writer, unshown = [], set(), None, {}
    try:
        for questions in rounds(spec, records, found, unshown):
            new = [one for one in questions if (one.id, one.order, one.key) not in asked]
            if not new:  # a bracket whose round has a refused question asks it for ever
                break
            asked.update((one.id, one.order, one.key) for one in new)
            missing, total = store.missing(new), len({one.key for one in new})
            if done := total - len(missing):
                display.say(f"{done:,} of {total:,} texts are in {path} already")
            if missing:
                writer, update = writer or make_writer(spec, options), display.task("writing")
                for number, written in enumerate(writer.write(missing), done + 1):
                    if isinstance(written, Refusal):
                        refused.append(written.message)
                    else:
                        store.add(written)
                    update(number, total)
            found += store.generations(new)
        refused += unshown.values()
        return found
    except KeyboardInterrupt:
        raise InterruptedRun(f"stopped; {path} keeps the texts so far: run the command again to go on") from None
    finally:
        store.close()


def rounds(
    spec: JudgeSpec, records: Sequence[Record], found: Sequence[Generation], refused: dict[str, str] | None = None
) -> Iterator[list[JudgeQuestion]]:
    """Yield the questions about records: all at once, or those of a bracket round by round.

    Args:
        found: what was written so far; a bracket's next round is made of it.
        refused: as of `make_questions`.

    Raises:
        ConfigError, DataError: as `make_questions`.
    """
    questions = list(make_questions(spec, records, refused=refused))
    while questions:
        yield questions
        is_bracket = spec.order == "bracket"
        said = read_verdicts(spec, found) if is_bracket else {}
        questions = list(make_questions(spec, records, said, refused)) if is_bracket else []


def make_writer(spec: JudgeSpec, options: ScoringOptions):
    """Return the writer of a SPEC's texts: `LocalModel` or `Endpoint`.

    Args:
        options: as for `generate`; the images that it is shown are within its limits.

    Raises:
        ConfigError: for a model or URL that cannot be used.
    """
    if spec.generator.url is not None:
        if find_spec("httpx") is None:
            raise ConfigError('generator.url needs httpx, which is not installed: pip install "fastrm[rl]"')
        from fastrm.judge.endpoint import Endpoint

        return Endpoint(spec.generator, spec.decoding, options.limits)
    from fastrm.judge.local import LocalModel

    return LocalModel(spec.generator, spec.decoding, options.device, options.dtype, options.limits)


def _benchmark(data: str, options: JudgeOptions) -> Benchmark | None:
    """Return the benchmark that is named in place of a file; None for a file.

    Raises:
        ConfigError: with --given-critiques.
        DataError: if it cannot be read.
    """
    if not data.startswith(BENCHMARK):
        return None
    if options.texts.given:
        raise ConfigError(f"--given-critiques: got {data}, wanted a file of preferences whose rows hold critiques")
    return load_benchmark(data, options.bench_data, options.rows.images)


def _records(
    data: str, benchmark: Benchmark | None, options: JudgeOptions, spec: JudgeSpec, refused: list[str]
) -> list[Record]:
    """Return the rows of a file or of a benchmark.

    Raises:
        DataError: if none can be read, or two have one id, so that it cannot be said which one a text is about.
    """
    if benchmark is not None:
        return list(_numbered(benchmark.records))
    if options.texts.given:
        return _with_critiques(data, options, spec, refused)
    records = list(_rows(data, options.rows, refused, may_be_bare=spec.gives_rewards))
    repeated = [name for name, count in Counter(record.id for record in records).items() if count > 1]
    if repeated:
        raise DataError(
            f"{data}: {len(repeated):,} ids stand in several rows, so that a text cannot be told to belong to one: "
            f"{shortened(repeated)}; give each row an id of its own"
        )
    return records


def _with_critiques(data: str, options: JudgeOptions, spec: JudgeSpec, refused: list[str]) -> list[Record]:
    """Return the rows of a file with the critiques that they hold, which need no ids to be told apart."""
    reading = TextReading("critic", spec.prompt, spec.system, missing="empty")
    return list(_numbered([record.original for record in _rows(data, options.rows, refused, reading)]))


def _rows(
    data: str, rows: RowOptions, refused: list[str], reading: TextReading | None = None, *, may_be_bare: bool = False
) -> Iterator[Record]:
    """Yield the rows of a file.

    Args:
        may_be_bare: a row without preferences is read as for scoring, with the responses alone.
    """
    options = {"columns": rows.columns, "ignore": rows.ignore, "reading": reading}
    stated, bare = (
        read_in_order(data, rows.images, rows.data_format, require_preferences=wanted, **options)
        for wanted in (True, False)
    )
    for row, responses in zip(stated, bare if may_be_bare else repeat(None)):  # noqa: B905
        is_bare = not isinstance(row, Record) and row[1].code == "NO_PREFERENCE"
        if is_bare and may_be_bare:
            row = responses
        if isinstance(row, Record):
            yield row
        else:
            hint = "; with order: round_robin or bracket a judge takes it" if is_bare and reading is None else ""
            refused.append(f"{row[1].message} ({row[1].code}){hint}")


def _numbered(records: Sequence[Record]) -> Iterator[Record]:
    """Yield a benchmark's rows; where one repeats an id, as published files do, its number follows: a, a#2, a#3."""
    seen: Counter[str] = Counter()
    for record in records:
        seen[record.id] += 1
        number = seen[record.id]
        yield record if number == 1 else replace(record, id=f"{record.id}#{number}")
