"""The progress of a run: what checkpoints keep of it, and what ranks tell one another after each step."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from fastrm.data.loader import LoadedPack, RefusedGroup
from fastrm.data.packing import Pack
from fastrm.evaluate.accuracy import PreferenceMeter

if TYPE_CHECKING:  # it would load transformers into commands that only look at runs
    from fastrm.train.engine import Update


@dataclass
class Progress:
    """The state that a checkpoint holds besides tensors. `position` alone says where the data stands."""

    step: int = 0
    position: int = 0
    preferences: int = 0
    tokens_processed: int = 0
    tokens_unshared: int = 0
    train_seconds: float = 0.0
    skipped_in_a_row: int = 0
    best_accuracy: float | None = None
    best_checkpoint: str | None = None
    last_eval: dict = field(default_factory=dict)
    # The row of metrics.jsonl that is being collected: a resumed run writes the same one.
    window_losses: list[list[float]] = field(default_factory=list)  # (loss, gradient norm) of each step
    window_meter: PreferenceMeter = field(default_factory=PreferenceMeter)
    window_seconds: float = 0.0
    window_wait_seconds: float = 0.0  # of these, waiting for packs

    def state(self) -> dict[str, Any]:
        """Return the fields as JSON; `from_state` takes them back exactly."""
        return {**vars(self), "window_meter": self.window_meter.state()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Progress":
        """Return the progress that `state` has written."""
        meter = PreferenceMeter()
        if saved := state.get("window_meter"):
            meter.restore(saved)
        return cls(**{**state, "window_meter": meter})

    @property
    def is_evaluated(self) -> bool:
        """Return whether the weights are still those of the last evaluation."""
        return self.last_eval.get("step") == self.step

    def note_evaluation(self, row: dict[str, Any]) -> bool:
        """Keep the row of an evaluation of this step; returns whether it is the best so far."""
        self.last_eval = row
        accuracy = row["eval/accuracy"]
        is_best = self.best_accuracy is None or accuracy > self.best_accuracy
        if is_best:
            self.best_accuracy, self.best_checkpoint = accuracy, f"step-{self.step:08d}"
        return is_best

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
        if done.finite:  # what a skipped step computed is no number to average
            self.window_meter.merge(meter)
            self.window_losses.append([done.loss, done.grad_norm])

    def count_seconds(self, seconds: float, waited: float) -> None:
        """Count the time of a step, and how much of it was waiting for packs."""
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
        row = {
            "step": self.step,
            "epoch": self.position / num_groups,
            "loss": sum(loss for loss, _ in losses) / len(losses) if losses else None,
            **meter.means(),
            "grad_norm": sum(norm for _, norm in losses) / len(losses) if losses else None,
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
    """The report of one rank, or of all together, on a step.

    Attributes:
        members: numbers of the groups that it had.
        meter: what was counted.
        refused: groups that could not be loaded.
        stop: a rank was asked to stop.
    """

    members: list[int]
    meter: PreferenceMeter
    refused: list[RefusedGroup]
    stop: bool

    @classmethod
    def of_all(cls, reports: Sequence["StepReport"]) -> "StepReport":
        """Return the reports of all ranks as one, in the order of the ranks."""
        meter = PreferenceMeter()
        for report in reports:
            meter.merge(report.meter)
        members = [number for report in reports for number in report.members]
        refused = [refusal for report in reports for refusal in report.refused]
        return cls(members, meter, refused, any(report.stop for report in reports))


class StepTally:
    """This rank's account of the step under way.

    Attributes:
        members: numbers of its groups so far.
        position: where the data stands after the step.
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
        """Return the report of this rank, and let go of the packs; after the update, which waits for the rewards."""
        meter = PreferenceMeter()
        for pack, rewards in self._rewards:
            meter.add(pack, rewards)
        self._rewards.clear()
        return StepReport(self.members, meter, self.refused, stop)
