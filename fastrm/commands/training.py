"""Commands that train, or predict what training takes: train, plan, ablate, grpo."""

import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from fastrm import cli_options as opts
from fastrm.commands.grouped import grouped
from fastrm.forecast.assumed import PlanOptions
from fastrm.stop import end_with_parent


def train(
    config: opts.RunFile,
    overrides: opts.Overrides = None,
    resume: opts.Resume = "no",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check the configuration and its inputs, print what the run needs, and end."),
    ] = False,
    quiet: opts.Quiet = False,
) -> None:
    """Train a reward model on preferences.

    A YAML file names the data, the model and the settings. The folder run.dir then holds the model (model/), the
    metrics (metrics.jsonl), a page and a picture of them (report.html, report.png), the rows that were refused
    (quarantine.jsonl) and the checkpoints.

    \b
    Example: fastrm train configs/quickstart.yaml optim.lr=1e-4
    """
    from fastrm.config import load_config

    resolved = load_config(config, overrides or [])
    if dry_run:
        from fastrm.forecast.dry_run import dry_run as check
        from fastrm.yaml_files import describe_extended

        if (line := describe_extended(config)) is not None:
            typer.echo(f"{line}.")
        check(resolved)
        return
    from fastrm.train.launch import FAILURE, launch, num_ranks_to_start

    is_watched = FAILURE in os.environ
    if os.environ.get("RANK", "0") == "0" and not is_watched and not quiet:
        typer.echo(resolved.to_yaml(), err=True)
    if (num_ranks := num_ranks_to_start(resolved)) > 1:
        launch(num_ranks, ["train", str(config), *(overrides or []), "--resume", resume, *["--quiet"] * quiet])
        return
    if is_watched:
        end_with_parent(os.getppid(), signal.SIGTERM)
    from fastrm.forecast.room import check_room
    from fastrm.train.loop import train as run

    run(resolved, resume, check=lambda ranks: check_room(resolved, ranks.num_ranks, ranks.num_local))


@grouped
def plan(
    config: opts.RunFile,
    assumed: PlanOptions,
    overrides: opts.Overrides = None,
    json_out: opts.PlanJson = None,
    png_out: opts.PlanPng = None,
) -> None:
    """Predict memory, messages and time of a run on many GPUs.

    A YAML file names the model and the settings; neither GPUs, nor weights, nor data need be here. Printed are what
    was assumed, the memory of a GPU, the messages between GPUs, the time of a step and the days of an epoch, and what
    to change.

    \b
    Example: fastrm plan configs/full.yaml --gpus 64 --gpu h100
    """
    from fastrm.config import load_config
    from fastrm.forecast.command import assume, plan_run

    resolved = load_config(config, overrides or [])
    plan_run(resolved, assume(resolved, assumed), json_out, png_out)


def ablate(
    grid: Annotated[
        Path,
        typer.Argument(metavar="GRID", help="YAML file of a grid, for example configs/ablations/small_head.yaml."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Settings of every run, as optim.lr=1e-5, or keys of the grid's file, as seeds=[0].",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs, which are finished and what they took, and train nothing.")
    ] = False,
) -> None:
    """Train a grid of settings and seeds, and compare the runs.

    A YAML file names the settings, the seeds and the columns of the table. The grid's folder then holds a run for each
    of them, the table (table.md), all figures (results.json) and a picture (report.png). A grid that was stopped goes
    on where it was.

    \b
    Example: fastrm ablate configs/ablations/small_head.yaml
    """
    from fastrm.ablate import command

    if dry_run:
        command.dry_run(grid, overrides or [])
    else:
        command.ablate(grid, overrides or [])


def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Folders of two or more runs, ended or not, as runs/my.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write an HTML page with the curves of all runs too.")
    ] = None,
) -> None:
    """Show runs side by side.

    Printed are the figures of the runs, and the settings in which they differ. The page of --out also lays their
    curves over one another, and has the accuracy by source.

    \b
    Example: fastrm compare runs/quickstart runs/my --out compare.html
    """
    from fastrm.train.run_pages import compare_runs

    compare_runs(runs, out)


def grpo(experiment: opts.GrpoFile, overrides: opts.Overrides = None) -> None:
    """Train a policy with a reward model.

    A YAML file names the policy, questions with true answers, and the rewards; TRL's GRPOTrainer (the extra grpo) does
    the rest. The folder run.dir then holds the policy (policy/), its accuracy before and after with what happened on
    the way (report.json, report.png), and the metrics of each step (metrics.jsonl).

    \b
    Example: fastrm grpo configs/grpo/digits.yaml
    """
    from fastrm.config import load_run
    from fastrm.grpo.config import GrpoConfig
    from fastrm.grpo.run import run_grpo

    run_grpo(load_run(GrpoConfig, experiment, overrides or []))
