"""The work of `fastrm ablate`: run the cells of a grid that are left, then write and print what was found."""

from pathlib import Path

import torch

from fastrm.ablate.curves import save_reward_curves
from fastrm.ablate.grid import Cell, Grid, load_grid
from fastrm.ablate.page import write_grid_page
from fastrm.ablate.picture import draw_results
from fastrm.ablate.results import Results, collect, write_json
from fastrm.ablate.runner import LOG, FailedCells, run_tasks
from fastrm.ablate.table import difference_table, main_table
from fastrm.ablate.work import (
    Task,
    cell_task,
    check_unchanged,
    ensemble_task,
    is_finished,
    seconds_taken,
    with_reused_runs,
)
from fastrm.errors import ConfigError, InterruptedRun
from fastrm.storage import locked_folder, write_whole
from fastrm.tables import Table
from fastrm.ui import Display, is_live, make_console, print_table, say, show

UNKNOWN = "unknown"


def dry_run(path: Path, overrides: list[str]) -> None:
    """Check a grid and print its cells with their states and times; run and write nothing.

    Raises:
        ConfigError: as `load_grid`, or for changed cells.
    """
    grid = with_reused_runs(load_grid(path, overrides))
    check_unchanged(grid)
    hours = {cell.name: _measured_hours(grid, cell) for cell in grid.cells}
    table = Table("cell", "state", "hours")
    for cell in grid.cells:
        table.add_row(cell.name, "finished" if is_finished(cell.dir) else "to run", _as_text(hours[cell.name]))
    for ensemble in grid.ensembles:
        table.add_row(ensemble.name, f"{len(ensemble.members)} members", "evaluation only")
    left = [hours[cell.name] for cell in grid.cells if not is_finished(cell.dir)]
    known = [value for value in left if value is not None]
    parts = [_as_text(sum(known))] if known or not left else []
    parts += [f"{len(left) - len(known)} {UNKNOWN}"] if len(known) < len(left) else []
    table.add_section()
    table.add_row("left to run", f"{len(left)} runs", " + ".join(parts))
    console = make_console()
    show(console, f"{grid.settings.title}: {len(grid.cells)} runs, {len(grid.ensembles)} ensembles", table)
    say(console, "hours: as measured in finished cells that differ at most in the seed")


def _measured_hours(grid: Grid, cell: Cell) -> float | None:
    """Return the mean hours of the finished cells that differ at most in the seed; None without any."""
    same = [other for other in grid.cells if (other.row, other.group) == (cell.row, cell.group)]
    seconds = [seconds_taken(other.dir) for other in same if is_finished(other.dir)]
    return sum(seconds) / len(seconds) / 3600 if seconds else None


def _as_text(hours: float | None) -> str:
    if hours is None:
        return UNKNOWN
    return f"{hours:,.1f}" if hours >= 1 else f"{hours:.4f}"


def ablate(path: Path, overrides: list[str], display: Display | None = None) -> Results:
    """Run every cell that is not finished, then write results.json, table.md, report.png and report.html.

    Raises:
        ConfigError: for the grid, before anything runs.
        InterruptedRun: after SIGINT or SIGTERM.
        FailedCells: at the end, when the others are in the table.
    """
    grid = load_grid(path, overrides)
    check_unchanged(grid)
    _check_parallel(grid)
    with locked_folder(grid.dir, "the grid's folder", "wait for it, or set dir"), display or Display() as shown:
        grid = with_reused_runs(grid)
        failed = _run(grid, shown, _command_line(path, overrides))
        results = collect(grid, failed)
        _leave_report(results, shown)
    if failed:
        raise FailedCells(
            f"{len(failed)} of {len(results.metrics)} cells failed: {', '.join(failed)}; each one's {LOG} says why; "
            f"{_command_line(path, overrides)} runs them again"
        )
    return results


def _run(grid: Grid, display: Display, command_line: str) -> dict[str, str]:
    """Run the cells that are left and return the reasons of those that failed, by name."""
    evaluations, settings = grid.settings.evaluate, grid.settings
    tasks = [task for cell in grid.cells if (task := cell_task(cell, evaluations))]
    for cell in grid.cells:
        if cell.dir.parent != grid.dir:
            display.say(f"{cell.name}: the same run as {cell.dir}")
    runs = [cell for cell in grid.cells if cell.name not in {task.name for task in tasks}]
    display.say(f"{settings.title}: {len(grid.cells)} cells, {len(runs)} of them finished; {grid.dir}")

    def say_done(task: Task, seconds: float) -> None:
        display.say(f"{task.name}: done in {seconds:,.0f} s")

    try:
        failed = run_tasks(tasks, display, num_parallel=settings.num_parallel, num_done=len(runs), on_finished=say_done)
        ensembles = []
        for ensemble in grid.ensembles:
            if lost := [member.name for member in ensemble.members if member.name in failed]:
                failed[ensemble.name] = f"needs {', '.join(lost)}, which failed"
            elif task := ensemble_task(ensemble, evaluations):
                ensembles.append(task)
        return failed | run_tasks(ensembles, display, num_parallel=settings.num_parallel, on_finished=say_done)
    except InterruptedRun as stopped:
        raise InterruptedRun(f"{stopped}; go on with: {command_line}") from None


def _leave_report(results: Results, display: Display) -> None:
    folder = results.grid.dir
    tables = [table for table in (main_table(results), difference_table(results)) if table is not None]
    write_json(results, folder / "results.json")
    write_whole(folder / "table.md", "\n".join(table.as_markdown() for table in tables))
    draw_results(results).savefig(folder / "report.png", dpi=110)
    save_reward_curves(results, folder / "reward-curves.png")
    write_grid_page(results, tables, folder / "report.html")
    console = make_console()
    for table in tables:
        print_table(console, table.as_table(styles=is_live(console)))
        say(console, "\n".join(table.notes))
    display.say(f"results.json, table.md, report.png and report.html are in {folder}")


def _check_parallel(grid: Grid) -> None:
    def uses_cuda(cell: Cell) -> bool:
        return cell.config.run.device != "cpu" and torch.cuda.is_available()

    if grid.settings.num_parallel > 1 and any(map(uses_cuda, grid.cells)):
        raise ConfigError(
            f"{grid.path}: num_parallel {grid.settings.num_parallel} is for runs on a CPU, and these would share GPUs; "
            "set num_parallel: 1, or run.device=cpu"
        )


def _command_line(path: Path, overrides: list[str]) -> str:
    return " ".join(["fastrm ablate", str(path), *(f"'{o}'" if set(o) & set(" []{}") else o for o in overrides)])
