"""Run a command of the GPU day on a CPU: its own code, on tiny models, with the GPU's operators emulated.

    python bench/gpu/rehearsal.py bench/training/run_training.py --model 7B --only alternatives --out FOLDER
    python bench/gpu/rehearsal.py -m fastrm.cli train configs/quickstart.yaml compile=layers kernels=triton

What it shows: that the command starts, goes through its whole path and writes what it promises. No figure means
anything.
"""

import functools
import runpy
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# Widths that FP8, the Triton kernels and 8-bit moments take, and four layers of each kind.
TEXT = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_hidden_layers": 4, "vocab_size": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
}  # fmt: skip
VISION = {
    "depth": 4, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 128,
    "fullatt_block_indexes": [3],
}  # fmt: skip
SCALE = 5  # numbers of tokens are divided by this
# The compiler's own passes without the machine code, which takes minutes to make for a CPU.
BACKEND = "aot_eager_decomp_partition"


def shrink_models() -> None:
    """Put tiny models under the published names."""
    from bench.harness.timing import Rounds
    from bench.training import measurement
    from bench.training import models as training_models
    from bench.training import plan as training_plan
    from bench.training import shapes as training_shapes
    from fastrm.model.architectures import PUBLISHED

    for name in training_models.PUBLISHED_NAMES.values():
        options = dict(PUBLISHED[name].options)
        options["text_config"] = {**options["text_config"], **TEXT}
        options["vision_config"] = {**options["vision_config"], **VISION}
        PUBLISHED[name] = replace(PUBLISHED[name], options=options)
    variants, others = training_shapes.main_variants, training_shapes.alternatives
    features = training_shapes.leave_one_out
    shrink_shapes()
    training_shapes.main_variants = lambda on_gpu: variants(True)
    training_shapes.alternatives = lambda on_gpu: others(True)
    training_shapes.leave_one_out = lambda on_gpu: features(True)
    measurement.matmul_sizes = lambda model: [(64, 64, 64)]
    measurement.VARIANT_SECONDS, measurement.ROUNDS = 0, Rounds(1, 1)
    measurement.VARIANT_RESERVE_SECONDS = measurement.COMPILED_RESERVE_SECONDS = measurement.FP8_RESERVE_SECONDS = 5
    # memory.py looks for the largest size that fits: here two groups.
    training_plan.planned_bytes = lambda model, config, shape, variant: shape.num_groups << 30


def shrink_shapes() -> None:
    """Replace every shape by one group a step, with a fifth of the tokens that its name says."""
    from bench.training import shapes as training_shapes
    from bench.training.shapes import TrainingShape

    shapes, name = training_shapes.training_shapes, TrainingShape.name.fget

    def small(*arguments) -> list[TrainingShape]:
        return [
            replace(s, num_groups=1, prefix_tokens=s.prefix_tokens // SCALE, response_tokens=s.response_tokens // SCALE)
            for s in shapes(*arguments)
        ]

    def whole(shape: TrainingShape) -> TrainingShape:
        tokens = shape.prefix_tokens, shape.response_tokens
        return replace(shape, prefix_tokens=SCALE * tokens[0], response_tokens=SCALE * tokens[1])

    training_shapes.GRIDS |= {1300 // SCALE: (8, 10), 640 // SCALE: (6, 8), 300 // SCALE: (4, 4), 640: (6, 8)}
    training_shapes.training_shapes = small
    TrainingShape.name = property(lambda shape: name(whole(shape)))


def emulate_operators():
    """Make every attention backend run here, and stop before machine code; keep the returned object."""
    import fastrm.model.network as network
    from bench.gpu import emulation
    from bench.training import variants as training_variants
    from fastrm_kernels.dispatch import Choice
    from fastrm_kernels.tree_attention import api

    pick = network.pick_backend
    # Triton's interpreter cannot multiply bfloat16. Its stand-in can, also where layers are not compiled.
    api.triton_attention_obstacle = lambda query, *others: None

    @functools.wraps(pick)
    def picked(requested, kernels, device, dtype, head_dims):
        wanted = "triton" if requested == "auto" and kernels == "triton" else requested
        if wanted in ("triton", "flash"):
            return Choice(wanted, "emulated")
        return pick(requested, kernels, device, dtype, head_dims)

    network.pick_backend = picked
    for function in (network.RewardNetwork.compile_layers, training_variants.CompiledLayers.__init__):
        function.__defaults__ = (BACKEND,)
    return emulation.register()


def main() -> None:
    sys.argv = sys.argv[1:]
    shrink_models()
    _operators = emulate_operators()
    if sys.argv[0] == "-m":
        sys.argv = sys.argv[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
