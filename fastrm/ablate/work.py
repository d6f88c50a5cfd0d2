"""The work of a grid's cells: what their folders hold already, and the `fastrm` commands that are left."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastrm.ablate.grid import HELD_OUT, Cell, EnsembleCell, EvaluationConfig, Grid
from fastrm.config import Config, load_config
from fastrm.data_config import SourceConfig
from fastrm.errors import ConfigError
from fastrm.json_files import to_json
from fastrm.storage import write_whole
from fastrm.yaml_files import differences

SUMMARY = "summary.json"
# The only file that the grid itself writes to a cell's folder: its seconds, summed over interruptions.
SECONDS = "ablation.json"


@dataclass(frozen=True)
class Command:
    """One step of a cell, as a `fastrm` command.

    Attributes:
        arguments: the arguments of `fastrm`.
        out: the file that the command writes, whose existence shows that it is done; None if another file shows it.
    """

    arguments: tuple[str, ...]
    out: Path | None = None


@dataclass(frozen=True)
class Task:
    """The steps that are left for one cell, in order.

    Attributes:
        num_steps: optimizer steps of its run, if they are known.
    """

    name: str
    dir: Path
    commands: tuple[Command, ...]
    num_steps: int | None = None


def is_finished(folder: Path) -> bool:
    """Return whether the run in a folder has ended. A summary that a kill cut off does not count."""
    return read_json(folder / SUMMARY) is not None


def check_unchanged(grid: Grid) -> None:
    """Refuse a grid whose folders hold runs of other configurations.

    Raises:
        ConfigError: naming every cell whose folder holds a run of another configuration, and what differs.
    """
    changed = []
    for cell in grid.cells:
        saved = saved_config(cell.dir)
        if saved is not None and (found := config_differences(saved, cell.config)):
            lines = "".join(f"\n    {key}: {old!r} there, {new!r} now" for key, (old, new) in found.items())
            changed.append(f"\n  {cell.name} ({cell.dir}):{lines}")
    if changed:
        raise ConfigError(
            f"{grid.path}: {len(changed)} cells hold runs of another configuration:{''.join(changed)}\n"
            "set it back, remove these folders, or set dir to start another grid"
        )


def saved_config(folder: Path) -> Config | None:
    """Return the configuration of the run in a folder, None if there is no run.

    Raises:
        ConfigError: if it can no longer be read.
    """
    path = folder / "config.yaml"
    return load_config(path) if path.exists() else None


def config_differences(old: Config, new: Config) -> dict[str, tuple]:
    """Return the keys that differ between two configurations, with both values; folders are not compared."""
    trees = [config.model_dump(mode="json") for config in (old, new)]
    return {key: values for key, values in differences(*trees).items() if key != "run.dir"}


def with_reused_runs(grid: Grid) -> Grid:
    """Return the grid with finished runs of other grids (`reuse`) in place of cells that have not started."""
    cells = {cell.name: cell for cell in grid.cells}
    for cell in grid.cells:
        if not (cell.dir / "config.yaml").exists() and (found := _find_equal_run(cell, grid.settings.reuse)):
            cells[cell.name] = replace(cell, dir=found)
    ensembles = [
        replace(ensemble, members=tuple(cells[member.name] for member in ensemble.members))
        for ensemble in grid.ensembles
    ]
    return replace(grid, cells=list(cells.values()), ensembles=ensembles)


def _find_equal_run(cell: Cell, folders: Sequence[str]) -> Path | None:
    for folder in folders:
        for summary in sorted(Path(folder).glob(f"*/{SUMMARY}")):
            if is_finished(summary.parent) and not config_differences(saved_config(summary.parent), cell.config):
                return summary.parent
    return None


def seconds_taken(folder: Path) -> float:
    """Return the wall-clock seconds that a cell has taken, interrupted parts included."""
    return (read_json(folder / SECONDS) or {}).get("seconds", 0.0)


def add_seconds(folder: Path, seconds: float) -> None:
    """Add to the seconds that a cell has taken."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / SECONDS, to_json({"seconds": seconds_taken(folder) + seconds}) + "\n")


def read_json(path: Path) -> dict | None:
    """Read a JSON file; return None if there is none, or if a kill cut it off."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


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

    There is none for a run's own held-out data, which the run itself evaluates, nor for a cell that is not in the
    evaluation's groups, and one for each held-out source of an ensemble.

    Raises:
        ConfigError: if a held-out source of an ensemble has no file that could be evaluated by itself.
    """
    if evaluation.groups and cell.group not in evaluation.groups:
        return []
    settings = [("--data", evaluation.data), ("--images", evaluation.images), ("--format", evaluation.format)]
    if evaluation.target != HELD_OUT:
        return [_command(cell, evaluation.name, evaluation.target, settings, evaluation)]
    if isinstance(cell, Cell):
        return []
    return [
        _command(cell, evaluation.name, _path(source, cell), [("--images", source.images), ("--format", source.format)])
        for source in cell.members[0].config.data.sources("eval").values()
    ]


def _path(source: SourceConfig, cell: EnsembleCell) -> str:
    if source.path is None:
        raise ConfigError(f"ensemble {cell.row!r}: held-out source set: {source.set} has no path; set data.eval's path")
    return source.path


def _command(
    cell: Cell | EnsembleCell,
    name: str,
    target: str,
    settings: list[tuple[str, str | None]],
    evaluation: EvaluationConfig | None = None,
) -> Command:
    members = cell.members if isinstance(cell, EnsembleCell) else (cell,)
    if isinstance(cell, EnsembleCell):
        settings = [*settings, ("--ensemble", cell.settings.combine), ("--validation", cell.settings.validation)]
    settings = [*settings, *_limits(members[0].config)]
    writes = any(member.config.paradigm != "reward" for member in members)
    if writes and evaluation is not None:
        settings.append(("--max-tokens", evaluation.max_tokens))
    arguments = ["eval", *(str(member.dir / "model") for member in members), target]
    arguments += [part for option, value in settings if value is not None for part in (option, str(value))]
    is_costs = evaluation is not None and evaluation.costs
    arguments += ["--costs"] * is_costs
    # The digest in the name keeps figures of a changed evaluation apart from the old ones.
    digest = hashlib.sha256("\0".join(arguments).encode()).hexdigest()[:8]
    out = cell.dir / "evaluations" / f"{name}-{digest}.json"
    if writes and not is_costs:  # texts stay beside the figures, not in a file that other grids write to
        arguments += ["--generations", str(out.with_suffix(".jsonl"))]
    return Command((*arguments, "--json", str(out)), out)


def _limits(config: Config) -> list[tuple[str, object]]:
    packs = [("--tokens-per-pack", config.optim.tokens_per_pack), ("--num-workers", config.data.num_workers)]
    videos = [
        ("--max-video-bytes", config.data.max_video_bytes),
        ("--max-video-seconds", config.data.max_video_seconds),
    ]
    scores = config.paradigm != "judge"  # which is shown no video either
    return [
        ("--device", config.run.device),
        ("--dtype", config.precision.dtype),
        *(packs if scores else ()),
        ("--max-image-pixels", config.data.max_image_pixels),
        ("--max-image-bytes", config.data.max_image_bytes),
        *(videos if scores else ()),
    ]


def _missing(cell: Cell | EnsembleCell, evaluations: list[EvaluationConfig]) -> list[Command]:
    commands = [command for evaluation in evaluations for command in evaluation_commands(cell, evaluation)]
    return [command for command in commands if not _exists(command.out)]


def _exists(file: Path | None) -> bool:
    return file is not None and file.exists()
