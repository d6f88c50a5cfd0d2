"""Benchmark of whole training steps on a small model: the variants of run_training.py, gated, and fastrm's floor."""

from dataclasses import replace

import pytest

from bench.training.gate import Gate
from bench.training.measurement import Measured
from bench.training.results import FASTRM, FLOOR, FLOOR_SHAPE, PLAIN
from bench.training.shapes import leave_one_out, main_variants, training_shapes

# Without a GPU, FP8 is emulated, which tests its results but not its speed.
FP8 = replace(main_variants(on_gpu=True)[3], compile=False, kernels="auto", attention="auto")
VARIANTS = {variant.name: variant for variant in [*main_variants(False), *leave_one_out(False), FP8]}


@pytest.fixture(scope="module")
def gate():
    return Gate("small", "cpu")


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_computes_the_same_step(name, gate):
    gate.check(VARIANTS[name])


def test_training_step_beats_the_plain_trainer(benchmark):
    if benchmark.disabled:
        return
    shape = next(shape for shape in training_shapes("small") if shape.name == FLOOR_SHAPE)
    variants = [VARIANTS[PLAIN], VARIANTS[FASTRM]]
    entry = benchmark.pedantic(Measured("small", 60.0).measure, (shape, variants, "main"), rounds=1)
    failed = {name: variant["failed"] for name, variant in entry["variants"].items() if variant["failed"]}
    assert not failed
    benchmark.extra_info.update(entry)
    # On shared cores the clock also measures other work; CPU time is then still fair.
    plain, fastrm = (entry["variants"][name]["seconds"] for name in (PLAIN, FASTRM))
    ratio = max(plain[kind] / fastrm[kind] for kind in ("median", "cpu"))
    assert ratio >= FLOOR, f"fastrm is {ratio:.2f} times as fast as the plain trainer, wanted at least {FLOOR}"
