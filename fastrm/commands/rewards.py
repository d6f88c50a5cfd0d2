"""Commands that use reward models: score, eval, check-serving, serve, export."""

from pathlib import Path
from typing import Annotated

import typer

from fastrm import cli_options as opts
from fastrm.limits import MediaLimits


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


def serve(
    models: opts.ServedModels,
    host: opts.Host = "127.0.0.1",
    port: opts.Port = 8000,
    token: opts.Token = None,
    workers: opts.ServeWorkers = 1,
    max_queue: opts.MaxQueue = 1024,
    window_ms: opts.WindowMs = 3.0,
    deterministic: opts.Deterministic = False,
    max_connections: opts.MaxConnections = 4096,
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
        deterministic=deterministic, max_connections=max_connections, max_body_bytes=max_body_bytes,
        max_groups=max_groups, max_responses=max_responses, image_root=image_root, allow_image_urls=allow_image_urls,
    )  # fmt: skip
    run(models, ModelChoice((), ensemble and ensemble.value, validation, route), options, settings)


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
