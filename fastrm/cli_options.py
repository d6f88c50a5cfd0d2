"""The options of `fastrm` commands that come to them one by one: their names, values and help texts.

Those that come as objects are in commands/fields.py. Loads neither torch nor pydantic, so that --help is instant.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from fastrm.names import checked_dtype, device_name


def _checked(check: Callable[[object], str]) -> Callable[[str], str]:
    def checked(value: str) -> str:
        try:
            return check(value)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return checked


RunFile = Annotated[
    Path, typer.Argument(help="YAML configuration of the run, for example configs/quickstart.yaml.", metavar="CONFIG")
]
GrpoFile = Annotated[
    Path, typer.Argument(help="YAML configuration, for example configs/grpo/digits.yaml.", metavar="CONFIG")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings that replace those of the file, as optim.lr=1e-5.", metavar="SECTION.KEY=VALUE"),
]


def _be_quiet(value: bool) -> bool:
    from fastrm.ui import be_quiet

    be_quiet(value)
    return value


Quiet = Annotated[
    bool, typer.Option("--quiet", callback=_be_quiet, help="Show no progress and no remarks; errors alone.")
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, metavar="COUNT", help="Number of processes that read rows; without it, one for each core."),
]
Models = Annotated[
    list[Path],
    typer.Argument(
        metavar="MODEL",
        help="Reward models: the model/ folders of runs, reward models of other trainers, or one ensemble file.",
    ),
]
DeviceChoice = Annotated[
    str,
    typer.Option(
        callback=_checked(device_name),
        metavar="DEVICE",
        help="Device that computes: auto (a GPU if there is one), cpu, cuda, or one GPU by its number, as cuda:1.",
    ),
]
DtypeChoice = Annotated[
    str,
    typer.Option(
        callback=_checked(checked_dtype),
        metavar="DTYPE",
        help="Precision of the backbone: fp32, bf16, fp16 or auto, which is that of the model's files where they are "
        "bf16 or fp16, and else bf16 on a GPU and fp32 on a CPU.",
    ),
]
ServedModels = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL",
        help="Reward models as for fastrm score; requests choose one by its name, which is the path as written "
        "here, or NAME for NAME=MODEL.",
    ),
]
Resume = Annotated[
    str,
    typer.Option(
        metavar="WHICH",
        help="Checkpoint to go on from: no (none), auto (the newest, if there is one), required (the newest, and "
        "there must be one), or the folder of one.",
    ),
]
PlanJson = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the plan to this JSON file too.")]
PlanPng = Annotated[
    Path | None,
    typer.Option("--png", metavar="FILE", help="Draw scaling and the time of a step into this PNG file."),
]
BenchData = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="PATH",
        help="File, folder or hub id of the benchmark that bench:NAME names; without it, its place on the hub.",
    ),
]
Scores = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Scores to measure in place of models: JSON Lines with {rewards} for each row of the benchmark.",
    ),
]
Written = Annotated[
    Path | None,
    typer.Option(
        "--from",
        metavar="FILE",
        help="Texts of a judge or critic to measure without generating: JSON Lines of {id, order, text}, order being "
        "the responses' numbers as shown.",
    ),
]
Generations = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="File that keeps what a judge or critic generates, and from which it goes on; default: "
        "runs/judges/NAME.jsonl.",
    ),
]
Costs = Annotated[
    bool,
    typer.Option(
        "--costs",
        help="Measure in place of accuracy what it costs to judge a pair and a group of eight: tokens, operations, "
        "seconds, memory.",
    ),
]
CheckModel = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Folder or hub id of the model whose tokenizer reads every row and shows the first; without it, "
        "model.path of a configuration.",
    ),
]
ShowModel = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Folder or hub id of the model whose tokenizer reads the rows; without it, model.path of a "
        "configuration, or words and characters are counted.",
    ),
]
MaxRefused = Annotated[
    str,
    typer.Option(
        metavar="SHARE",
        help="Largest share of rows that may be refused, as 1% or 0.01; with more, the exit code is 65.",
    ),
]
ExportedModel = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Reward model: a folder, a run or a hub id, of fastrm or another trainer."),
]
ExportFolder = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FOLDER",
        help="Folder to write, new or empty; with --step or --best it may be left out, and is exports/step-N in the "
        "folder of the run.",
    ),
]
Reader = Annotated[
    str,
    typer.Option("--for", metavar="READER", help="Program that is to load the folder: transformers or vllm."),
]
