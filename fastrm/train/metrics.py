"""What a step is measured by, and where the numbers go."""

import importlib.util
import json
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from fastrm.data.packing import Pack
from fastrm.errors import ConfigError
from fastrm.json_files import to_json


class PreferenceMeter:
    """Sums over preferences; means come out under the field's usual names.

    A preference counts as right if the winner's reward is strictly larger: equal rewards are wrong.
    Ties count for nothing but the token totals.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self.num_preferences = 0
        self.num_tokens = 0
        self.num_unshared_tokens = 0
        self._right = defaultdict(int)  # by source
        self._scored = defaultdict(int)
        self._chosen = self._rejected = 0.0

    def state(self) -> dict:
        """The sums as JSON; `restore` takes them back exactly."""
        return {
            name.lstrip("_"): dict(value) if isinstance(value, dict) else value for name, value in vars(self).items()
        }

    def restore(self, state: dict) -> None:
        self.clear()
        for name in vars(self):
            self._add(name, state[name.lstrip("_")])

    def merge(self, other: "PreferenceMeter") -> None:
        """Add what another meter has counted."""
        for name, value in vars(other).items():
            self._add(name, value)

    def _add(self, name: str, value) -> None:
        if isinstance(value, dict):
            for source, count in value.items():
                getattr(self, name)[source] += count
        else:
            setattr(self, name, getattr(self, name) + value)

    def add(self, pack: Pack, rewards: torch.Tensor) -> None:
        """Count a pack with its rewards (R,) on the CPU."""
        self.num_preferences += pack.num_preferences
        self.num_tokens += pack.num_tokens
        self.num_unshared_tokens += pack.num_unshared_tokens
        winners, losers = rewards[pack.edges[:, 0]].double(), rewards[pack.edges[:, 1]].double()
        scored = ~pack.is_tie
        right = (winners > losers) & scored
        for group in pack.groups:
            self._right[group.source] += int(right[group.preferences].sum())
            self._scored[group.source] += int(scored[group.preferences].sum())
        self._chosen += float(winners[scored].sum())
        self._rejected += float(losers[scored].sum())

    @property
    def num_scored(self) -> int:
        return sum(self._scored.values())

    @property
    def accuracy(self) -> float:
        return sum(self._right.values()) / max(1, self.num_scored)

    def by_source(self) -> dict[str, dict]:
        """{source: {"accuracy", "preferences"}}, sorted by name."""
        return {
            source: {"accuracy": self._right[source] / count, "preferences": count}
            for source, count in sorted(self._scored.items())
            if count
        }

    def means(self) -> dict[str, float]:
        """rewards/{chosen,rejected,margins,accuracies}, per-source accuracies, sharing factor."""
        count = max(1, self.num_scored)
        row = {
            "rewards/chosen": self._chosen / count,
            "rewards/rejected": self._rejected / count,
            "rewards/margins": (self._chosen - self._rejected) / count,
            "rewards/accuracies": self.accuracy,
            "sharing_factor": self.num_unshared_tokens / max(1, self.num_tokens),
        }
        sources = self.by_source()
        if len(sources) > 1:
            row |= {f"rewards/accuracies/{source}": values["accuracy"] for source, values in sources.items()}
        return row


class MetricsLog:
    """metrics.jsonl, and the optional loggers of run.report_to.

    Args:
        path: appended to; rows that the run is going to write again are removed first, so that a
            resumed run's file reads like that of an unbroken one.
        progress: where the run continues from: its `step`, and its `last_eval`.
    """

    def __init__(self, path: Path, progress, report_to: list[str], run_dir: Path, config: dict):
        evaluated = progress.last_eval.get("step", -1)
        keep_rows(path, lambda row: row["step"] <= (evaluated if "eval/accuracy" in row else progress.step))
        self._file = path.open("a")
        self._sinks = [_SINKS[name](run_dir, config) for name in report_to]

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
    """Rows of a JSON Lines file, none if it is missing; a last line cut off by a kill is left out."""
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
        partial = path.with_name(path.name + ".part")
        partial.write_text("".join(to_json(row) + "\n" for row in read_rows(path) if wanted(row)))
        os.replace(partial, path)  # whole, whenever the process ends


def check_loggers(report_to: list[str]) -> None:
    """Before any work is done: is every logger of run.report_to installed?

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
