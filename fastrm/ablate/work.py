"""The work that is left for a cell, as `fastrm` commands."""

import hashlib
from pathlib import Path

from fastrm.ablate.folders import is_finished
from fastrm.ablate.grid import HELD_OUT, Cell, EnsembleCell, EvaluationConfig
from fastrm.ablate.runner import Command, Task
from fastrm.config import Config
from fastrm.data_config import SourceConfig
from fastrm.errors import ConfigError


def cell_task(cell: Cell, evaluations: list[EvaluationConfig]) -> Task | None:
    """Return the training, unless it is finished, and the missing evaluations; None if nothing is left."""
    commands = [] if is_finished(cell.dir) else [Command(("train", cell.base, *cell.overrides, "--resume", "auto"))]
    commands += _missing(cell, evaluations)
    return Task(cell.name, cell.dir, tuple(commands), cell.config.run.max_steps) if commands else None


def ensemble_task(cell: EnsembleCell, evaluations: list[EvaluationConfig]) -> Task | None:
    """Return the missing evaluations of an ensemble; None if nothing is left."""
    commands = _missing(cell, evaluations)
    return Task(cell.name, cell.dir, tuple(commands)) if commands else None


def evaluation_commands(cell: Cell | EnsembleCell, evaluation: EvaluationConfig) -> list[Command]:
    """Return the `fastrm eval` commands of an evaluation.

    There is none for a run's own held-out data, which the run itself evaluates, and one for each held-out source of an
    ensemble.

    Raises:
        ConfigError: if a held-out source of an ensemble has no file that could be evaluated by itself.
    """
    settings = [("--data", evaluation.data), ("--images", evaluation.images), ("--format", evaluation.format)]
    if evaluation.target != HELD_OUT:
        return [_command(cell, evaluation.name, evaluation.target, settings)]
    if isinstance(cell, Cell):
        return []
    return [
        _command(cell, evaluation.name, _path(source, cell), [("--images", source.images), ("--format", source.format)])
        for source in cell.members[0].config.data.eval
    ]


def _path(source: SourceConfig, cell: EnsembleCell) -> str:
    if source.path is None:
        raise ConfigError(f"ensemble {cell.row!r}: held-out source set: {source.set} has no path; set data.eval's path")
    return source.path


def _command(cell: Cell | EnsembleCell, name: str, target: str, settings: list[tuple[str, str | None]]) -> Command:
    members = cell.members if isinstance(cell, EnsembleCell) else (cell,)
    if isinstance(cell, EnsembleCell):
        settings = [*settings, ("--ensemble", cell.settings.combine), ("--validation", cell.settings.validation)]
    settings = [*settings, *_limits(members[0].config)]
    arguments = ["eval", *(str(member.dir / "model") for member in members), target]
    arguments += [part for option, value in settings if value is not None for part in (option, str(value))]
    # The digest in the name keeps figures of a changed evaluation apart from the old ones.
    digest = hashlib.sha256("\0".join(arguments).encode()).hexdigest()[:8]
    out = cell.dir / "evaluations" / f"{name}-{digest}.json"
    return Command((*arguments, "--json", str(out)), out)


def _limits(config: Config) -> list[tuple[str, object]]:
    return [
        ("--device", config.run.device),
        ("--dtype", config.precision.dtype),
        ("--tokens-per-pack", config.optim.tokens_per_pack),
        ("--num-workers", config.data.num_workers),
        ("--max-image-pixels", config.data.max_image_pixels),
        ("--max-image-bytes", config.data.max_image_bytes),
        ("--max-video-bytes", config.data.max_video_bytes),
        ("--max-video-seconds", config.data.max_video_seconds),
    ]


def _missing(cell: Cell | EnsembleCell, evaluations: list[EvaluationConfig]) -> list[Command]:
    commands = [command for evaluation in evaluations for command in evaluation_commands(cell, evaluation)]
    return [command for command in commands if not _exists(command.out)]


def _exists(file: Path | None) -> bool:
    return file is not None and file.exists()
