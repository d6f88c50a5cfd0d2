"""The command `fastrm eval`: models on a file of preferences or on a benchmark, or a file of scores on a benchmark."""

from collections.abc import Sequence
from pathlib import Path

from fastrm.data.record import Record
from fastrm.errors import ConfigError, DataError, RecordError
from fastrm.evaluate.benchmarks.benchmark import PREFIX, Benchmark, load_benchmark, read_scores
from fastrm.evaluate.benchmarks.report import Evaluation, comparison_table, draw, figures_table
from fastrm.evaluate.ensemble import Ensemble, Rewards
from fastrm.evaluate.files import Load, describe, evaluate_file, print_refused
from fastrm.evaluate.judged import Judged, side_by_side
from fastrm.evaluate.merging import score_merged
from fastrm.evaluate.models import open_models
from fastrm.evaluate.options import ModelChoice, Outputs, ScoringOptions
from fastrm.evaluate.report_page import evaluation_page
from fastrm.evaluate.scoring import CHUNK
from fastrm.json_files import to_json
from fastrm.limits import MediaLimits
from fastrm.storage import check_output, whole_file, write_whole
from fastrm.ui import Display, make_console, print_table


def evaluate(
    choice: ModelChoice,
    data: str,
    options: ScoringOptions,
    outputs: Outputs,
    *,
    bench_data: str | None,
    scores: Path | None,
) -> None:
    """Evaluate models on a file of preferences or on a benchmark, or a file of scores on a benchmark.

    Raises:
        ConfigError: for options that do not go together, and as the evaluations.
        DataError, StorageError: as the evaluations.
    """
    if not data.startswith(PREFIX):
        for option, value in (("--scores", scores), ("--data", bench_data), ("--png", outputs.png)):
            if value is not None:
                raise ConfigError(f"{option} is for a benchmark; got {data} as the last argument, wanted bench:NAME")
        evaluate_file(choice, data, outputs, options)
        return
    if options.rows.data_format != "auto":
        raise ConfigError(f"--format is for preferences of your own; {data} has its published layout")
    if options.rows.columns or options.rows.ignore:
        raise ConfigError(f"--columns and --ignore are for preferences of your own; {data} has its published layout")
    if scores is None:
        evaluate_benchmark(choice, data, bench_data, options, outputs)
        return
    if choice != ModelChoice() or options.rows.images is not None:
        raise ConfigError("--scores takes the place of models; leave them and their options out")
    measure_scores(scores, data, bench_data, outputs)


def evaluate_benchmark(
    choice: ModelChoice, name: str, data: str | None, options: ScoringOptions, outputs: Outputs
) -> None:
    """Score a benchmark's rows and show its metrics.

    Raises:
        ConfigError, StorageError: for models or outputs that cannot be used.
        DataError: for a benchmark that cannot be read, or, after everything is written, if some rows could
            not be scored.
    """
    choice.check()
    outputs.check()
    if choice.compare and outputs.png is not None:
        raise ConfigError("--png draws one model; leave it out of --compare, whose --report has pictures of both")
    if choice.save is not None:
        check_output(choice.save)
    with Display() as display:
        evaluation = run_benchmark(lambda: open_models(choice, options, display), name, data, options, display)
    compared = [Evaluation(evaluation.benchmark, *member, evaluation.refused) for member in evaluation.members]
    _finish(compared if choice.compare else [evaluation], outputs, options.limits)


def run_benchmark(load: Load, name: str, data: str | None, options: ScoringOptions, display: Display) -> Evaluation:
    """Score a benchmark's rows with the models that `load` gives.

    Raises:
        ConfigError, StorageError: for models that cannot be used.
        DataError: for a benchmark that cannot be read, or of which no row could be scored.
    """
    benchmark = load_benchmark(name, data, options.rows.images)
    records = benchmark.records
    ensemble = load()
    results = score_rows(ensemble, records, options, display)
    rewards = {row: result for row, result in enumerate(results) if isinstance(result, Rewards)}
    refused = {
        row: f"{records[row].origin}: {result.message} ({result.code})"
        for row, result in enumerate(results)
        if isinstance(result, RecordError)
    }
    if not rewards:
        raise DataError(f"bench:{benchmark.name}: none of its {len(records):,} rows could be scored; {refused[0]}")
    members = [
        (name, {row: result.members[place] for row, result in rewards.items()})
        for place, name in enumerate(ensemble.names)
    ]
    return Evaluation(
        benchmark, " + ".join(ensemble.names), {row: result.combined for row, result in rewards.items()}, refused,
        members if len(members) > 1 else [], describe(ensemble),
    )  # fmt: skip


def score_rows(
    ensemble: Ensemble, records: Sequence[Record], options: ScoringOptions, display: Display
) -> list[Rewards | RecordError]:
    """Score every row and return its rewards; rows of one prompt are scored as one group."""

    def score(groups: Sequence[Record]) -> list[Rewards | RecordError]:
        update, results = display.task("scoring"), []
        for start in range(0, len(groups), CHUNK):
            chunk = groups[start : start + CHUNK]

            def progress(done: int, total: int, start: int = start, size: int = len(chunk)) -> None:
                update(start + size * done // total, len(groups))

            results += ensemble.score_records(chunk, options.tokens_per_pack, options.num_workers, progress)
        return results

    return score_merged(score, Rewards.take, records)


def measure_scores(scores: Path, name: str, data: str | None, outputs: Outputs) -> None:
    """Show a benchmark's metrics for rewards from elsewhere; needs no model, image or text.

    Raises:
        StorageError: for outputs that cannot be made.
        DataError: for a benchmark or scores that cannot be read.
    """
    outputs.check()
    benchmark = load_benchmark(name, data)
    rewards = dict(enumerate(read_scores(scores, benchmark)))
    evaluation = Evaluation(benchmark, scores.stem, rewards, settings={"scores_file": str(scores)})
    _finish([evaluation], outputs, MediaLimits())


def _finish(evaluations: Sequence[Evaluation], outputs: Outputs, limits: MediaLimits) -> None:
    """Show and write the figures of one evaluation, or of two that are compared."""
    console, evaluation = make_console(), evaluations[0]
    names, benchmark, refused = [one.name for one in evaluations], evaluation.benchmark, evaluation.refused
    for one in evaluations:
        for table in (figures_table(one), comparison_table(one)):
            print_table(console, table)
    figures = evaluation.to_json()
    if outputs.report is not None or len(evaluations) > 1:
        judged = Judged(len(evaluations))
        for row in sorted(evaluation.rewards):
            rewards = [one.rewards[row] for one in evaluations]
            judged.add(benchmark.records[row], rewards, benchmark.rows[row].category)
        if len(evaluations) > 1:
            print_table(console, side_by_side(judged, names))
            figures = {"models": [one.to_json() for one in evaluations], "comparison": judged.comparison()}
        if outputs.report is not None:
            text = evaluation_page(judged, names, f"bench:{benchmark.name}", limits, len(refused))
            write_whole(outputs.report, text)
    if outputs.json is not None:
        with whole_file(outputs.json) as write:
            write(to_json(figures, indent=1) + "\n")
    if outputs.png is not None:
        draw(evaluation, outputs.png)
    if refused:
        print_refused(list(refused.values()), "--json lists them all")
        raise DataError(_partial(benchmark, evaluation))


def _partial(benchmark: Benchmark, evaluation: Evaluation) -> str:
    return (
        f"bench:{benchmark.name}: partial result over {len(evaluation.rewards):,} of {len(benchmark.rows):,} rows; "
        f"{len(evaluation.refused):,} could not be scored and the figures are not comparable with published ones; "
        "the rows are named above: name their images with --images, or raise --tokens-per-pack"
    )
