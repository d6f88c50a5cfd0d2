"""The outputs for a run's numbers: metrics.jsonl, and loggers."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

from fastrm.config import Config
from fastrm.errors import ConfigError
from fastrm.json_files import to_json
from fastrm.storage import write_whole


class MetricsLog:
    """The file metrics.jsonl, and the optional loggers of run.report_to.

    Rows that the run is going to write again are removed first, so that a resumed run's file reads like that of an
    unbroken one.

    Args:
        progress: where the run continues from: its `step`, and its `last_eval`.
    """

    def __init__(self, config: Config, progress):
        run_dir = Path(config.run.dir)
        path = run_dir / "metrics.jsonl"
        evaluated = progress.last_eval.get("step", -1)
        keep_rows(path, lambda row: row["step"] <= (evaluated if "eval/accuracy" in row else progress.step))
        self._file = path.open("a")
        self._sinks = [_SINKS[name](run_dir, config.model_dump(mode="json")) for name in config.run.report_to]

    def write(self, row: dict) -> None:
        """Append one row; `row["step"]` is the number of steps done."""
        self._file.write(to_json(row) + "\n")
        self._file.flush()
        for sink in self._sinks:
            sink(row)

    def close(self) -> None:
        self._file.close()
        for sink in self._sinks:
            sink(None)


def read_rows(path: Path) -> list[dict]:
    """Read the rows of a JSON Lines file, none if it is missing; a last line cut off by a kill is left out."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def keep_rows(path: Path, wanted: Callable[[dict], bool]) -> None:
    """Remove the other rows of a JSON Lines file, if it exists."""
    if path.exists():
        kept = "".join(to_json(row) + "\n" for row in read_rows(path) if wanted(row))
        write_whole(path, kept)


def check_loggers(report_to: list[str]) -> None:
    """Check, before any work is done, that every logger of run.report_to is installed.

    Raises:
        ConfigError: naming the package to install.
    """
    for name in report_to:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"run.report_to: {name} is not installed; pip install {name}")


def _tensorboard(run_dir: Path, config: dict):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(run_dir / "tensorboard")

    def sink(row):
        if row is None:
            return writer.close()
        for name, value in row.items():
            if isinstance(value, int | float):
                writer.add_scalar(name, value, row["step"])

    return sink


def _wandb(run_dir: Path, config: dict):
    import wandb

    run = wandb.init(dir=run_dir, config=config)
    return lambda row: run.finish() if row is None else run.log(row, step=row["step"])


_SINKS = {"tensorboard": _tensorboard, "wandb": _wandb}
