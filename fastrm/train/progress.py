"""The progress of a run, and the reports that ranks exchange after each step."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from fastrm.config import RunConfig
from fastrm.data.loader import LoadedPack, RefusedGroup
from fastrm.data.packing import Pack
from fastrm.evaluate.accuracy import PreferenceMeter
from fastrm.stopping_config import LOSS_PARTS, is_better

if TYPE_CHECKING:  # the import would load transformers into commands that only read runs
    from fastrm.train.engine import Update


@dataclass
class Progress:
    """The part of a checkpoint besides tensors. `position` alone is the place in the data."""

    step: int = 0
    position: int = 0
    preferences: int = 0
    tokens_processed: int = 0
    tokens_unshared: int = 0
    train_seconds: float = 0.0
    skipped_in_a_row: int = 0
    best_accuracy: float | None = None  # at the best evaluation
    best_checkpoint: str | None = None
    best_value: float | None = None  # the best figure, of run.best_metric
    # Of run.early_stopping: the last figure that was an improvement, and the evaluations since then.
    improved_value: float | None = None
    evaluations_since: int = 0
    last_eval: dict = field(default_factory=dict)
    # The row of metrics.jsonl that is being collected: a resumed run writes the same one.
    window_losses: list[list[float]] = field(default_factory=list)  # (loss, gradient norm, parts) of each step
    window_meter: PreferenceMeter = field(default_factory=PreferenceMeter)
    window_seconds: float = 0.0
    window_wait_seconds: float = 0.0  # seconds of these, spent waiting for packs

    def state(self) -> dict[str, Any]:
        """Return the fields as JSON values, from which `from_state` makes an equal object."""
        return {**vars(self), "window_meter": self.window_meter.state()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Progress":
        """Return the progress that `state` returned."""
        meter = PreferenceMeter()
        if saved := state.get("window_meter"):
            meter.restore(saved)
        # Checkpoints of before have an accuracy alone, which chose the best.
        state = {"best_value": state.get("best_accuracy"), **state}
        return cls(**{**state, "window_meter": meter})

    @property
    def is_evaluated(self) -> bool:
        """True if the weights are still those of the last evaluation."""
        return self.last_eval.get("step") == self.step

    @property
    def best_step(self) -> int | None:
        """The step of the best evaluation; None before the first."""
        return None if self.best_checkpoint is None else int(self.best_checkpoint.removeprefix("step-"))

    def note_evaluation(self, row: dict[str, Any], settings: RunConfig) -> bool:
        """Keep the row of an evaluation of this step; return whether it is the best so far."""
        metric, stopping = settings.best_metric(row), settings.early_stopping
        self.last_eval, value = row, row[metric]
        if stopping is not None:
            self.evaluations_since += 1
            if self.improved_value is None or is_better(metric, value, self.improved_value, stopping.min_delta):
                self.improved_value, self.evaluations_since = value, 0
        is_best = self.best_value is None or is_better(metric, value, self.best_value)
        if is_best:
            self.best_value, self.best_accuracy = value, row.get("eval/accuracy")
            self.best_checkpoint = f"step-{self.step:08d}"
        return is_best

    def forget_evaluations(self) -> None:
        """Forget all evaluations: later ones are of other data, or compared by another figure."""
        self.last_eval, self.best_accuracy, self.best_checkpoint, self.best_value = {}, None, None, None
        self.improved_value, self.evaluations_since = None, 0

    def is_stopped_early(self, settings: RunConfig) -> bool:
        """Return whether run.early_stopping ends the run here."""
        return settings.early_stopping is not None and self.evaluations_since >= settings.early_stopping.patience

    def count_step(self, position: int, meter: PreferenceMeter, done: "Update") -> None:
        """Count a step that has been taken.

        Args:
            position: where the data stands after it.
            meter: what all ranks have counted in it.
        """
        self.step += 1
        self.position = position
        self.preferences += meter.num_preferences
        self.tokens_processed += meter.num_tokens
        self.tokens_unshared += meter.num_unshared_tokens
        if done.finite:  # figures of a skipped step are not averaged
            self.window_meter.merge(meter)
            self.window_losses.append([done.loss, done.grad_norm, *done.parts])

    def count_seconds(self, seconds: float, waited: float) -> None:
        """Count the time of a step, and the part of it that was waiting for packs."""
        self.train_seconds += seconds
        self.window_seconds += seconds
        self.window_wait_seconds += waited

    def take_row(self, num_groups: int, lr: float) -> dict[str, Any]:
        """Return the row of metrics.jsonl on the steps since the last one, and begin the next.

        Args:
            num_groups: groups of an epoch.
            lr: learning rate of the last step.
        """
        losses, meter, seconds = self.window_losses, self.window_meter, self.window_seconds
        means = [sum(values) / len(losses) for values in zip(*losses, strict=True)]
        row = {
            "step": self.step,
            "epoch": self.position / num_groups,
            "loss": means[0] if losses else None,
            **dict(zip(LOSS_PARTS, means[2:], strict=False)),
            **meter.means(),
            "grad_norm": means[1] if losses else None,
            "lr": lr,
            "preferences_per_second": meter.num_preferences / seconds,
            "tokens_per_second": meter.num_tokens / seconds,
            "data_wait_share": self.window_wait_seconds / seconds,
        }
        losses.clear()
        meter.clear()
        self.window_seconds = self.window_wait_seconds = 0.0
        return row


@dataclass(frozen=True)
class StepReport:
    """The report of one rank on a step to the others.

    Attributes:
        members: numbers of the groups that it had.
        meter: its counts.
        refused: groups that could not be loaded.
        stop: it was asked to stop.
    """

    members: list[int]
    meter: PreferenceMeter
    refused: list[RefusedGroup]
    stop: bool

    @classmethod
    def of_all(cls, reports: Sequence["StepReport"]) -> "StepReport":
        """Join the reports of all ranks, in the order of the ranks."""
        meter = PreferenceMeter()
        for report in reports:
            meter.merge(report.meter)
        members = [number for report in reports for number in report.members]
        refused = [refusal for report in reports for refusal in report.refused]
        return cls(members, meter, refused, any(report.stop for report in reports))


class StepTally:
    """The counts of this rank in the present step.

    Attributes:
        members: numbers of its groups so far.
        position: of the data after the step.
        refused: its groups that could not be loaded.
    """

    def __init__(self):
        self.members: list[int] = []
        self.position = 0
        self.refused: list[RefusedGroup] = []
        self._rewards: list[tuple[Pack, torch.Tensor]] = []

    def add(self, loaded: LoadedPack, rewards: torch.Tensor | None) -> None:
        """Count a pack whose gradient has been accumulated, with its rewards (R,); they are not read yet."""
        self.members += loaded.plan.groups
        self.position = loaded.plan.position
        self.refused += loaded.refused
        if loaded.pack is not None:
            # Patches are most of a pack, and no longer needed; nor are layouts, whose tensors may be open files.
            self._rewards.append((replace(loaded.pack, patches=None, layouts=None), rewards))

    def take_report(self, stop: bool) -> StepReport:
        """Return this rank's report, and free the packs; called after the update, which waits for the rewards."""
        meter = PreferenceMeter()
        for pack, rewards in self._rewards:
            meter.add(pack, rewards)
        self._rewards.clear()
        return StepReport(self.members, meter, self.refused, stop)
