"""The `fastrm` command. Heavy imports happen inside the commands, so that --help is instant."""

import json
import logging
import os
import sys
import traceback
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fastrm.errors import FastrmError

app = typer.Typer(
    help="Train and evaluate scalar reward models for multimodal LLMs, and score responses with them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Device(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Dtype(StrEnum):
    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"


Model = Annotated[Path, typer.Argument(help="model/ folder of a run")]
Images = Annotated[str | None, typer.Option(help="Folder or archive of the images")]
DataFormat = Annotated[str, typer.Option("--format", help="Layout of the rows")]
TokensPerPack = Annotated[int, typer.Option(min=1, help="Token budget of one forward pass; each group must fit")]
NumWorkers = Annotated[int, typer.Option(min=0, help="Processes that decode images ahead")]
DeviceChoice = Annotated[Device, typer.Option(help="auto: cuda if there is one")]
DtypeChoice = Annotated[Dtype, typer.Option(help="Precision of the backbone; auto: bf16 on cuda, else fp32")]
MaxImagePixels = Annotated[int, typer.Option(min=1, help="Refuse images that declare more, before decoding")]
MaxImageBytes = Annotated[int, typer.Option(min=1, help="Refuse image files with more bytes, before reading")]
# Those of fastrm.data.images.ImageLimits, whose import would slow --help down.
MAX_IMAGE_PIXELS = 50_000_000
MAX_IMAGE_BYTES = 64 * 2**20


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
        from fastrm.plan.dry_run import dry_run as check

        check(resolved)
        return
    from fastrm.train.launch import FAILURE, die_with_the_watcher, launch, num_ranks_to_start

    is_watched = FAILURE in os.environ
    if os.environ.get("RANK", "0") == "0" and not is_watched:
        typer.echo(resolved.to_yaml(), err=True)
    if (num_ranks := num_ranks_to_start(resolved)) > 1:
        launch(num_ranks, ["train", str(config), *(overrides or []), "--resume", resume])
        return
    if is_watched:
        die_with_the_watcher()
    from fastrm.train.loop import train as run

    run(resolved, resume)


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
    from fastrm.plan.command import plan_run

    plan_run(
        load_config(config, overrides or []), gpus, gpu, num_pairs=pairs, imbalance=imbalance, nvlink_gbs=nvlink_gbs,
        network_gbs=network_gbs, latency_us=latency_us, overlap=overlap, rate_share=rate_share, reserve_gb=reserve_gb,
        results=results, json_out=json_out, png_out=png_out,
    )  # fmt: skip


@app.command()
def score(
    model: Model,
    data: Annotated[str, typer.Argument(help="Groups to score: JSON Lines, JSON or Parquet, in any known layout")],
    out: Annotated[Path, typer.Option(help="JSON Lines: {id, rewards} for each group, in input order")],
    images: Images = None,
    data_format: DataFormat = "auto",
    tokens_per_pack: TokensPerPack = 32768,
    num_workers: NumWorkers = 1,
    device: DeviceChoice = Device.AUTO,
    dtype: DtypeChoice = Dtype.AUTO,
    max_image_pixels: MaxImagePixels = MAX_IMAGE_PIXELS,
    max_image_bytes: MaxImageBytes = MAX_IMAGE_BYTES,
) -> None:
    """Write the rewards of a file's responses."""
    from fastrm.evaluate.files import ScoringOptions, score_file

    options = ScoringOptions(
        images=images, data_format=data_format, tokens_per_pack=tokens_per_pack, num_workers=num_workers,
        device=device, dtype=dtype, max_image_pixels=max_image_pixels, max_image_bytes=max_image_bytes,
    )  # fmt: skip
    score_file(model, data, out, options)


@app.command("eval")
def evaluate(
    model: Model,
    data: Annotated[str, typer.Argument(help="Preferences in any known layout")],
    images: Images = None,
    data_format: DataFormat = "auto",
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file too")] = None,
    tokens_per_pack: TokensPerPack = 32768,
    num_workers: NumWorkers = 1,
    device: DeviceChoice = Device.AUTO,
    dtype: DtypeChoice = Dtype.AUTO,
    max_image_pixels: MaxImagePixels = MAX_IMAGE_PIXELS,
    max_image_bytes: MaxImageBytes = MAX_IMAGE_BYTES,
) -> None:
    """Print pair accuracy, overall and per source; equal rewards count as wrong."""
    from fastrm.evaluate.files import ScoringOptions, evaluate_file

    options = ScoringOptions(
        images=images, data_format=data_format, tokens_per_pack=tokens_per_pack, num_workers=num_workers,
        device=device, dtype=dtype, max_image_pixels=max_image_pixels, max_image_bytes=max_image_bytes,
    )  # fmt: skip
    evaluate_file(model, data, json_out, options)


def main() -> None:
    """Entry point: errors become one readable message, an exit code and a last line of JSON."""
    # The tokenizers library would warn when a data worker forks after it was used.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # transformers imports torchao where it is installed, and that warns, with paths, of extensions for other
    # devices and formats that nothing here uses.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        code = app(standalone_mode=False)
    except FastrmError as error:
        code = _fail(error.exit_code, getattr(error, "kind", type(error).__name__), str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = _fail(75, "Interrupted", "stopped by Ctrl-C; nothing was written")
    except typer.Exit as leave:
        code = leave.exit_code
    except OSError as error:
        code = _fail(74, type(error).__name__, f"{error.filename or 'file system'}: {error.strerror or error}")
    except Exception as error:
        # Usage errors come from click, which typer may carry inside itself: known by what they offer.
        if hasattr(error, "format_message"):
            code = _fail(64, "UsageError", f"{error.format_message().rstrip('.')}; see fastrm --help")
        else:
            message = f"internal error: {error}; please report it with the lines above"
            code = _fail(70, type(error).__name__, message, traceback.format_exc())
    sys.exit(code or 0)


def _fail(code: int, kind: str, message: str, trace: str = "") -> int:
    if report := os.environ.get("FASTRM_FAILURE"):  # one of several processes: the one that watches speaks for all
        Path(report).write_text(json.dumps({"error": kind, "message": message, "trace": trace}))
        return code
    sys.stderr.write(trace)
    print(f"error: {message}", file=sys.stderr)
    print(json.dumps({"exit_code": code, "error": kind, "message": message}), file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
