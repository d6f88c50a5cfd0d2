"""The options of commands that come to them as objects: by field of each object, how typer takes it.

So an option that several commands share has one name, one help text and one default: the object's. Fields without an
entry keep their default, or are the command's own parameters. Loads neither torch nor pydantic.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fastrm import cli_options as opts
from fastrm.errors import ConfigError
from fastrm.evaluate.options import JudgeTexts, ModelChoice, Outputs, RowOptions, ScoringOptions
from fastrm.forecast.assumed import PlanOptions
from fastrm.limits import MediaLimits
from fastrm.serve.settings import ServeSettings


class Combine(StrEnum):
    MEAN = "mean"
    ACCURACY = "accuracy"
    MARGIN = "margin"


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


_LIMITS = {
    "max_image_pixels": Annotated[
        int,
        typer.Option(
            min=1,
            metavar="PIXELS",
            help="Largest number of pixels in an image; one that declares more is refused before it is decoded.",
        ),
    ],
    "max_image_bytes": Annotated[
        int,
        typer.Option(min=1, metavar="BYTES", help="Largest image file in bytes; a larger one is refused unread."),
    ],
    "max_video_bytes": Annotated[
        int,
        typer.Option(min=1, metavar="BYTES", help="Largest video file in bytes; a larger one is refused unread."),
    ],
    "max_video_seconds": Annotated[
        float,
        typer.Option(
            min=0.0, metavar="SECONDS", help="Longest video in seconds; a longer one is refused before it is decoded."
        ),
    ],
}
_ROWS = {
    "images": Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Folder, or tar or zip archive, that the paths of images and videos are relative to; without it, the "
            "folder of the data file.",
        ),
    ],
    "data_format": Annotated[
        str,
        typer.Option(
            "--format",
            metavar="LAYOUT",
            help="Layout of the rows, as trl or llamafactory; auto tells it row by row from the keys.",
        ),
    ],
    "columns": Annotated[
        str | None,
        typer.Option(
            callback=columns_by_key,
            metavar="KEY=COLUMN,...",
            help="Names that the file has for the keys, as prompt=question,chosen=better.",
        ),
    ],
    "ignore": Annotated[
        str | None,
        typer.Option(
            callback=split_names,
            metavar="KEY,...",
            help="Keys of the rows that are metadata and are not reported, as url,level.",
        ),
    ],
}
_SCORING = {
    "rows": RowOptions,
    "tokens_per_pack": Annotated[
        int,
        typer.Option(
            min=1, metavar="TOKENS", help="Largest number of tokens in one forward pass; a group with more is refused."
        ),
    ],
    "num_workers": Annotated[
        int, typer.Option(min=0, metavar="COUNT", help="Number of processes that read and decode images ahead.")
    ],
    "device": opts.DeviceChoice,
    "dtype": opts.DtypeChoice,
    "template_date": Annotated[
        str | None,
        typer.Option(
            metavar="DATE",
            help="Date for a chat template that reads the clock, as 2026-07-26; without it, the date that the model "
            "was trained with, or else today's.",
        ),
    ],
    "limits": MediaLimits,
    "check_exactness": Annotated[
        bool,
        typer.Option(
            "--check-exactness/--no-check-exactness",
            help="Compare the first rewards with those of transformers' own model class, and end where they differ by "
            "more than rounding.",
        ),
    ],
    "normalize": Annotated[
        bool,
        typer.Option(
            "--normalize",
            help="Subtract the mean of held-out rewards and divide by their deviation, both stored with the model.",
        ),
    ],
}
_CHOICE = {
    "combine": Annotated[
        Combine | None,
        typer.Option(
            "--ensemble",
            callback=_word,
            metavar="RULE",
            help="Rule that combines the rewards of several models: mean, or weighted by accuracy or by margin on the "
            "--validation file; without it, the mean, or what an ensemble file says.",
        ),
    ],
    "validation": Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Preferences, the first 1,000 of which give the weights of --ensemble accuracy or margin.",
        ),
    ],
    "route": Annotated[
        str | None,
        typer.Option(
            "--route",
            metavar="text=MODEL",
            help="Another model, which scores the inputs that have no image and no video.",
        ),
    ],
    "save": Annotated[
        Path | None,
        typer.Option(
            "--save-ensemble",
            metavar="FILE",
            help="Write the ensemble to this YAML file, which can be named in place of a model.",
        ),
    ],
    "compare": Annotated[
        bool,
        typer.Option(
            "--compare", help="Set two models side by side, with McNemar's exact test, in place of an ensemble."
        ),
    ],
}
_OUTPUTS = {
    "json": Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures to this JSON file too.")],
    "png": Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the figures of a benchmark into this PNG file.")
    ],
    "report": Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write an HTML page: accuracy, rewards, calibration, length, and the most confident mistakes.",
        ),
    ],
}
_SERVING = {
    "host": Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="Address to listen at; one that others can reach needs a --token."),
    ],
    "port": Annotated[
        int, typer.Option(min=0, max=65535, metavar="PORT", help="Port to listen at; 0 takes a free one.")
    ],
    "token": Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            envvar="FASTRM_TOKEN",
            show_envvar=False,
            help="Secret that requests have to send as Authorization: Bearer TOKEN; without it, FASTRM_TOKEN of the "
            "environment, where other users of the machine do not see it.",
        ),
    ],
    "workers": Annotated[
        int,
        typer.Option(
            min=1,
            metavar="COUNT",
            help="Number of processes with the models, one for each GPU; requests about one prompt go to the same.",
        ),
    ],
    "max_queue": Annotated[
        int,
        typer.Option(min=1, metavar="GROUPS", help="Largest number of groups that wait; more are refused with 503."),
    ],
    "window_ms": Annotated[
        float,
        typer.Option(min=0.0, metavar="MILLISECONDS", help="Time that the first group waits for others of its prompt."),
    ],
    "deterministic": Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="Compute every group by itself, so that no other request changes a bit of its rewards.",
        ),
    ],
    "max_connections": Annotated[
        int,
        typer.Option(
            min=1,
            metavar="CONNECTIONS",
            help="Largest number of connections that are open; more get 503 and are closed.",
        ),
    ],
    "max_body_bytes": Annotated[
        int, typer.Option(min=1, metavar="BYTES", help="Largest body of a request; a larger one is refused unread.")
    ],
    "max_groups": Annotated[
        int, typer.Option(min=1, metavar="GROUPS", help="Largest number of groups in one request.")
    ],
    "max_responses": Annotated[int, typer.Option(min=1, metavar="N", help="Largest number of responses of one group.")],
    "image_root": Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Folder of images that requests may name by path; without it, none is opened."
        ),
    ],
    "allow_image_urls": Annotated[
        bool,
        typer.Option(
            "--allow-image-urls",
            help="Fetch the images that requests name by URL, from public addresses, no redirects.",
        ),
    ],
}
_PLANNING = {
    "gpus": Annotated[int, typer.Option(min=1, metavar="COUNT", help="Number of GPUs of the run, in nodes of eight.")],
    "gpu": Annotated[str, typer.Option(metavar="NAME", help="Kind of GPU: a100, h100, h200, rtx4090 or b200.")],
    "pairs": Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="COUNT",
            help="Number of preferences in an epoch; without it, they are counted in data.train, or taken from "
            "the BaseReward recipe where data.train is missing or large.",
        ),
    ],
    "imbalance": Annotated[
        float,
        typer.Option(min=1.0, metavar="RATIO", help="Time of the slowest rank, as a multiple of the ranks' mean time."),
    ],
    "nvlink_gbs": Annotated[
        float | None,
        typer.Option(
            min=0.001,
            metavar="GB/S",
            help="Speed of messages inside a node, in GB/s for each GPU; without it, 80 % of the GPU's datasheet.",
        ),
    ],
    "network_gbs": Annotated[
        float | None,
        typer.Option(
            min=0.001,
            metavar="GB/S",
            help="Speed of messages between nodes, in GB/s for each GPU; without it, 80 % of a 400 Gb/s card.",
        ),
    ],
    "latency_us": Annotated[
        float,
        typer.Option(
            min=0.0, metavar="MICROSECONDS", help="Time that a message takes from one GPU to the next, in microseconds."
        ),
    ],
    "overlap": Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            metavar="SHARE",
            help="Share of the messages, 0 to 1, that travel while the GPUs compute; without it, one that is assumed "
            "for the ZeRO stage.",
        ),
    ],
    "rate_share": Annotated[
        float | None,
        typer.Option(
            min=0.001,
            max=1.0,
            metavar="SHARE",
            help="Share of the datasheet's bf16 rate, 0 to 1, that a step reaches; without it, the rate measured in "
            "--results, or one that is assumed.",
        ),
    ],
    "reserve_gb": Annotated[
        float, typer.Option(min=0.0, metavar="GB", help="Memory of each GPU to leave free, in GB of 10^9 bytes.")
    ],
    "results": Annotated[
        Path,
        typer.Option(
            metavar="FOLDER", help="Folder of the training steps that bench/training/run_training.py measured."
        ),
    ],
}
_TEXTS = {
    "written": opts.Written,
    "generations": opts.Generations,
    "given": Annotated[
        bool,
        typer.Option(
            "--given-critiques",
            help="Read a critic's rewards behind the critiques that the rows hold themselves, and generate none.",
        ),
    ],
    "votes": Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="COUNT",
            help="Texts for each question, in the place of the SPEC's votes; more than one need a temperature.",
        ),
    ],
    "max_tokens": Annotated[
        int | None,
        typer.Option(min=1, metavar="TOKENS", help="Longest text that is generated, in the place of the SPEC's."),
    ],
    "temperature": Annotated[
        float | None,
        typer.Option(min=0.0, metavar="T", help="Temperature of generated texts, in the place of the SPEC's."),
    ],
}
FIELDS = {
    MediaLimits: _LIMITS,
    RowOptions: _ROWS,
    ScoringOptions: _SCORING,
    ModelChoice: _CHOICE,
    Outputs: _OUTPUTS,
    JudgeTexts: _TEXTS,
    ServeSettings: _SERVING,
    PlanOptions: _PLANNING,
}
