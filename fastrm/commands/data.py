"""Commands on preference data: prepare, check, show, sets."""

from pathlib import Path
from typing import Annotated

import typer

from fastrm import cli_options as opts
from fastrm.commands.grouped import can_be_quiet, grouped
from fastrm.evaluate.options import RowOptions


@can_be_quiet
def prepare_data(config: opts.RunFile, overrides: opts.Overrides = None, workers: opts.Workers = None) -> None:
    """Read, check, group and count a run's data ahead of time.

    A YAML file names the data. The folder data.prepared, or run.dir/prepared, then holds the set that runs train
    from, with a report of what was kept, refused, merged and removed. A preparation that was killed goes on where it
    stopped.

    \b
    Example: fastrm data prepare configs/quickstart.yaml
    """
    from fastrm.config import load_config
    from fastrm.train.data import prepare_ahead

    prepare_ahead(load_config(config, overrides or []), workers)


@grouped
def check_data(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE",
            help="Data files or folders, or YAML configurations of runs, of which all sources are checked.",
        ),
    ],
    rows: RowOptions,
    model: opts.CheckModel = None,
    scoring: Annotated[
        bool, typer.Option("--scoring", help="Check rows that are to be scored, which need no preference.")
    ] = False,
    max_refused: opts.MaxRefused = "1%",
    workers: opts.Workers = None,
) -> None:
    """Show what data files are read as, and what is wrong in them.

    Every row of the files is read as for training. Printed are the layouts and keys that were found, the rows that
    are refused and why, keys that are not read, copies, contradictions, and the first row as a model reads it.

    \b
    Example: fastrm data check train.jsonl
    """
    from fastrm.train.check_command import check_data as check

    check(files, model=model, reading=rows.as_source, scoring=scoring, max_refused=max_refused, num_workers=workers)


@grouped
def show_data(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Data file or folder, digits:eval, the folder of a prepared set or of a run that has one, or a YAML "
            "configuration of a run, of which all sources are shown.",
        ),
    ],
    rows: RowOptions,
    count: Annotated[int, typer.Option("-n", min=1, metavar="ROWS", help="Number of rows of each source.")] = 20,
    model: opts.ShowModel = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write an HTML page with the images, in place of printing.")
    ] = None,
) -> None:
    """Show rows of data as a model reads them.

    The first rows are shown with what their responses share, chosen and rejected responses side by side with their
    differences marked, the number of tokens, and the reason of a row that is refused. The page of --out also
    shows the images.

    \b
    Example: fastrm data show train.jsonl -n 5 --out rows.html
    """
    from fastrm.train.show_command import show_data as show

    show(source, model=model, reading=rows.as_source, count=count, out=out)


def data_sets() -> None:
    """List the published preference sets that can be named as data.

    A data source `set: NAME` in a run's YAML file reads one of them. Printed are the names, sizes, places on the hub,
    layouts, images and licences.

    \b
    Example: fastrm data sets
    """
    from fastrm.data.sources.published import print_sets

    print_sets()
