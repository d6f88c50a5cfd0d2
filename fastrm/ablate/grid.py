"""The file of a grid, and the cells that it stands for.

A grid is one base configuration, one or two axes of named settings, and seeds. A cell is one choice on
each axis with one seed: an ordinary `fastrm train` run in a folder of its own.
"""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fastrm.config import Config, load_config
from fastrm.errors import ConfigError
from fastrm.json_files import to_json
from fastrm.sections import NonEmpty, NonNegative, Positive, Section
from fastrm.yaml_files import apply_override, read_yaml, validate

HELD_OUT = "held_out"
Overrides = dict[str, Any]
# The keys that the grid itself sets for each cell.
_OF_THE_GRID = ("run.dir", "run.seed")


class EvaluationConfig(Section):
    """One entry of `evaluate`. The text held_out or bench:NAME stands for an evaluation of that name."""

    name: str
    """The first part of the names of its metrics: NAME/accuracy, NAME/overall."""
    target: str
    """The data: held_out (data.eval, at the end of the run), or a file or bench:NAME as `fastrm eval` takes it."""
    data: str | None = None
    """The local copy of a benchmark, as `fastrm eval --data`."""
    images: str | None = None
    """The folder or archive of the images, as `fastrm eval --images`."""
    format: str | None = None
    """The layout of the rows, as `fastrm eval --format`."""
    max_tokens: Positive | None = None
    """The longest text that a critic or judge generates, as `fastrm eval --max-tokens`."""
    costs: bool = False
    """True to measure what a judged pair and a group of eight cost, in place of accuracy, as `fastrm eval --costs`:
    NAME/pair/flops, NAME/group_of_8/seconds."""
    groups: list[str] = []
    """The settings of the second axis whose cells are evaluated so; the default is all."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value):
        return {"name": value.removeprefix("bench:"), "target": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self):
        if self.target == HELD_OUT and (self.costs or self.groups):
            raise ValueError(f"costs and groups: the target {HELD_OUT} is no file; name a file, or bench:NAME")
        return self


class ColumnConfig(Section):
    """One column of the table. A text alone is its metric."""

    metric: str
    """The metric NAME/metric as results.json lists it, such as held_out/accuracy or vl_rewardbench/overall."""
    best: Literal["highest", "lowest", "none"] = "highest"
    """The value that is set in bold: the highest, the lowest, or none."""
    percent: bool = True
    """True to show values times 100, as papers print accuracies."""
    unit: Annotated[float, Field(gt=0.0)] = 1.0
    """The size of the unit in which values are shown, such as 1e9 for billions."""
    digits: NonNegative | None = None
    """The decimals that are shown; the default is 1 of a percentage and 3 of other values."""
    groups: list[str] = []
    """The settings of the second axis that have the column; the default is all."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value):
        return {"metric": value} if isinstance(value, str) else value

    @property
    def scale(self) -> float:
        """The factor from a value to what is shown."""
        return (100.0 if self.percent else 1.0) / self.unit

    @property
    def decimals(self) -> int:
        """The decimals that are shown."""
        return self.digits if self.digits is not None else 1 if self.percent else 3


class CurvesConfig(Section):
    """Reward curves: a line for each row of the table, a point for each setting of the second axis.

    The second axis has to be lengths of training, since the points lie over the preferences trained on.
    """

    accuracy: NonEmpty
    """The accuracy that is drawn, as a metric of results.json."""
    cost: NonEmpty | None = None
    """The cost over which a second chart draws the accuracies of the longest training, as a metric of results.json."""
    cost_name: NonEmpty = "FLOPs for a judged pair"
    """The name of that cost."""


class EnsembleConfig(Section):
    members: Annotated[list[str], Field(min_length=2)]
    """The members, by name on the first axis; those of one ensemble share the seed and the second axis's setting."""
    combine: Literal["mean", "accuracy", "margin"] = "mean"
    """The way to combine scores, as `fastrm eval --ensemble`: their mean, or weights from validation preferences."""
    validation: str | None = None
    """The preferences that the weights are computed from, as `fastrm eval --validation`."""


class PublishedConfig(Section):
    source: str
    """The publication that printed the figures."""
    rows: dict[str, dict[str, float]]
    """Printed figures, row of the table -> column heading -> figure, shown beside our own."""


class GridConfig(Section):
    title: str
    """The heading of the table and the picture."""
    base: str
    """The configuration that every cell starts from; its path is relative to the working directory."""
    overrides: Overrides = {}
    """Overrides `section.key: value` for all cells."""
    axes: Annotated[dict[str, dict[str, Overrides]], Field(min_length=1, max_length=2)]
    """One or two axes: axis -> name of a setting -> its overrides. Every combination of settings is a cell. The first
    axis makes the table's rows, the second one its groups of columns."""
    seeds: Annotated[list[NonNegative], Field(min_length=1)] = [0]
    """Values of run.seed, each for one cell of each combination: they set initial weights and order of the data."""
    ensembles: dict[str, EnsembleConfig] = {}
    """Further rows of the table, for combined scores of other rows' models."""
    evaluate: list[EvaluationConfig] = [EvaluationConfig(name=HELD_OUT, target=HELD_OUT)]
    """Evaluations of each cell's final weights."""
    columns: dict[str, ColumnConfig] = {}
    """Columns of the table, heading -> metric. The default is the main figure of each evaluation."""
    curves: CurvesConfig | None = None
    """Reward curves of the rows, in report.html and reward-curves.png."""
    reference: str | None = None
    """The row that the others are compared with, seed by seed."""
    published: PublishedConfig | None = None
    """Printed figures to compare with."""
    dir: str | None = None
    """The folder of results and runs. The default is runs/ablations/<name of the YAML file>."""
    reuse: list[str] = []
    """Folders of other grids, whose finished cells of the same configuration are used and not run again."""
    num_parallel: Positive = 1
    """The number of cells that run at a time, on a CPU; they share its cores."""

    @model_validator(mode="after")
    def _check(self):
        rows = [*self.rows, *self.ensembles]
        named = {"reference": [self.reference] if self.reference is not None else []}
        named |= {f"ensembles.{name}.members": value.members for name, value in self.ensembles.items()}
        for key, names in named.items():
            _check_names(key, names, self.rows)
        _check_names("published.rows", self.published.rows if self.published else (), rows)
        if len(set(rows)) < len(rows):
            raise ValueError("an ensemble has the name of another row; rename it")
        limited = {f"columns.{heading}": column for heading, column in self.columns.items()}
        for key, value in (limited | {f"evaluate.{entry.name}": entry for entry in self.evaluate}).items():
            _check_names(f"{key}.groups", value.groups, self.groups, "setting")
        for name, values in self.axes.items():
            if not values:
                raise ValueError(f"axes.{name} has no settings; name at least one")
        for what, values in (("seeds", self.seeds), ("evaluate", [e.name for e in self.evaluate])):
            if twice := next((value for value in values if values.count(value) > 1), None):
                raise ValueError(f"{what}: {twice} stands twice")
        self._check_overrides()
        return self

    def _check_overrides(self) -> None:
        """Refuse a key that is set in two places: which value counts would be a guess."""
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
        """The settings on the first axis."""
        return next(iter(self.axes.values()))

    @property
    def groups(self) -> dict[str, Overrides]:
        """The settings on the second axis; without one, a single setting with an empty name."""
        return list(self.axes.values())[1] if len(self.axes) > 1 else {"": {}}

    @property
    def shown(self) -> dict[str, ColumnConfig]:
        """The columns of the table: those of the file, or the default."""
        if self.columns:
            return self.columns
        return {
            f"{evaluation.name}/{metric}": ColumnConfig(metric=f"{evaluation.name}/{metric}")
            for evaluation in self.evaluate
            for metric in ["overall" if evaluation.target.startswith("bench:") else "accuracy"]
        }

    @property
    def measured(self) -> list[tuple[str, str, str, ColumnConfig]]:
        """The columns of the table, left to right, each as (heading in the table, group, own heading, column)."""
        return [
            (f"{group}: {heading}" if group else heading, group, heading, column)
            for group in self.groups
            for heading, column in self.shown.items()
            if not column.groups or group in column.groups
        ]


def _check_names(key: str, names, known, what: str = "row") -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{key}: there is no {what} {name!r}; {what}s: {', '.join(known)}")


def _overlap(a: str, b: str) -> bool:
    """Return whether one of two keys is the other, or a section that holds it."""
    return a == b or a.startswith(f"{b}.") or b.startswith(f"{a}.")


@dataclass(frozen=True)
class _Place:
    """The place of a cell in the table, and its folder.

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
    """One run of the grid.

    Attributes:
        overrides: the overrides with which `fastrm train BASE` is this cell, its folder included.
        config: the configuration that they resolve to.
    """

    base: str
    overrides: tuple[str, ...]
    config: Config


@dataclass(frozen=True)
class EnsembleCell(_Place):
    """An ensemble of several cells' models, scored together."""

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
    """Add a command-line override to those for all cells, whose keys hold dots."""
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
