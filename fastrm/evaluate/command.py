"""The command `fastrm eval`: a check of its arguments together, and the choice of the evaluation."""

from pathlib import Path

from fastrm.errors import ConfigError
from fastrm.evaluate.benchmarks import PREFIX
from fastrm.evaluate.benchmarks.command import Outputs, evaluate_benchmark, measure_scores
from fastrm.evaluate.files import evaluate_file
from fastrm.evaluate.models import ModelChoice, ScoringOptions


def evaluate(
    choice: ModelChoice,
    data: str,
    options: ScoringOptions,
    *,
    bench_data: str | None,
    scores: Path | None,
    json_out: Path | None,
    png_out: Path | None,
) -> None:
    """Evaluate models on a file of preferences or on a benchmark, or a file of scores on a benchmark.

    Raises:
        ConfigError: for options that do not go together, and as the evaluations.
        DataError, StorageError: as the evaluations.
    """
    if not data.startswith(PREFIX):
        for option, value in (("--scores", scores), ("--data", bench_data), ("--png", png_out)):
            if value is not None:
                raise ConfigError(f"{option} is for a benchmark; got {data} as the last argument, wanted bench:NAME")
        evaluate_file(choice, data, json_out, options)
        return
    if options.data_format != "auto":
        raise ConfigError(f"--format is for preferences of your own; {data} has its published layout")
    if options.columns or options.ignore:
        raise ConfigError(f"--columns and --ignore are for preferences of your own; {data} has its published layout")
    outputs = Outputs(json_out, png_out)
    if scores is None:
        evaluate_benchmark(choice, data, bench_data, options, outputs)
        return
    if choice != ModelChoice(()) or options.images is not None:
        raise ConfigError("--scores takes the place of models; leave them and their options out")
    measure_scores(scores, data, bench_data, outputs)
