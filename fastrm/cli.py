"""The `fastrm` command. Heavy imports happen inside the commands, so that --help is instant."""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from fastrm.errors import FastrmError

app = typer.Typer(
    help="Train, evaluate and serve scalar reward models for multimodal LLMs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
        from fastrm.train.dry_run import dry_run as check

        check(resolved)
        return
    from fastrm.train.loop import train as run

    typer.echo(resolved.to_yaml(), err=True)
    run(resolved, resume)


@app.command()
def score(
    model: Annotated[Path, typer.Argument(help="model/ folder of a run")],
    data: Annotated[str, typer.Argument(help="Groups to score: JSON Lines, JSON or Parquet, in any known layout")],
    out: Annotated[Path, typer.Option(help="JSON Lines: {id, rewards} for each group, in input order")],
    images: Annotated[str | None, typer.Option(help="Folder or archive of the images")] = None,
    data_format: Annotated[str, typer.Option("--format", help="Layout of the rows")] = "auto",
    tokens_per_pack: Annotated[int, typer.Option(help="Token budget of one forward pass")] = 16384,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16")] = "auto",
) -> None:
    """Write the rewards of a file's responses."""
    from fastrm.evaluate.files import score_file

    score_file(
        model, data, out, images=images, data_format=data_format, tokens_per_pack=tokens_per_pack, device=device,
        dtype=dtype,
    )  # fmt: skip


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="model/ folder of a run")],
    data: Annotated[str, typer.Argument(help="Preferences in any known layout")],
    images: Annotated[str | None, typer.Option(help="Folder or archive of the images")] = None,
    data_format: Annotated[str, typer.Option("--format", help="Layout of the rows")] = "auto",
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file too")] = None,
    tokens_per_pack: Annotated[int, typer.Option(help="Token budget of one forward pass")] = 16384,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16")] = "auto",
) -> None:
    """Print pair accuracy, overall and per source; equal rewards count as wrong."""
    from fastrm.evaluate.files import evaluate_file

    evaluate_file(
        model, data, json_out, images=images, data_format=data_format, tokens_per_pack=tokens_per_pack, device=device,
        dtype=dtype,
    )  # fmt: skip


def main() -> None:
    """Entry point: errors become one readable message, an exit code and a last line of JSON."""
    # The tokenizers library would warn when a data worker forks after it was used.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        code = app(standalone_mode=False)
    except FastrmError as error:
        code = _fail(error.exit_code, type(error).__name__, str(error))
    except typer.Exit as leave:
        code = leave.exit_code
    except OSError as error:
        code = _fail(74, type(error).__name__, f"{error.filename or 'file system'}: {error.strerror or error}")
    except Exception as error:
        # Usage errors come from click, which typer may carry inside itself: known by what they offer.
        if hasattr(error, "format_message"):
            code = _fail(64, "UsageError", f"{error.format_message()}; see fastrm --help")
        else:
            traceback.print_exc()
            code = _fail(70, type(error).__name__, f"internal error: {error}; please report it with the lines above")
    sys.exit(code or 0)


def _fail(code: int, kind: str, message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    print(json.dumps({"exit_code": code, "error": kind, "message": message}), file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
