"""The cost of a grid's cells, before they run.

On GPUs it is the forecast of `fastrm plan`. On a CPU, for which there is no forecast, it is the time that finished
cells of the same settings took.
"""

from collections.abc import Sized
from dataclasses import dataclass

from fastrm.ablate.folders import is_finished, seconds_taken
from fastrm.ablate.grid import Cell, Grid
from fastrm.errors import ConfigError
from fastrm.forecast.hardware import Gpu, find_gpu
from fastrm.forecast.inputs import count_preferences
from fastrm.forecast.plan import Assumptions, plan_time
from fastrm.forecast.report import days
from fastrm.tables import Table
from fastrm.ui import make_console, say, show

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Cost:
    """The cost of one cell.

    Attributes:
        pairs: preferences in one epoch; None if unknown.
        steps: optimizer steps; None if unknown.
        hours: wall-clock hours of the training; None if unknown.
        why: the reason why the hours are unknown, in words.
    """

    pairs: int | None
    steps: int | None
    hours: float | None
    why: str = ""


def print_costs(grid: Grid, num_gpus: int, gpu: str) -> None:
    """Print every cell with its state, size and time, and the total of the cells that are left, run in turn.

    Raises:
        ConfigError: for an unknown GPU.
    """
    console, hardware = make_console(), find_gpu(gpu)
    costs = cell_costs(grid, num_gpus, hardware)
    table = Table("cell", "state", "pairs", "steps", "hours")
    for cell in grid.cells:
        cost = costs[cell.name]
        counts = [UNKNOWN if value is None else f"{value:,}" for value in (cost.pairs, cost.steps)]
        table.add_row(cell.name, "finished" if is_finished(cell.dir) else "to run", *counts, _hours(cost.hours))
    for ensemble in grid.ensembles:
        table.add_row(ensemble.name, f"{len(ensemble.members)} members", "", "", "evaluation only")
    left = [costs[cell.name].hours for cell in grid.cells if not is_finished(cell.dir)]
    known = [hours for hours in left if hours is not None]
    table.add_section()
    parts = [_hours(sum(known))] if known or not left else []
    parts += [f"{len(left) - len(known)} {UNKNOWN}"] if len(known) < len(left) else []
    table.add_row("left to run", _count(left, "run"), "", "", " + ".join(parts))
    show(console, f"{grid.settings.title}: {_count(grid.cells, 'run')}, {_count(grid.ensembles, 'ensemble')}", table)
    say(
        console,
        f"hours: of training, on {num_gpus} {hardware.name} as `fastrm plan` predicts, which gives every pair an image "
        "at its largest where the model sees: too much for text; of runs on a CPU as measured",
    )
    for why in dict.fromkeys(cost.why for cost in costs.values() if cost.why):
        say(console, why)


def cell_costs(grid: Grid, num_gpus: int, gpu: Gpu) -> dict[str, Cost]:
    """Return the cost of each cell, by its name. Cells that differ only in the seed cost the same."""
    costs: dict[str, Cost] = {}
    found: dict[tuple[str, str], Cost] = {}
    for cell in grid.cells:
        place = (cell.row, cell.group)
        if place not in found:
            found[place] = _cost(grid, cell, num_gpus, gpu)
        costs[cell.name] = found[place]
    return costs


def _cost(grid: Grid, cell: Cell, num_gpus: int, gpu: Gpu) -> Cost:
    pairs, run = _pairs(grid, cell), cell.config.run
    steps = run.max_steps
    if steps is None and pairs is not None:
        steps = run.epochs * -(-pairs // cell.config.optim.batch_pairs)
    if run.device == "cpu":
        return Cost(pairs, steps, _measured_hours(grid, cell))
    if pairs is None:
        return Cost(pairs, steps, None, f"{cell.row}: its data is not here to be counted; set pairs")
    try:
        plan = plan_time(cell.config, Assumptions(num_gpus, gpu, pairs, str(grid.path)))
    except ConfigError as error:
        return Cost(pairs, steps, None, f"{cell.row}: {error}")
    return Cost(pairs, steps, 24 * days(plan, plan.step) * steps / plan.num_steps)


def _pairs(grid: Grid, cell: Cell) -> int | None:
    given = grid.settings.pairs
    known = given.get(cell.row) if isinstance(given, dict) else given
    return count_preferences(cell.config) if known is None else known


def _measured_hours(grid: Grid, cell: Cell) -> float | None:
    """Return the mean hours of the finished cells that differ only in the seed, or None."""
    same = [other for other in grid.cells if (other.row, other.group) == (cell.row, cell.group)]
    seconds = [seconds_taken(other.dir) for other in same if is_finished(other.dir)]
    return sum(seconds) / len(seconds) / 3600 if seconds else None


def _count(items: Sized, name: str) -> str:
    return f"{len(items)} {name}{'s' * (len(items) != 1)}"


def _hours(hours: float | None) -> str:
    if hours is None:
        return UNKNOWN
    return f"{hours:,.1f}" if hours >= 1 else f"{hours:.4f}"
