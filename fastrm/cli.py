"""The `fastrm` command: its commands by name, and what becomes of errors and signals."""

import io
import os
import sys
import traceback

import typer

from fastrm import errors
from fastrm.commands import data, rewards, training
from fastrm.errors import FastrmError
from fastrm.stop import StopFlag, fail

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

for name, command in {
    "train": training.train, "plan": training.plan, "ablate": training.ablate, "grpo": training.grpo,
    "compare": training.compare,
    "score": rewards.score, "eval": rewards.evaluate, "check-serving": rewards.check_serving, "serve": rewards.serve,
    "export": rewards.export, "push": rewards.push,
}.items():  # fmt: skip
    app.command(name)(command)
for name, command in {
    "prepare": data.prepare_data, "check": data.check_data, "show": data.show_data, "sets": data.data_sets,
}.items():  # fmt: skip
    data_app.command(name)(command)


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
    stop.bound_exit(code)
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
