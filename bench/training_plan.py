"""The prediction of `fastrm plan` for the memory of a benchmark's step, to compare with the measured memory."""

import functools

from fastrm.config import Config
from fastrm.forecast.layers import Computation, Rows
from fastrm.forecast.memory import peak_memory
from fastrm.model.network import RewardNetwork
from training_models import make_network
from training_shapes import TrainingShape, Variant

# The attention backends, by the plan's names for how they hold keys; sdpa and auto on a CPU gather them.
ATTENTION = {"triton": "triton", "flash": "varlen", "flash_attn": "varlen"}


def planned_bytes(model: str, config: Config, shape: TrainingShape, variant: Variant) -> int | None:
    """Return the planned peak memory of a step of one pack, weights and states included.

    Args:
        model: 3B or 7B.
        config: of the step, for its precision, states and checkpointing.

    Returns:
        bytes; None for a variant that lacks what the plan takes for granted (sharing, pruning, an image once).
    """
    if variant.plain or not (variant.share and variant.image_once and variant.prune):
        return None
    how = Computation(
        bf16=config.precision.dtype == "bf16",
        bf16_weights=config.precision.weights == "bf16",
        fp8=variant.fp8 != "off",
        attention=ATTENTION.get(variant.attention, "eager"),
        liger=variant.kernels == "triton" and not variant.compile,
        fused=variant.fuse,
        accumulated=False,
    )
    return peak_memory(_network(model), config, rows_of(shape), how).total


def rows_of(shape: TrainingShape) -> Rows:
    """Return the rows of a shape's one pack."""
    num_responses = shape.num_groups * shape.num_responses
    keys = num_responses * (shape.prefix_tokens + shape.response_tokens)
    height, width = shape.grid
    return Rows(shape.tree_tokens, keys, num_responses, keys, 4 * height * width * shape.num_groups)


@functools.cache
def _network(model: str) -> RewardNetwork:
    return make_network(model, "meta")
