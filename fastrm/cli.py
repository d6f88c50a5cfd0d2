"""The `fastrm` command. Heavy imports happen inside the commands, so that --help is instant."""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fastrm import errors
from fastrm.errors import ConfigError, FastrmError
from fastrm.names import checked_dtype, device_name
from fastrm.stop import StopFlag, end_with_parent, fail

app = typer.Typer(
    help="Train and evaluate scalar reward models for multimodal LLMs, and score responses with them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Preference data: published sets, and preparing for training.", no_args_is_help=True)
app.add_typer(data_app, name="data")


class Combine(StrEnum):
    MEAN = "mean"
    ACCURACY = "accuracy"
    MARGIN = "margin"


Models = Annotated[list[Path], typer.Argument(help="model/ folders of runs, other reward models, or one ensemble file")]
Images = Annotated[str | None, typer.Option(help="Folder or archive of the images")]
DataFormat = Annotated[str, typer.Option("--format", help="Layout of the rows")]
Columns = Annotated[str | None, typer.Option(help="The file's names for the keys, as prompt=question,chosen=better")]
Ignore = Annotated[str | None, typer.Option(help="Keys that are metadata, as url,level")]
TokensPerPack = Annotated[int, typer.Option(min=1, help="Token budget of one forward pass; each group must fit")]
NumWorkers = Annotated[int, typer.Option(min=0, help="Processes that decode images ahead")]
EnsembleChoice = Annotated[
    Combine | None, typer.Option("--ensemble", help="Of several models: mean of rewards (default), or weights by that")
]
Validation = Annotated[str | None, typer.Option(help="Preferences, the first 1,000 of which give the weights")]
RouteChoice = Annotated[
    str | None, typer.Option("--route", help="text=MODEL: that model for inputs without images or videos")
]
SaveEnsemble = Annotated[Path | None, typer.Option(help="Write a YAML file that can be used as a model")]


def _checked(check: Callable[[object], str]) -> Callable[[str], str]:
    def checked(value: str) -> str:
        try:
            return check(value)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return checked


DeviceChoice = Annotated[
    str,
    typer.Option(callback=_checked(device_name), help="auto (cuda if there is one), cpu, cuda, or a GPU as cuda:1"),
]
DtypeChoice = Annotated[
    str,
    typer.Option(
        callback=_checked(checked_dtype),
        help="Precision of the backbone: auto, fp32, bf16 or fp16; auto: bf16 or fp16 where the files have it, else "
        "bf16 on cuda, fp32 on cpu",
    ),
]
TemplateDate = Annotated[
    str | None,
    typer.Option(help="For a chat template that reads the clock, as 2026-07-26; default: that of training, else today"),
]
MaxImagePixels = Annotated[int, typer.Option(min=1, help="Refuse images that declare more, before decoding")]
MaxImageBytes = Annotated[int, typer.Option(min=1, help="Refuse image files with more bytes, before reading")]
MaxVideoBytes = Annotated[int, typer.Option(min=1, help="Refuse video files with more bytes, before reading")]
MaxVideoSeconds = Annotated[float, typer.Option(min=0.0, help="Refuse longer videos, before decoding")]
CheckExactness = Annotated[
    bool, typer.Option("--check-exactness/--no-check-exactness", help="Compare first rewards with transformers' own")
]
# Those of fastrm.data.images.MediaLimits, whose import would slow --help down.
MAX_IMAGE_PIXELS = 50_000_000
MAX_IMAGE_BYTES = 64 * 2**20
MAX_VIDEO_BYTES = 512 * 2**20
MAX_VIDEO_SECONDS = 3600.0


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML configuration, for example configs/quickstart.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, for example optim.lr=1e-5")] = None,
    resume: Annotated[str, typer.Option(help="no, auto (if there is a checkpoint), required, or a checkpoint")] = "no",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the configuration and print what it needs")] = False,
) -> None:
    """Train a reward model from preference data."""
    from fastrm.config import load_config

    resolved = load_config(config, overrides or [])
    if dry_run:
        from fastrm.forecast.dry_run import dry_run as check

        check(resolved)
        return
    from fastrm.train.launch import FAILURE, launch, num_ranks_to_start

    is_watched = FAILURE in os.environ
    if os.environ.get("RANK", "0") == "0" and not is_watched:
        typer.echo(resolved.to_yaml(), err=True)
    if (num_ranks := num_ranks_to_start(resolved)) > 1:
        launch(num_ranks, ["train", str(config), *(overrides or []), "--resume", resume])
        return
    if is_watched:
        end_with_parent(os.getppid(), signal.SIGTERM)
    from fastrm.forecast.room import check_room
    from fastrm.train.loop import train as run

    run(resolved, resume, check=lambda ranks: check_room(resolved, ranks.num_ranks, ranks.num_local))


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="YAML configuration, for example configs/full.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, as engine.zero_stage=3")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs")] = 1,
    gpu: Annotated[str, typer.Option(help="a100, h100, h200 or b200")] = "h100",
    pairs: Annotated[int | None, typer.Option(min=1, help="Of an epoch; default: counted, or the recipe's")] = None,
    imbalance: Annotated[float, typer.Option(min=1.0, help="Slowest over mean rank")] = 1.05,
    nvlink_gbs: Annotated[float | None, typer.Option(min=0.001, help="GB/s of messages inside a node")] = None,
    network_gbs: Annotated[float | None, typer.Option(min=0.001, help="GB/s between nodes, for each GPU")] = None,
    latency_us: Annotated[float, typer.Option(min=0.0, help="Of a hop from GPU to GPU")] = 5.0,
    overlap: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Share of messages beside computing")] = None,
    rate_share: Annotated[float | None, typer.Option(min=0.001, max=1.0, help="Of the datasheet's bf16 rate")] = None,
    reserve_gb: Annotated[float, typer.Option(min=0.0, help="GPU memory to leave free")] = 4.0,
    results: Annotated[Path, typer.Option(help="Folder of measured training steps")] = Path("bench/results"),
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the plan to this file too")] = None,
    png_out: Annotated[Path | None, typer.Option("--png", help="Draw scaling and step time")] = None,
) -> None:
    """Predict memory, communication and step time of a run on many GPUs; needs none."""
    from fastrm.config import load_config
    from fastrm.forecast.command import plan_run

    plan_run(
        load_config(config, overrides or []), gpus, gpu, num_pairs=pairs, imbalance=imbalance, nvlink_gbs=nvlink_gbs,
        network_gbs=network_gbs, latency_us=latency_us, overlap=overlap, rate_share=rate_share, reserve_gb=reserve_gb,
        results=results, json_out=json_out, png_out=png_out,
    )  # fmt: skip


@app.command()
def ablate(
    grid: Annotated[Path, typer.Argument(help="YAML file of a grid, for example configs/ablations/small_head.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value for every cell; key=value of the grid, as seeds=[0]")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells and what each costs")] = False,
    gpus: Annotated[int, typer.Option(min=1, help="Of the costs: number of GPUs of a run")] = 8,
    gpu: Annotated[str, typer.Option(help="Of the costs: a100, h100, h200 or b200")] = "h100",
) -> None:
    """Train a grid of settings and seeds, and compare them in one table; goes on where it was stopped."""
    from fastrm.ablate import command

    if dry_run:
        command.dry_run(grid, overrides or [], gpus, gpu)
    else:
        command.ablate(grid, overrides or [])


@app.command()
def score(
    models: Models,
    data: Annotated[str, typer.Argument(help="Groups to score: JSON Lines, JSON or Parquet, in any known layout")],
    out: Annotated[Path, typer.Option(help="JSON Lines: {id, rewards} for each group, in input order")],
    images: Images = None,
    data_format: DataFormat = "auto",
    columns: Columns = None,
    ignore: Ignore = None,
    ensemble: EnsembleChoice = None,
    validation: Validation = None,
    route: RouteChoice = None,
    save_ensemble: SaveEnsemble = None,
    tokens_per_pack: TokensPerPack = 32768,
    num_workers: NumWorkers = 1,
    device: DeviceChoice = "auto",
    dtype: DtypeChoice = "auto",
    template_date: TemplateDate = None,
    max_image_pixels: MaxImagePixels = MAX_IMAGE_PIXELS,
    max_image_bytes: MaxImageBytes = MAX_IMAGE_BYTES,
    max_video_bytes: MaxVideoBytes = MAX_VIDEO_BYTES,
    max_video_seconds: MaxVideoSeconds = MAX_VIDEO_SECONDS,
    check_exactness: CheckExactness = True,
) -> None:
    """Write the rewards of a file's responses."""
    from fastrm.evaluate.files import score_file
    from fastrm.evaluate.models import ModelChoice, ScoringOptions

    options = ScoringOptions(
        images=images, data_format=data_format, columns=_pairs(columns), ignore=_names(ignore),
        tokens_per_pack=tokens_per_pack, num_workers=num_workers,
        device=device, dtype=dtype, template_date=template_date,
        max_image_pixels=max_image_pixels, max_image_bytes=max_image_bytes, max_video_bytes=max_video_bytes,
        max_video_seconds=max_video_seconds, check_exactness=check_exactness,
    )  # fmt: skip
    choice = ModelChoice(tuple(models), ensemble and ensemble.value, validation, route, save_ensemble)
    score_file(choice, data, out, options)


@app.command("eval")
def evaluate(
    models_and_data: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL]... DATA",
            help="Models (model/ folders of runs, other reward models, or one ensemble file), then preferences or "
            "bench:NAME, with NAME one of vl_rewardbench, mm_rlhf_rewardbench, multimodal_rewardbench, rewardbench, "
            "rewardbench2, rm_bench",
        ),
    ],
    images: Images = None,
    data_format: DataFormat = "auto",
    columns: Columns = None,
    ignore: Ignore = None,
    bench_data: Annotated[str | None, typer.Option("--data", help="Of a benchmark: its file, folder or hub id")] = None,
    scores: Annotated[
        Path | None, typer.Option(help="Somebody else's scores in place of models: a line {rewards} for each row")
    ] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file too")] = None,
    png_out: Annotated[Path | None, typer.Option("--png", help="Draw a benchmark's figures")] = None,
    ensemble: EnsembleChoice = None,
    validation: Validation = None,
    route: RouteChoice = None,
    save_ensemble: SaveEnsemble = None,
    tokens_per_pack: TokensPerPack = 32768,
    num_workers: NumWorkers = 1,
    device: DeviceChoice = "auto",
    dtype: DtypeChoice = "auto",
    template_date: TemplateDate = None,
    max_image_pixels: MaxImagePixels = MAX_IMAGE_PIXELS,
    max_image_bytes: MaxImageBytes = MAX_IMAGE_BYTES,
    max_video_bytes: MaxVideoBytes = MAX_VIDEO_BYTES,
    max_video_seconds: MaxVideoSeconds = MAX_VIDEO_SECONDS,
    check_exactness: CheckExactness = True,
) -> None:
    """Print pair accuracy overall and per source, or a benchmark's metrics; equal rewards count as wrong."""
    from fastrm.evaluate.command import evaluate as run
    from fastrm.evaluate.models import ModelChoice, ScoringOptions

    options = ScoringOptions(
        images=images, data_format=data_format, columns=_pairs(columns), ignore=_names(ignore),
        tokens_per_pack=tokens_per_pack, num_workers=num_workers,
        device=device, dtype=dtype, template_date=template_date,
        max_image_pixels=max_image_pixels, max_image_bytes=max_image_bytes, max_video_bytes=max_video_bytes,
        max_video_seconds=max_video_seconds, check_exactness=check_exactness,
    )  # fmt: skip
    *models, data = models_and_data
    choice = ModelChoice(tuple(map(Path, models)), ensemble and ensemble.value, validation, route, save_ensemble)
    run(choice, data, options, bench_data=bench_data, scores=scores, json_out=json_out, png_out=png_out)


@data_app.command("prepare")
def prepare_data(
    config: Annotated[Path, typer.Argument(help="YAML configuration, for example configs/quickstart.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, as data.prepared=FOLDER")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: all cores")] = None,
) -> None:
    """Read, check, group and count a run's data ahead of time; a killed preparation goes on where it stopped."""
    from fastrm.config import load_config
    from fastrm.train.data import prepare_ahead

    prepare_ahead(load_config(config, overrides or []), workers)


@data_app.command("check")
def check_data(
    files: Annotated[
        list[str],
        typer.Argument(help="Data files or folders, or configurations (.yaml), whose sources are all checked"),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Model whose tokenizer reads every row and shows the first; default: the config's"),
    ] = None,
    images: Images = None,
    data_format: DataFormat = "auto",
    columns: Columns = None,
    ignore: Ignore = None,
    scoring: Annotated[
        bool, typer.Option("--scoring", help="The rows are to be scored: they need no preference")
    ] = False,
    max_refused: Annotated[str, typer.Option(help="Share of rows that may be refused; more: exit code 65")] = "1%",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: all cores")] = None,
) -> None:
    """Show what data files are read as, and what is refused, unread, repeated, contradictory or one-sided in them."""
    from fastrm.train.check_command import check_data as check

    reading = {"images": images, "format": data_format, "columns": _pairs(columns), "ignore": _names(ignore)}
    check(files, model=model, reading=reading, scoring=scoring, max_refused=max_refused, num_workers=workers)


def _names(text: str | None) -> list[str]:
    """The names of an option, which commas part."""
    return [name.strip() for name in text.split(",") if name.strip()] if text else []


def _pairs(text: str | None) -> dict[str, str]:
    """The columns of an option, by the keys that they stand for."""
    pairs = [name.partition("=") for name in _names(text)]
    if any(not (key.strip() and column.strip()) for key, _, column in pairs):
        raise ConfigError(f"--columns: got {text!r}, wanted key=column,key=column")
    return {key.strip(): column.strip() for key, _, column in pairs}


@data_app.command("sets")
def data_sets() -> None:
    """List the published sets that `set: NAME` of a data source reads."""
    from fastrm.data.sources.published import print_sets

    print_sets()


def main() -> None:
    """Entry point: errors become one readable message, an exit code and a last line of JSON."""
    # The tokenizers library would warn when a data worker forks after it was used.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Packs differ in size: fixed segments of CUDA memory would be left half empty. torch reads this when it is first
    # imported, and the older name where the newer is not set.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # transformers imports torchao where it is installed, and that warns, with paths, of extensions for other
    # devices and formats that nothing here uses.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    errors.is_command_line = True
    try:
        with StopFlag(breaks=True) as stop:
            code = _run(stop)
    finally:
        errors.is_command_line = False
    sys.exit(code)


def _run(stop: StopFlag) -> int:
    """Carry out the command line; returns the exit code."""
    try:
        code = app(standalone_mode=False) or 0
        if code == 130:  # how typer passes KeyboardInterrupt on, in some versions
            raise KeyboardInterrupt
        stop.leave()
        return code
    except FastrmError as error:
        stop.leave()
        return fail(error.exit_code, getattr(error, "kind", type(error).__name__), str(error))
    except (KeyboardInterrupt, typer.Abort):
        stop.leave()
        return fail(75, "Interrupted", f"stopped by {stop.signal or 'Ctrl-C'}; nothing was written")
    except typer.Exit as leave:
        return leave.exit_code
    except OSError as error:
        return fail(74, type(error).__name__, f"{error.filename or 'file system'}: {error.strerror or error}")
    except Exception as error:
        # Usage errors come from click, which typer may carry inside itself: known by what they offer.
        if hasattr(error, "format_message"):
            return fail(64, "UsageError", f"{error.format_message().rstrip('.')}; see fastrm --help")
        message = f"internal error: {error}; please report it with the lines above"
        return fail(70, type(error).__name__, message, traceback.format_exc())


if __name__ == "__main__":
    main()
