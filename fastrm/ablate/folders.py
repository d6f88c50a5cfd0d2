"""What the folders on disk say: which cells are finished, and under which configuration."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastrm.ablate.grid import Cell, Grid
from fastrm.config import Config, load_config
from fastrm.errors import ConfigError
from fastrm.json_files import to_json
from fastrm.train.resume import differences

SUMMARY = "summary.json"
# What the grid itself leaves in a cell's folder: seconds in all, counted over interruptions.
SECONDS = "ablation.json"


def is_finished(folder: Path) -> bool:
    """Has the run in a folder come to its end? A summary cut off by a kill does not count."""
    return read_json(folder / SUMMARY) is not None


def check_unchanged(grid: Grid) -> None:
    """Refuse to take runs for what they are not.

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
    """The configuration of the run in a folder, if there is one.

    Raises:
        ConfigError: if it cannot be read any more.
    """
    path = folder / "config.yaml"
    return load_config(path) if path.exists() else None


def config_differences(old: Config, new: Config) -> dict[str, tuple]:
    """Keys that differ, with both values; folders aside."""
    trees = [config.model_dump(mode="json") for config in (old, new)]
    return {key: values for key, values in differences(*trees).items() if key != "run.dir"}


def with_reused_runs(grid: Grid) -> Grid:
    """The grid with the finished runs of other grids (`reuse`) in the places of cells that were not started."""
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
    """Wall-clock seconds that a cell has taken, interrupted parts included."""
    return (read_json(folder / SECONDS) or {}).get("seconds", 0.0)


def add_seconds(folder: Path, seconds: float) -> None:
    """Count time that a cell has taken."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SECONDS).write_text(to_json({"seconds": seconds_taken(folder) + seconds}) + "\n")


def read_json(path: Path) -> dict | None:
    """A JSON file; None if there is none, or if a kill cut it off."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
