"""Whole training steps on a small model: the variants of run_training.py, gated, and the floor of fastrm's gain."""

import pytest

from training_results import FASTRM, FLOOR, FLOOR_SHAPE, PLAIN
from training_run import Gate, Measured
from training_shapes import leave_one_out, main_variants, training_shapes

VARIANTS = {variant.name: variant for variant in [*main_variants(False), *leave_one_out(False)]}


@pytest.fixture(scope="module")
def gate():
    return Gate("small", "cpu")


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_computes_the_same_step(name, gate):
    gate.check(VARIANTS[name])


def test_training_step_beats_the_plain_trainer(benchmark):
    shape = next(shape for shape in training_shapes("small") if shape.name == FLOOR_SHAPE)
    variants = [VARIANTS[PLAIN], VARIANTS[FASTRM]]
    if benchmark.disabled:
        return
    measured = Measured("small", 60.0)
    entry = benchmark.pedantic(measured.measure, (shape, variants, "main"), rounds=1)
    failed = {name: variant["failed"] for name, variant in entry["variants"].items() if variant["failed"]}
    assert not failed
    benchmark.extra_info.update(entry)
    # The clock measures other work on shared cores too; CPU time is then still a fair judge.
    plain, fastrm = (entry["variants"][name]["seconds"] for name in (PLAIN, FASTRM))
    ratio = max(plain[kind] / fastrm[kind] for kind in ("median", "cpu"))
    assert ratio >= FLOOR, f"fastrm is {ratio:.2f} times as fast as the plain trainer, wanted at least {FLOOR}"
