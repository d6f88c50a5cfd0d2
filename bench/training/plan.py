"""The prediction of `fastrm plan` for the memory of a benchmark's step, to compare with the measured memory."""

import functools

from bench.training.models import make_network
from bench.training.shapes import TrainingShape, Variant
from fastrm.config import Config
from fastrm.forecast.fake_step import FakeSteps
from fastrm.forecast.full_pack import PackShape
from fastrm.forecast.memory import peak_memory
from fastrm.forecast.ways import with_settings
from fastrm.model.precision import token_multiple

# The attention backends, by the plan's names for how they hold keys; sdpa and auto on a CPU gather them.
ATTENTION = {"triton": "triton", "flash": "varlen", "flash_attn": "flash_attn"}


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
    if variant.fp8 != "off" and config.precision.dtype != "bf16":
        return None  # the small model's float32 products in FP8: no run is configured so
    settings = {"model.fuse_projections": variant.fuse, "precision.fp8": variant.fp8}
    planned = with_settings(config, settings).model_copy(
        update={"kernels": variant.kernels, "compile": "layers" if variant.compile else "off"}
    )
    attention = ATTENTION.get(variant.attention, "eager")
    return peak_memory(_steps(model), planned, pack_of(shape, variant.fp8), attention, num_packs=1).total


def pack_of(shape: TrainingShape, fp8: str = "off") -> PackShape:
    """Return the sizes of a shape's one pack, whose first prompt is longer by what FP8 fills a pack up with."""
    responses = (shape.response_tokens,) * shape.num_responses
    prompts = [shape.prefix_tokens] * shape.num_groups
    prompts[0] += -(sum(prompts) + shape.num_groups * sum(responses)) % token_multiple(fp8)
    height, width = shape.grid
    groups = [(prompt, responses) for prompt in prompts]
    return PackShape.of_groups(groups, (1, 2 * height, 2 * width), merge=2, share=True)


@functools.cache
def _steps(model: str) -> FakeSteps:
    """Return steps of the model without its weights."""
    return FakeSteps(make_network(model, "meta"))
