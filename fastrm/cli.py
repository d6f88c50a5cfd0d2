"""The `fastrm` command. Heavy imports happen inside the commands, so that --help is instant."""

import io
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from fastrm import cli_options as opts
from fastrm import errors
from fastrm.errors import FastrmError
from fastrm.forecast.assumed import IMBALANCE, LATENCY_US, RESERVE_GB, RESULTS
from fastrm.limits import MediaLimits
from fastrm.stop import StopFlag, end_with_parent, fail

# Help without rich's frames: they cut names of options at 80 columns, and dumb terminals do not have their characters.
app = typer.Typer(
    help="Train and evaluate scalar reward models for multimodal LLMs, and score responses with them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(
    help="Check and prepare preference data, and list known sets.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(data_app, name="data")


@app.command()
def train(
    config: opts.RunFile,
    overrides: opts.Overrides = None,
    resume: opts.Resume = "no",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check the configuration and its inputs, print what the run needs, and end."),
    ] = False,
) -> None:
    """Train a reward model on preferences.

    A YAML file names the data, the model and the settings. The folder run.dir then holds the model (model/), the
    metrics (metrics.jsonl), a picture of them (report.png), the rows that were refused (quarantine.jsonl) and the
    checkpoints.

    \b
    Example: fastrm train configs/quickstart.yaml optim.lr=1e-4
    """
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
    config: opts.RunFile,
    overrides: opts.Overrides = None,
    gpus: opts.GpuCount = 1,
    gpu: opts.GpuKind = "h100",
    pairs: opts.PairCount = None,
    imbalance: opts.Imbalance = IMBALANCE,
    nvlink_gbs: opts.NvlinkSpeed = None,
    network_gbs: opts.NetworkSpeed = None,
    latency_us: opts.Latency = LATENCY_US,
    overlap: opts.Overlap = None,
    rate_share: opts.RateShare = None,
    reserve_gb: opts.Reserve = RESERVE_GB,
    results: opts.Results = RESULTS,
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
    from fastrm.forecast.command import plan_run

    plan_run(
        load_config(config, overrides or []), gpus, gpu, num_pairs=pairs, imbalance=imbalance, nvlink_gbs=nvlink_gbs,
        network_gbs=network_gbs, latency_us=latency_us, overlap=overlap, rate_share=rate_share, reserve_gb=reserve_gb,
        results=results, json_out=json_out, png_out=png_out,
    )  # fmt: skip


@app.command()
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
        bool, typer.Option("--dry-run", help="List the runs and what each would cost, and train nothing.")
    ] = False,
    gpus: Annotated[
        int, typer.Option(min=1, metavar="COUNT", help="Number of GPUs that --dry-run predicts the cost of a run for.")
    ] = 8,
    gpu: Annotated[
        str,
        typer.Option(metavar="NAME", help="Kind of GPU that --dry-run predicts for: a100, h100, h200 or b200."),
    ] = "h100",
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
        command.dry_run(grid, overrides or [], gpus, gpu)
    else:
        command.ablate(grid, overrides or [])


@app.command()
def grpo(experiment: opts.GrpoFile, overrides: opts.Overrides = None) -> None:
    """Train a policy with a reward model.

    A YAML file names the policy, questions with true answers, and the rewards; TRL's GRPOTrainer (the extra grpo) does
    the rest. The folder run.dir then holds the policy (policy/), its accuracy before and after with what happened on
    the way (report.json, report.png), and the metrics of each step (metrics.jsonl).

    \b
    Example: fastrm grpo configs/grpo/digits.yaml
    """
    from fastrm.grpo.config import load_grpo_config
    from fastrm.grpo.run import run_grpo

    run_grpo(load_grpo_config(experiment, overrides or []))


@app.command()
def score(
    models: opts.Models,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="Prompts with responses: a JSON Lines, JSON or Parquet file in any known layout."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="JSON Lines file to write, with {id, rewards} for each group in the order of the data.",
        ),
    ],
    images: opts.Images = None,
    data_format: opts.DataFormat = "auto",
    columns: opts.Columns = None,
    ignore: opts.Ignore = None,
    ensemble: opts.EnsembleChoice = None,
    validation: opts.Validation = None,
    route: opts.RouteChoice = None,
    save_ensemble: opts.SaveEnsemble = None,
    tokens_per_pack: opts.TokensPerPack = 32768,
    num_workers: opts.NumWorkers = 1,
    device: opts.DeviceChoice = "auto",
    dtype: opts.DtypeChoice = "auto",
    template_date: opts.TemplateDate = None,
    max_image_pixels: opts.MaxImagePixels = MediaLimits.max_pixels,
    max_image_bytes: opts.MaxImageBytes = MediaLimits.max_bytes,
    max_video_bytes: opts.MaxVideoBytes = MediaLimits.max_video_bytes,
    max_video_seconds: opts.MaxVideoSeconds = MediaLimits.max_video_seconds,
    check_exactness: opts.CheckExactness = True,
) -> None:
    """Write the rewards of a file's responses.

    One or several reward models read the prompts and responses of a data file. The file of --out gets one line for
    each prompt, with one reward for each response, or the reason why it has none.

    \b
    Example: fastrm score runs/quickstart/model groups.jsonl --out rewards.jsonl
    """
    from fastrm.evaluate.files import score_file
    from fastrm.evaluate.models import ModelChoice, ScoringOptions

    options = ScoringOptions(
        images=images, data_format=data_format, columns=opts.columns_by_key(columns), ignore=opts.split_names(ignore),
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
            help="Reward models as for fastrm score, then a file of preferences, or bench:NAME with NAME one of "
            "vl_rewardbench, mm_rlhf_rewardbench, multimodal_rewardbench, rewardbench, rewardbench2, rm_bench.",
        ),
    ],
    images: opts.Images = None,
    data_format: opts.DataFormat = "auto",
    columns: opts.Columns = None,
    ignore: opts.Ignore = None,
    bench_data: opts.BenchData = None,
    scores: opts.Scores = None,
    json_out: opts.FiguresJson = None,
    png_out: opts.FiguresPng = None,
    ensemble: opts.EnsembleChoice = None,
    validation: opts.Validation = None,
    route: opts.RouteChoice = None,
    save_ensemble: opts.SaveEnsemble = None,
    tokens_per_pack: opts.TokensPerPack = 32768,
    num_workers: opts.NumWorkers = 1,
    device: opts.DeviceChoice = "auto",
    dtype: opts.DtypeChoice = "auto",
    template_date: opts.TemplateDate = None,
    max_image_pixels: opts.MaxImagePixels = MediaLimits.max_pixels,
    max_image_bytes: opts.MaxImageBytes = MediaLimits.max_bytes,
    max_video_bytes: opts.MaxVideoBytes = MediaLimits.max_video_bytes,
    max_video_seconds: opts.MaxVideoSeconds = MediaLimits.max_video_seconds,
    check_exactness: opts.CheckExactness = True,
) -> None:
    """Measure how well reward models agree with preferences.

    Reward models score a file of preferences or a published benchmark. Printed are the share of preferences
    whose preferred response has the larger reward (equal rewards count as wrong), in all and for each source, or the
    benchmark's own metrics beside published figures.

    \b
    Example: fastrm eval runs/quickstart/model eval.jsonl
    """
    from fastrm.evaluate.command import evaluate as run
    from fastrm.evaluate.models import ModelChoice, ScoringOptions

    options = ScoringOptions(
        images=images, data_format=data_format, columns=opts.columns_by_key(columns), ignore=opts.split_names(ignore),
        tokens_per_pack=tokens_per_pack, num_workers=num_workers,
        device=device, dtype=dtype, template_date=template_date,
        max_image_pixels=max_image_pixels, max_image_bytes=max_image_bytes, max_video_bytes=max_video_bytes,
        max_video_seconds=max_video_seconds, check_exactness=check_exactness,
    )  # fmt: skip
    *models, data = models_and_data
    choice = ModelChoice(tuple(map(Path, models)), ensemble and ensemble.value, validation, route, save_ensemble)
    run(choice, data, options, bench_data=bench_data, scores=scores, json_out=json_out, png_out=png_out)


@app.command("check-serving")
def check_serving(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="Reward model that the server is said to serve: its folder."),
    ],
    url: Annotated[str, typer.Option(metavar="URL", help="Address of the server, as http://127.0.0.1:8000.")],
    api: Annotated[
        str, typer.Option(metavar="NAME", help="Requests that the server takes: fastrm, vllm, sglang or openrlhf.")
    ] = "fastrm",
    token: Annotated[
        str | None,
        typer.Option(envvar="FASTRM_TOKEN", show_envvar=False, metavar="TOKEN", help="Token that the server wants."),
    ] = None,
    band: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            metavar="REWARD",
            help="Largest difference of a reward that is none; without it, 0.001 for a model that computes here in "
            "fp32, 0.05 for bf16, 0.01 for fp16.",
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="Longest time for one answer, in seconds.")
    ] = 120.0,
    device: opts.DeviceChoice = "auto",
    dtype: opts.DtypeChoice = "auto",
) -> None:
    """Compare a server's rewards with those of its model.

    A fixed set of prompts, texts and images made in code, is scored by the server and in this process. Printed are
    the worst difference, the preferences that flip, and the likely cause: template, anchor, activation, image
    resizing, dtype. The exit code is 65 if a reward is beyond the band, a prompt is refused, or the model's
    rewards are too alike to tell.

    \b
    Example: fastrm check-serving runs/my/model --url http://host:8000 --api vllm
    """
    from fastrm.serve.check.command import check_serving as run

    run(model, url, api, token=token, timeout=timeout, band=band, device=device, dtype=dtype)


@app.command()
def serve(
    models: opts.ServedModels,
    host: opts.Host = "127.0.0.1",
    port: opts.Port = 8000,
    token: opts.Token = None,
    workers: opts.ServeWorkers = 1,
    max_queue: opts.MaxQueue = 1024,
    window_ms: opts.WindowMs = 3.0,
    deterministic: opts.Deterministic = False,
    max_body_bytes: opts.MaxBodyBytes = 32 * 2**20,
    max_groups: opts.MaxGroups = 64,
    max_responses: opts.MaxResponses = 1024,
    image_root: opts.ImageRoot = None,
    allow_image_urls: opts.AllowImageUrls = False,
    ensemble: opts.EnsembleChoice = None,
    validation: opts.Validation = None,
    route: opts.RouteChoice = None,
    tokens_per_pack: opts.TokensPerPack = 32768,
    device: opts.DeviceChoice = "auto",
    dtype: opts.DtypeChoice = "auto",
    template_date: opts.TemplateDate = None,
    max_image_pixels: opts.MaxImagePixels = MediaLimits.max_pixels,
    max_image_bytes: opts.MaxImageBytes = MediaLimits.max_bytes,
    max_video_bytes: opts.MaxVideoBytes = MediaLimits.max_video_bytes,
    max_video_seconds: opts.MaxVideoSeconds = MediaLimits.max_video_seconds,
    check_exactness: opts.CheckExactness = True,
) -> None:
    """Answer requests for rewards by HTTP.

    One or several reward models wait for requests, each with prompts, images and responses. What comes at the same
    time is computed together, a prompt once for all its responses. A line says when the server is ready, and where.
    SIGTERM or Ctrl-C ends it after the answers to what it has accepted.

    \b
    Example: fastrm serve runs/quickstart/model --port 8000
    """
    from fastrm.serve.settings import ServeSettings, check_installed

    check_installed()
    from fastrm.evaluate.models import ModelChoice, ScoringOptions
    from fastrm.serve.command import serve as run

    options = ScoringOptions(
        images=None, data_format="auto", tokens_per_pack=tokens_per_pack, num_workers=0,
        device=device, dtype=dtype, template_date=template_date,
        max_image_pixels=max_image_pixels, max_image_bytes=max_image_bytes, max_video_bytes=max_video_bytes,
        max_video_seconds=max_video_seconds, check_exactness=check_exactness,
    )  # fmt: skip
    settings = ServeSettings(
        host=host, port=port, token=token, workers=workers, max_queue=max_queue, window_ms=window_ms,
        deterministic=deterministic, max_body_bytes=max_body_bytes, max_groups=max_groups, max_responses=max_responses,
        image_root=image_root, allow_image_urls=allow_image_urls,
    )  # fmt: skip
    run(models, ModelChoice((), ensemble and ensemble.value, validation, route), options, settings)


@app.command("export")
def export(
    model: opts.ExportedModel,
    out: opts.ExportFolder,
    reader: opts.Reader,
) -> None:
    """Write a reward model for transformers or vLLM.

    A trained reward model, of fastrm or of another trainer, is written as a folder that stock transformers or vLLM
    reads. Printed is how it is loaded there. What would give other rewards there is refused.

    \b
    Example: fastrm export runs/quickstart/model --out served --for vllm
    """
    from fastrm.model.export_command import export_model
    from fastrm.ui import Display

    with Display() as display:
        export_model(model, out, reader, display)


@data_app.command("prepare")
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


@data_app.command("check")
def check_data(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE",
            help="Data files or folders, or YAML configurations of runs, of which all sources are checked.",
        ),
    ],
    model: opts.CheckModel = None,
    images: opts.Images = None,
    data_format: opts.DataFormat = "auto",
    columns: opts.Columns = None,
    ignore: opts.Ignore = None,
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

    reading = {
        "images": images,
        "format": data_format,
        "columns": opts.columns_by_key(columns),
        "ignore": opts.split_names(ignore),
    }
    check(files, model=model, reading=reading, scoring=scoring, max_refused=max_refused, num_workers=workers)


@data_app.command("sets")
def data_sets() -> None:
    """List the published preference sets that can be named as data.

    A data source `set: NAME` in a run's YAML file reads one of them. Printed are the names, sizes, places on the hub,
    layouts, images and licences.

    \b
    Example: fastrm data sets
    """
    from fastrm.data.sources.published import print_sets

    print_sets()


def main() -> None:
    """Run the command line: errors become one readable message, an exit code and a last line of JSON."""
    # The tokenizers library would warn when a data worker forks after its use.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Packs differ in size: fixed segments of CUDA memory would be left half empty. torch reads this when it is first
    # imported, and the older name where the newer is not set.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    errors.quiet_libraries()
    # A file in an encoding that lacks a character gets it as an escape, not an error.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    errors.is_command_line = True
    try:
        with StopFlag(breaks=True) as stop:
            code = _run(stop)
    finally:
        errors.is_command_line = False
    sys.exit(code)


def _run(stop: StopFlag) -> int:
    """Run the command line; return the exit code."""
    try:
        if "" in sys.argv[1:]:  # a path of this name would be the working folder
            place = sys.argv.index("", 1)
            return fail(64, "UsageError", f"argument {place} is empty, as a shell variable is that is not set; name it")
        code = app(standalone_mode=False) or 0
        if code == 130:  # some versions of typer pass KeyboardInterrupt on as this code
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
        # Usage errors come from click, which typer may bundle, so that they are known by their attributes.
        if hasattr(error, "format_message"):
            problem = error.format_message().rstrip(".")
            if type(error).__name__ == "NoArgsIsHelpError":
                typer.echo(error.ctx.get_help() + "\n", err=True)
                problem = "no command was named"
            return fail(64, "UsageError", f"{problem}; see fastrm --help")
        message = f"internal error: {error}; please report it with the lines above"
        return fail(70, type(error).__name__, message, traceback.format_exc())


if __name__ == "__main__":
    main()
