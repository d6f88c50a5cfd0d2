"""The functions `fastrm.train` and `fastrm.evaluate`: runs and figures from Python, in scripts and notebooks.

They do what the commands of these names do, by the same code, and raise the errors of `fastrm.errors` where those end
with an exit code.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fastrm.config import Config, load_config
from fastrm.data.sources.in_memory import NAME, Rows, RowsLike, is_table, write_rows
from fastrm.errors import ConfigError, quiet_libraries
from fastrm.evaluate.benchmarks.benchmark import PREFIX
from fastrm.evaluate.command import run_benchmark
from fastrm.evaluate.ensemble import Ensemble
from fastrm.evaluate.files import measure_file
from fastrm.evaluate.models import open_models
from fastrm.evaluate.options import ModelChoice, RowOptions, ScoringOptions
from fastrm.evaluate.reward_model import RewardModel
from fastrm.evaluate.table import EvaluationTable, benchmark_table, preference_table
from fastrm.ui import Display

AnyModel: TypeAlias = str | os.PathLike[str] | RewardModel | Ensemble | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class TrainedRun:
    """A run that is finished.

    Attributes:
        folder: of the run, with model/, metrics.jsonl, report.png and the checkpoints.
        metrics: the content of its summary.json.
    """

    folder: Path
    metrics: dict[str, Any]

    @property
    def model_folder(self) -> Path:
        """The folder of the exported reward model."""
        return self.folder / "model"

    @property
    def accuracy(self) -> float | None:
        """The pair accuracy on data.eval after the last step; None without data.eval."""
        return self.metrics["eval_accuracy"]

    def load(self, **options: Any) -> RewardModel:
        """Load the reward model; `options` are those of `RewardModel.from_pretrained`."""
        return RewardModel.from_pretrained(self.model_folder, **options)


def train(
    config: str | os.PathLike[str] | Mapping[str, Any], *overrides: str, resume: str = "no", quiet: bool = False
) -> TrainedRun:
    """Train a reward model on preferences, as `fastrm train` does, and return when the run is finished.

    A run on several GPUs is started as by the command, a process for each. Interrupting the kernel or Ctrl-C saves a
    checkpoint and raises `InterruptedRun`.

    Args:
        config: a YAML file, or its content as a dict, which may have `extends`. In a dict a source of data may be
            {"rows": list of dicts, DataFrame or Dataset} in the place of a path, and data.train, data.eval and each
            of its named sets may be a DataFrame or a Dataset. Such rows are written to rows/ in the run's folder, from
            which the run reads them; paths of images are relative to the working folder, or to the source's `images`.
        overrides: settings that replace those of the configuration, as "optim.lr=1e-5".
        resume: no, auto, required, or the folder of a checkpoint.
        quiet: print nothing.

    Raises:
        ConfigError: naming the file and line, the override or the key of every problem.
        FastrmError: of another class, for what else stops a run.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warns as workers fork after its use
    quiet_libraries()
    from fastrm.forecast.room import check_room
    from fastrm.train.launch import launch, num_ranks_to_start
    from fastrm.train.loop import train as run

    resolved = _resolve(config, overrides)
    folder = Path(resolved.run.dir)
    if (num_ranks := num_ranks_to_start(resolved)) > 1:
        with tempfile.TemporaryDirectory() as place:
            file = Path(place) / "config.yaml"
            file.write_text(resolved.to_yaml(), encoding="utf-8")
            launch(num_ranks, ["train", str(file), "--resume", resume])
        return TrainedRun(folder, json.loads((folder / "summary.json").read_text()))
    summary = run(
        resolved, resume, display=Display(silent=quiet),
        check=lambda ranks: check_room(resolved, ranks.num_ranks, ranks.num_local),
    )  # fmt: skip
    return TrainedRun(folder, summary)


def evaluate(
    model: AnyModel,
    data: "str | os.PathLike[str] | RowsLike",
    *,
    images: str | os.PathLike[str] | None = None,
    columns: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    benchmark_data: str | None = None,
    tokens_per_pack: int = ScoringOptions.tokens_per_pack,
    quiet: bool = False,
) -> EvaluationTable:
    """Measure how well a model agrees with preferences, as `fastrm eval` does, and return the figures.

    Args:
        model: a folder, hub id or ensemble file, several of them for their mean, or a `RewardModel` or `Ensemble` that
            was loaded, on any device and in any precision.
        data: a file, a folder, digits:eval, hub:owner/name, bench:NAME; or rows in memory: a list of dicts, a
            DataFrame or a Dataset.
        images, columns, ignore: as the command's options; paths of images in rows in memory are relative to the
            working folder.
        benchmark_data: the local copy of a benchmark.
        tokens_per_pack: token budget of one forward pass; the largest group must fit.
        quiet: print no progress.

    Raises:
        ConfigError, DataError, StorageError: for a model or data that cannot be used.
    """
    quiet_libraries()
    rows = RowOptions(images=None if images is None else os.fspath(images), columns=columns or {}, ignore=ignore)
    options = ScoringOptions(rows=rows, tokens_per_pack=tokens_per_pack, num_workers=0)
    named = os.fspath(data) if isinstance(data, (str, os.PathLike)) else Rows(data)
    choice, ensemble = ModelChoice(), None
    if isinstance(model, (RewardModel, Ensemble)):
        ensemble = model if isinstance(model, Ensemble) else Ensemble([model], ["model"])
    else:
        paths = [model] if isinstance(model, (str, os.PathLike)) else list(model)
        choice = ModelChoice(models=tuple(map(Path, paths)))
        choice.check()
    with Display(silent=quiet) as display:

        def load() -> Ensemble:
            return ensemble or open_models(choice, options, display)

        if isinstance(named, str) and named.startswith(PREFIX):
            return benchmark_table(run_benchmark(load, named, benchmark_data, options, display))
        if benchmark_data is not None:
            raise ConfigError(f"benchmark_data is for a benchmark; got {named} as data, wanted bench:NAME")
        return preference_table(measure_file(load, named, options, display))


def _resolve(config: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str]) -> Config:
    """Return the checked configuration; rows in memory have become files of the run's folder."""
    if not isinstance(config, Mapping):
        return load_config(config, overrides)
    tree, found = _without_rows(config)
    resolved = load_config(tree, overrides)
    for source, rows in found:
        source["path"] = str(write_rows(rows, Path(resolved.run.dir) / NAME))
    return load_config(tree, overrides) if found else resolved


def _without_rows(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[dict[str, Any], RowsLike]]]:
    """Return the configuration with a path for rows in memory, and (source, rows) for each of them."""
    tree, found = dict(config), []
    data = tree.get("data")
    if not isinstance(data, Mapping):
        return tree, found
    data = tree["data"] = dict(data)
    lists = [(data, split, f"data.{split}") for split in ("train", "eval")]
    if isinstance(named := data.get("eval"), Mapping) and not is_table(named):
        data["eval"] = named = dict(named)
        lists[1:] = [(named, name, f"data.eval.{name}") for name in named]
    for holder, key, place in lists:
        given = holder.get(key)
        sources = [{"rows": given}] if is_table(given) else given
        if not isinstance(sources, (list, tuple)):
            continue
        holder[key] = [dict(source) if isinstance(source, Mapping) else source for source in sources]
        for number, source in enumerate(holder[key]):
            if not isinstance(source, dict) or not source.keys().isdisjoint(("path", "set")):
                continue
            if "rows" not in source:
                raise ConfigError(
                    f"config: {place}.{number}: got {', '.join(map(str, source)) or 'no keys'}; a source needs "
                    f'path, set or rows; rows in memory are {{"{key}": [{{"rows": [row, ...]}}]}}'
                )
            found.append((source, source.pop("rows")))
            source["path"] = NAME
            source.setdefault("images", os.getcwd())
    return tree, found
