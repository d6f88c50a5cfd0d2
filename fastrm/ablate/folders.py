"""The state of a grid on disk: the cells that are finished, and the configurations that they ran with."""

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
# The only file that the grid itself writes to a cell's folder: its seconds, summed over interruptions.
SECONDS = "ablation.json"


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
    (folder / SECONDS).write_text(to_json({"seconds": seconds_taken(folder) + seconds}) + "\n")


def read_json(path: Path) -> dict | None:
    """Read a JSON file; return None if there is none, or if a kill cut it off."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
