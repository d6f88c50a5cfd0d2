"""How far a run is, and what ranks tell one another after each step."""

from dataclasses import dataclass, field

from fastrm.data.loader import RefusedGroup
from fastrm.evaluate.accuracy import PreferenceMeter


@dataclass
class Progress:
    """What a checkpoint holds besides tensors. `position` alone says where the data stands."""

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
    window_meter: dict = field(default_factory=dict)
    window_seconds: float = 0.0
    window_wait_seconds: float = 0.0  # of these, waiting for packs


@dataclass(frozen=True)
class StepReport:
    """What one rank tells the others of a step.

    Attributes:
        members: numbers of the groups that it had.
        meter: what it has counted.
        refused: groups that could not be loaded.
        stop: it was asked to stop.
    """

    members: list[int]
    meter: PreferenceMeter
    refused: list[RefusedGroup]
    stop: bool
