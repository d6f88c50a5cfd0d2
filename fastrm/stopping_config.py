"""The settings of a run's best evaluation and of early stopping, and the figures by which they may choose."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from fastrm.sections import Positive, Section

ACCURACY = "eval/accuracy"
# The parts of a critic's loss in metrics.jsonl: of its preferences, and of the critiques that it learns to write.
LOSS_PARTS = ("preference_loss", "critique_loss")


class StoppingConfig(Section):
    """The rule by which a run stops before its last step, and chooses its best evaluation."""

    metric: str = ACCURACY
    """The figure of an evaluation, as metrics.jsonl names it: eval/accuracy, eval/loss or eval/margin, or of one named
    set, as eval/hard/accuracy; with ratings eval/loss or eval/mse; of a judge eval/loss; of a critic besides
    eval/preference_loss or eval/critique_loss. A loss or an error is better where it is lower, the others where they
    are higher. It also chooses the best evaluation."""
    patience: Positive = 3
    """Evaluations in a row without an improvement after which the run stops."""
    min_delta: Annotated[float, Field(ge=0.0)] = 0.0
    """The change below or at which a better figure is no improvement, compared with the last one that was."""


def metric_names(sets: list[str], figures: Sequence[str]) -> list[str]:
    """Return the names of the figures that an evaluation on sets of these names writes."""
    prefixes = ("eval", *(f"eval/{name}" for name in sets))
    return [f"{prefix}/{figure}" for prefix in prefixes for figure in figures]


def is_better(metric: str, value: float, than: float, by: float = 0.0) -> bool:
    """Return whether a figure of an evaluation is better than another, by more than `by`: losses lower, others higher.
    """
    gain = than - value if metric.endswith(("loss", "mse")) else value - than
    return gain > by
