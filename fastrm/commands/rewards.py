"""Commands that use reward models: score, eval, check-serving, serve, export, push."""

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fastrm import cli_options as opts
from fastrm.commands.grouped import Without, can_be_quiet, grouped
from fastrm.errors import ConfigError
from fastrm.evaluate.options import JudgeTexts, ModelChoice, Outputs, ScoringOptions
from fastrm.serve.settings import ServeSettings, check_installed


class FileDtype(StrEnum):
    """The choices of `fastrm export --dtype`."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"


_NOT_OF_LOADING = ("rows", "tokens_per_pack", "num_workers", "template_date", "limits", "check_exactness")


@can_be_quiet
@grouped
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
    choice: Annotated[ModelChoice, Without("compare")],
    options: ScoringOptions,
) -> None:
    """Write the rewards of a file's responses.

    One or several reward models read the prompts and responses of a data file. The file of --out gets one line for
    each prompt, with one reward for each response, or the reason why it has none.

    \b
    Example: fastrm score runs/quickstart/model groups.jsonl --out rewards.jsonl
    """
    from fastrm.evaluate.files import score_file

    score_file(replace(choice, models=tuple(models)), data, out, options)


@can_be_quiet
@grouped
def evaluate(
    models_and_data: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL]... DATA",
            help="Reward models as for fastrm score, or one judge:SPEC, or the folder of a critic or judge that was "
            "trained here; then a file of preferences, or "
            "bench:NAME with NAME one of "
            "vl_rewardbench, mm_rlhf_rewardbench, multimodal_rewardbench, rewardbench, rewardbench2, rm_bench.",
        ),
    ],
    choice: ModelChoice,
    options: ScoringOptions,
    outputs: Outputs,
    texts: JudgeTexts,
    bench_data: opts.BenchData = None,
    scores: opts.Scores = None,
    costs: opts.Costs = False,
) -> None:
    """Measure how well reward models agree with preferences.

    Reward models score a file of preferences or a published benchmark. Printed are the share of preferences
    whose preferred response has the larger reward (equal rewards count as wrong), in all and for each source, or the
    benchmark's own metrics beside published figures. Several models are one ensemble, unless --compare sets two side
    by side.

    \b
    Example: fastrm eval runs/quickstart/model eval.jsonl
    """
    from fastrm.model.paradigms import is_writer

    *models, data = models_and_data
    if costs:
        from fastrm.judge.command import JudgeOptions
        from fastrm.judge.costs import measure_costs

        if (choice, scores, replace(outputs, json=None)) != (ModelChoice(), None, Outputs()):
            raise ConfigError(
                "--costs measures one model as it works now; leave --scores, --png, --report and what is for several "
                "models out"
            )
        measure_costs(models, data, JudgeOptions(options.rows, texts, bench_data, outputs.json, options))
        return
    if any(name.startswith("judge:") or is_writer(name) for name in models):
        from fastrm.judge.command import JudgeOptions, evaluate_judge

        if choice != ModelChoice() or scores is not None or replace(outputs, json=None) != Outputs():
            raise ConfigError(f"{models[0]}: reward models' options, --scores, --png and --report are not for a judge")
        evaluate_judge(models, data, JudgeOptions(options.rows, texts, bench_data, outputs.json, options))
        return
    if texts != JudgeTexts():
        raise ConfigError(
            "--from and --generations are for a judge, as are --given-critiques, --votes, --max-tokens and "
            f"--temperature; got {models_and_data[0]}, wanted judge:SPEC, or the folder of a critic or judge"
        )
    from fastrm.evaluate.command import evaluate as run

    choice = replace(choice, models=tuple(map(Path, models)))
    run(choice, data, options, outputs, bench_data=bench_data, scores=scores)


@grouped
def check_serving(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="Reward model that the server is said to serve: its folder."),
    ],
    url: Annotated[str, typer.Option(metavar="URL", help="Address of the server, as http://127.0.0.1:8000.")],
    options: Annotated[ScoringOptions, Without(*_NOT_OF_LOADING)],
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

    loading = {"device": options.device, "dtype": options.dtype, "normalize": options.normalize}
    run(model, url, api, token=token, timeout=timeout, band=band, loading=loading)


@grouped
def serve(
    models: opts.ServedModels,
    settings: ServeSettings,
    choice: Annotated[ModelChoice, Without("save", "compare")],
    options: Annotated[ScoringOptions, Without("rows", "num_workers")],
) -> None:
    """Answer requests for rewards by HTTP.

    One or several reward models wait for requests, each with prompts, images and responses. What comes at the same
    time is computed together, a prompt once for all its responses. A line says when the server is ready, and where.
    SIGTERM or Ctrl-C ends it after the answers to what it has accepted.

    \b
    Example: fastrm serve runs/quickstart/model --port 8000
    """
    check_installed()
    from fastrm.serve.command import serve as run

    run(models, choice, options, settings)


@can_be_quiet
def export(
    model: opts.ExportedModel,
    out: opts.ExportFolder = None,
    reader: opts.Reader = "transformers",
    step: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Export the checkpoint of this step of the run MODEL.")
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="Export the checkpoint of the run's best evaluation.")] = False,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge", help="Write adapters of a checkpoint (model.lora) as a whole model; those of MODEL always are."
        ),
    ] = False,
    dtype: Annotated[
        FileDtype,
        typer.Option(
            metavar="DTYPE",
            help="Precision of the backbone in the files: fp32, bf16 or auto, the run's own or that of its files.",
        ),
    ] = FileDtype.AUTO,
) -> None:
    """Write a reward model for transformers or vLLM.

    A trained reward model, of fastrm or of another trainer, is written as a folder that stock transformers or vLLM
    reads; with --step or --best, a checkpoint of a run. Printed is how it is loaded there. What would give other
    rewards there is refused. No GPU is needed.

    \b
    Example: fastrm export runs/quickstart --best --out served
    """
    from torch import bfloat16, float32

    from fastrm.model.export_command import export_model
    from fastrm.model.places import locate
    from fastrm.train.export_checkpoint import export_checkpoint
    from fastrm.ui import Display

    weights = {"auto": None, "fp32": float32, "bf16": bfloat16}[dtype]
    if step is not None and best:
        raise ConfigError("--step and --best: name one of them")
    if (is_model := step is None and not best) and out is None:
        raise ConfigError("--out: name the folder to write; only an export of --step or --best has a place by itself")
    if is_model and merge and locate(model).adapter is None:
        raise ConfigError(f"--merge: {model} is no adapter and whole already; leave it out")
    with Display() as display:
        if is_model:
            export_model(model, out, reader, display, weights)
        else:
            export_checkpoint(Path(model), step, out, reader, display, weights, merge)


def push(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a finished run, or of a model that fastrm exported.")
    ],
    repo: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Repository of the hub, which is made if it is not there.")
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the files, their sizes and the card, and send nothing.")
    ] = False,
    public: Annotated[
        bool, typer.Option("--public", help="Make the repository public; without it, it is private.")
    ] = False,
    licence: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="Licence for the card, as apache-2.0.")
    ] = None,
) -> None:
    """Send a trained model and a model card to the hub.

    The model's own files are sent, and a README.md made of the run: recipe, data with licences, accuracy with
    intervals, how to load it, limits. Checkpoints, data and the quarantine are never sent. The hub's account is that
    of hf auth login, or of HF_TOKEN.

    \b
    Example: fastrm push runs/quickstart me/digits-reward --dry-run
    """
    from fastrm.share.push import push as run_push

    run_push(run, repo, public=public, licence=licence, dry_run=dry_run)
