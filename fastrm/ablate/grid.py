"""The file of a grid, and the cells that it stands for.

A grid is one base configuration, one or two axes of named settings, and seeds. A cell is one choice on
each axis with one seed: an ordinary `fastrm train` run in a folder of its own.
"""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fastrm.config import Config, load_config
from fastrm.errors import ConfigError
from fastrm.json_files import to_json
from fastrm.yaml_files import apply_override, read_yaml, validate

HELD_OUT = "held_out"
Overrides = dict[str, Any]
# Keys that the grid itself sets for each cell.
_OF_THE_GRID = ("run.dir", "run.seed")


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True, frozen=True
    )


class EvaluationConfig(_Section):
    """One entry of `evaluate`; the texts held_out and bench:NAME stand for evaluations of that name."""

    name: str
    """First part of its metrics' names: NAME/accuracy, NAME/overall."""
    target: str
    """held_out (data.eval, at the end of the run), a file of preferences, or bench:NAME, as `fastrm eval` takes it."""
    data: str | None = None
    """Local copy of a benchmark: `fastrm eval --data`."""
    images: str | None = None
    """Folder or archive of the images: `fastrm eval --images`."""
    format: str | None = None
    """Layout of the rows: `fastrm eval --format`."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value):
        return {"name": value.removeprefix("bench:"), "target": value} if isinstance(value, str) else value


class ColumnConfig(_Section):
    """One column; a text alone is its metric."""

    metric: str
    """NAME/metric of an evaluation, as results.json lists them: held_out/accuracy, vl_rewardbench/overall."""
    best: Literal["highest", "lowest", "none"] = "highest"
    """Which value is set in bold."""
    percent: bool = True
    """Shown times 100, as the field prints accuracies."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value):
        return {"metric": value} if isinstance(value, str) else value


class EnsembleConfig(_Section):
    members: Annotated[list[str], Field(min_length=2)]
    """Names on the first axis; members of one ensemble share seed and place on the second axis."""
    combine: Literal["mean", "accuracy", "margin"] = "mean"
    """As `fastrm eval --ensemble`: mean of the raw scores, or weights from validation pairs."""
    validation: str | None = None
    """Preferences that the weights come from: `fastrm eval --validation`."""


class PublishedConfig(_Section):
    source: str
    """Where the figures were printed."""
    rows: dict[str, dict[str, float]]
    """For a row of the table, figures by column heading, shown beside our own."""


class GridConfig(_Section):
    title: str
    """Heading of the table and the picture."""
    base: str
    """Configuration that every cell starts from, relative to the working directory."""
    overrides: Overrides = {}
    """`section.key: value` for all cells."""
    axes: Annotated[dict[str, dict[str, Overrides]], Field(min_length=1, max_length=2)]
    """Axis -> name of a setting -> its overrides. The first axis makes the table's rows, the second groups of
    columns; a cell for each pair."""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0]
    """run.seed of the cells: initial weights and order of the data."""
    ensembles: dict[str, EnsembleConfig] = {}
    """Further rows: scores of other rows' models combined."""
    evaluate: list[EvaluationConfig] = [EvaluationConfig(name=HELD_OUT, target=HELD_OUT)]
    """What each cell's final weights are judged by."""
    columns: dict[str, ColumnConfig] = {}
    """Heading -> metric. Default: the main figure of each evaluation."""
    reference: str | None = None
    """Row that the others are compared with, seed by seed."""
    published: PublishedConfig | None = None
    """Printed figures, for comparison."""
    pairs: int | dict[str, int] | None = None
    """Training pairs of a cell (or of each row), for the costs in --dry-run where no data is there to be counted."""
    dir: str | None = None
    """Folder of results and runs. Default: runs/ablations/<name of the YAML file>."""
    reuse: list[str] = []
    """Folders of other grids: their finished cells of the same configuration are taken instead of run again."""
    num_parallel: Annotated[int, Field(gt=0)] = 1
    """Cells at a time, on a CPU; they share its cores."""

    @model_validator(mode="after")
    def _check(self):
        rows = [*self.rows, *self.ensembles]
        named = {"reference": [self.reference] if self.reference is not None else []}
        named |= {f"ensembles.{name}.members": value.members for name, value in self.ensembles.items()}
        for key, names in named.items():
            _check_names(key, names, self.rows)
        _check_names("published.rows", self.published.rows if self.published else (), rows)
        _check_names("pairs", self.pairs if isinstance(self.pairs, dict) else (), self.rows)
        if len(set(rows)) < len(rows):
            raise ValueError("an ensemble has the name of another row; rename it")
        for name, values in self.axes.items():
            if not values:
                raise ValueError(f"axes.{name} has no settings; name at least one")
        for what, values in (("seeds", self.seeds), ("evaluate", [e.name for e in self.evaluate])):
            if twice := next((value for value in values if values.count(value) > 1), None):
                raise ValueError(f"{what}: {twice} stands twice")
        self._check_overrides()
        return self

    def _check_overrides(self) -> None:
        """No key may be set from two places: which one counts would be a guess."""
        for place, overrides in self._places():
            for key in _OF_THE_GRID:
                if key in overrides:
                    raise ValueError(f"{place}: {key} is the grid's own to set; use seeds and dir")
        for one, other in itertools.combinations([("overrides", [self.overrides]), *self._axis_overrides()], 2):
            keys = [{key for overrides in group for key in overrides} for _, group in (one, other)]
            if shared := next((a for a in keys[0] for b in keys[1] if _overlap(a, b)), None):
                raise ValueError(f"{shared} is set by {one[0]} and by {other[0]}; leave it to one of them")

    def _places(self) -> list[tuple[str, Overrides]]:
        values = [
            (f"axes.{axis}.{name}", overrides)
            for axis, settings in self.axes.items()
            for name, overrides in settings.items()
        ]
        return [("overrides", self.overrides), *values]

    def _axis_overrides(self) -> list[tuple[str, list[Overrides]]]:
        return [(f"axes.{axis}", list(values.values())) for axis, values in self.axes.items()]

    @property
    def rows(self) -> dict[str, Overrides]:
        """The first axis."""
        return next(iter(self.axes.values()))

    @property
    def groups(self) -> dict[str, Overrides]:
        """The second axis; without one, a single nameless setting."""
        return list(self.axes.values())[1] if len(self.axes) > 1 else {"": {}}

    @property
    def shown(self) -> dict[str, ColumnConfig]:
        """The columns, or their default."""
        if self.columns:
            return self.columns
        return {
            f"{evaluation.name}/{metric}": ColumnConfig(metric=f"{evaluation.name}/{metric}")
            for evaluation in self.evaluate
            for metric in ["overall" if evaluation.target.startswith("bench:") else "accuracy"]
        }


def _check_names(key: str, names, known) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{key}: there is no row {name!r}; rows: {', '.join(known)}")


def _overlap(a: str, b: str) -> bool:
    """Is one of two keys the other, or a section that holds it?"""
    return a == b or a.startswith(f"{b}.") or b.startswith(f"{a}.")


@dataclass(frozen=True)
class _Place:
    """Where a cell stands in the table, and its folder.

    Attributes:
        row, group: names on the axes; group is empty without a second axis.
    """

    name: str
    row: str
    group: str
    seed: int
    dir: Path


@dataclass(frozen=True)
class Cell(_Place):
    """One run.

    Attributes:
        overrides: what `fastrm train BASE` takes to be this cell, its folder included.
        config: what they resolve to.
    """

    base: str
    overrides: tuple[str, ...]
    config: Config


@dataclass(frozen=True)
class EnsembleCell(_Place):
    """Several cells' models scored together."""

    members: tuple[Cell, ...]
    settings: EnsembleConfig


@dataclass(frozen=True)
class Grid:
    """A grid with its cells, in the order in which they run."""

    path: Path
    settings: GridConfig
    dir: Path
    cells: list[Cell]
    ensembles: list[EnsembleCell]


def load_grid(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Grid:
    """Read a grid's file and resolve every cell.

    Args:
        overrides: `section.key=value` for all cells, or `key=value` of the grid's own file, as `seeds=[0]`.

    Raises:
        ConfigError: naming the file and line, the override, or the cell.
    """
    path = Path(path)
    tree, places = read_yaml(path)
    for override in overrides:
        key, separator, _ = override.partition("=")
        if separator and key.partition(".")[0] in Config.model_fields:
            _override_all_cells(tree, places, override, key)
        else:
            apply_override(tree, places, override)
    settings = validate(GridConfig, tree, places, str(path))
    folder = Path(settings.dir or f"runs/ablations/{path.stem}")
    cells = [
        _cell(path, settings, folder, row, group, seed)
        for seed, group, row in itertools.product(settings.seeds, settings.groups, settings.rows)
    ]
    ensembles = [
        _ensemble(settings, folder, row, group, seed, cells)
        for seed, group, row in itertools.product(settings.seeds, settings.groups, settings.ensembles)
    ]
    _check_folders(path, [*cells, *ensembles])
    return Grid(path, settings, folder, cells, ensembles)


def _override_all_cells(tree: dict, places: dict, override: str, key: str) -> None:
    """Put a command-line override among those for all cells, whose keys hold dots."""
    parsed: dict = {}
    apply_override(parsed, {}, "value=" + override.partition("=")[2])
    if isinstance(tree.setdefault("overrides", {}), dict):
        tree["overrides"][key] = parsed["value"]
        places["overrides", key] = f"override {override!r}"


def _cell(path: Path, settings: GridConfig, folder: Path, row: str, group: str, seed: int) -> Cell:
    name = _folder_name(row, group, seed)
    run_dir = folder / name
    values = settings.overrides | settings.groups[group] | settings.rows[row]
    values |= {"run.seed": seed, "run.dir": str(run_dir)}
    overrides = tuple(f"{key}={to_json(value)}" for key, value in values.items())
    try:
        config = load_config(settings.base, overrides)
    except ConfigError as error:
        raise ConfigError(f"{path}: cell {name}: {error}") from None
    return Cell(name, row, group, seed, run_dir, settings.base, overrides, config)


def _ensemble(settings: GridConfig, folder: Path, row: str, group: str, seed: int, cells: list[Cell]) -> EnsembleCell:
    ensemble = settings.ensembles[row]
    place = {cell.row: cell for cell in cells if (cell.group, cell.seed) == (group, seed)}
    name = _folder_name(row, group, seed)
    members = tuple(place[member] for member in ensemble.members)
    return EnsembleCell(name, row, group, seed, folder / name, members, ensemble)


def _folder_name(row: str, group: str, seed: int) -> str:
    parts = [re.sub(r"[^a-z0-9.]+", "_", text.lower()).strip("_.") for text in (group, row) if text]
    return "-".join([*parts, f"seed{seed}"])


def _check_folders(path: Path, cells) -> None:
    seen: dict[str, Any] = {}
    for cell in cells:
        if other := seen.get(cell.name):
            raise ConfigError(
                f"{path}: the settings {other.row!r} and {cell.row!r} would share the folder {cell.name}; "
                "names must differ in letters or digits"
            )
        seen[cell.name] = cell
