"""The options that several `fastrm` commands share: their names, values and help texts.

Loads neither torch nor pydantic, so that --help is instant.
"""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fastrm.errors import ConfigError
from fastrm.names import checked_dtype, device_name


class Combine(StrEnum):
    MEAN = "mean"
    ACCURACY = "accuracy"
    MARGIN = "margin"


def _checked(check: Callable[[object], str]) -> Callable[[str], str]:
    def checked(value: str) -> str:
        try:
            return check(value)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return checked


def _word(choice: Combine | None) -> str | None:
    return choice and choice.value


def split_names(text: str | None) -> list[str]:
    """Return the names in the value of an option, which commas part."""
    return [name.strip() for name in text.split(",") if name.strip()] if text else []


def columns_by_key(text: str | None) -> dict[str, str]:
    """Return what `key=column,key=column` says, by the keys.

    Raises:
        ConfigError: for a value of another form.
    """
    pairs = [name.partition("=") for name in split_names(text)]
    if any(not (key.strip() and column.strip()) for key, _, column in pairs):
        raise ConfigError(f"--columns: got {text!r}, wanted key=column,key=column")
    return {key.strip(): column.strip() for key, _, column in pairs}


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
Images = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="Folder, or tar or zip archive, that the paths of images and videos are relative to; without it, the "
        "folder of the data file.",
    ),
]
DataFormat = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="LAYOUT",
        help="Layout of the rows, as trl or llamafactory; auto tells it row by row from the keys.",
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        callback=columns_by_key,
        metavar="KEY=COLUMN,...",
        help="Names that the file has for the keys, as prompt=question,chosen=better.",
    ),
]
Ignore = Annotated[
    str | None,
    typer.Option(
        callback=split_names,
        metavar="KEY,...",
        help="Keys of the rows that are metadata and are not reported, as url,level.",
    ),
]
TokensPerPack = Annotated[
    int,
    typer.Option(
        min=1, metavar="TOKENS", help="Largest number of tokens in one forward pass; a group with more is refused."
    ),
]
NumWorkers = Annotated[
    int, typer.Option(min=0, metavar="COUNT", help="Number of processes that read and decode images ahead.")
]
EnsembleChoice = Annotated[
    Combine | None,
    typer.Option(
        "--ensemble",
        callback=_word,
        metavar="RULE",
        help="Rule that combines the rewards of several models: mean, or weighted by accuracy or by margin on the "
        "--validation file; without it, the mean, or what an ensemble file says.",
    ),
]
Validation = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="Preferences, the first 1,000 of which give the weights of --ensemble accuracy or margin."
    ),
]
RouteChoice = Annotated[
    str | None,
    typer.Option(
        "--route", metavar="text=MODEL", help="Another model, which scores the inputs that have no image and no video."
    ),
]
SaveEnsemble = Annotated[
    Path | None,
    typer.Option(
        "--save-ensemble",
        metavar="FILE",
        help="Write the ensemble to this YAML file, which can be named in place of a model.",
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
TemplateDate = Annotated[
    str | None,
    typer.Option(
        metavar="DATE",
        help="Date for a chat template that reads the clock, as 2026-07-26; without it, the date that the model was "
        "trained with, or else today's.",
    ),
]
MaxImagePixels = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="PIXELS",
        help="Largest number of pixels in an image; one that declares more is refused before it is decoded.",
    ),
]
MaxImageBytes = Annotated[
    int,
    typer.Option(min=1, metavar="BYTES", help="Largest image file in bytes; a larger one is refused unread."),
]
MaxVideoBytes = Annotated[
    int,
    typer.Option(min=1, metavar="BYTES", help="Largest video file in bytes; a larger one is refused unread."),
]
MaxVideoSeconds = Annotated[
    float,
    typer.Option(
        min=0.0, metavar="SECONDS", help="Longest video in seconds; a longer one is refused before it is decoded."
    ),
]
CheckExactness = Annotated[
    bool,
    typer.Option(
        "--check-exactness/--no-check-exactness",
        help="Compare the first rewards with those of transformers' own model class, and end where they differ by "
        "more than rounding.",
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
Host = Annotated[
    str,
    typer.Option(metavar="ADDRESS", help="Address to listen at; one that others can reach needs a --token."),
]
Port = Annotated[int, typer.Option(min=0, max=65535, metavar="PORT", help="Port to listen at; 0 takes a free one.")]
Token = Annotated[
    str | None,
    typer.Option(
        metavar="TOKEN",
        envvar="FASTRM_TOKEN",
        show_envvar=False,
        help="Secret that requests have to send as Authorization: Bearer TOKEN; without it, FASTRM_TOKEN of the "
        "environment, where other users of the machine do not see it.",
    ),
]
MaxQueue = Annotated[
    int, typer.Option(min=1, metavar="GROUPS", help="Largest number of groups that wait; more are refused with 503.")
]
MaxConnections = Annotated[
    int,
    typer.Option(
        min=1, metavar="CONNECTIONS", help="Largest number of connections that are open; more get 503 and are closed."
    ),
]
ServeWorkers = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="COUNT",
        help="Number of processes with the models, one for each GPU; requests about one prompt go to the same.",
    ),
]
WindowMs = Annotated[
    float,
    typer.Option(min=0.0, metavar="MILLISECONDS", help="Time that the first group waits for others of its prompt."),
]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic", help="Compute every group by itself, so that no other request changes a bit of its rewards."
    ),
]
MaxBodyBytes = Annotated[
    int, typer.Option(min=1, metavar="BYTES", help="Largest body of a request; a larger one is refused unread.")
]
MaxGroups = Annotated[int, typer.Option(min=1, metavar="GROUPS", help="Largest number of groups in one request.")]
MaxResponses = Annotated[int, typer.Option(min=1, metavar="N", help="Largest number of responses of one group.")]
ImageRoot = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Folder of images that requests may name by path; without it, none is opened."),
]
AllowImageUrls = Annotated[
    bool,
    typer.Option(
        "--allow-image-urls", help="Fetch the images that requests name by URL, from public addresses, no redirects."
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
GpuCount = Annotated[int, typer.Option(min=1, metavar="COUNT", help="Number of GPUs of the run, in nodes of eight.")]
GpuKind = Annotated[str, typer.Option(metavar="NAME", help="Kind of GPU: a100, h100, h200 or b200.")]
PairCount = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="COUNT",
        help="Number of preferences in an epoch; without it, they are counted in data.train, or taken from "
        "the BaseReward recipe where data.train is missing or large.",
    ),
]
Imbalance = Annotated[
    float,
    typer.Option(min=1.0, metavar="RATIO", help="Time of the slowest rank, as a multiple of the ranks' mean time."),
]
NvlinkSpeed = Annotated[
    float | None,
    typer.Option(
        min=0.001,
        metavar="GB/S",
        help="Speed of messages inside a node, in GB/s for each GPU; without it, 80 % of the GPU's datasheet.",
    ),
]
NetworkSpeed = Annotated[
    float | None,
    typer.Option(
        min=0.001,
        metavar="GB/S",
        help="Speed of messages between nodes, in GB/s for each GPU; without it, 80 % of a 400 Gb/s card.",
    ),
]
Latency = Annotated[
    float,
    typer.Option(
        min=0.0, metavar="MICROSECONDS", help="Time that a message takes from one GPU to the next, in microseconds."
    ),
]
Overlap = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        metavar="SHARE",
        help="Share of the messages, 0 to 1, that travel while the GPUs compute; without it, one that is assumed "
        "for the ZeRO stage.",
    ),
]
RateShare = Annotated[
    float | None,
    typer.Option(
        min=0.001,
        max=1.0,
        metavar="SHARE",
        help="Share of the datasheet's bf16 rate, 0 to 1, that a step reaches; without it, the rate measured in "
        "--results, or one that is assumed.",
    ),
]
Reserve = Annotated[
    float, typer.Option(min=0.0, metavar="GB", help="Memory of each GPU to leave free, in GB of 10^9 bytes.")
]
Results = Annotated[
    Path,
    typer.Option(
        metavar="FOLDER", help="Folder of the training steps that bench/training/run_training.py measured."
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
FiguresJson = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to this JSON file too.")
]
FiguresPng = Annotated[
    Path | None,
    typer.Option("--png", metavar="FILE", help="Draw the figures of a benchmark into this PNG file."),
]
CheckModel = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Folder or hub id of the model whose tokenizer reads every row and shows the first; without it, "
        "model.path of a configuration.",
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
ExportFolder = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder to write, new or empty.")]
Reader = Annotated[
    str,
    typer.Option("--for", metavar="READER", help="Program that is to load the folder: transformers or vllm."),
]
