"""The stage that times the loss of turns: its gate lets only what is right through."""

import pytest
import torch

from bench.gpu import turn_loss
from bench.harness.gate import RedGate
from tests.helpers.support import needs_interpreter

SIZES = (48, 512, "cpu", torch.float32)


def test_the_chunks_pass_and_have_figures():
    found = turn_loss.measure(*SIZES)["chunks of PyTorch's operations"]
    assert found["failed"] is None and found["median"] > 0 and found["rounds"] >= 3 and "peak_mib" not in found


@needs_interpreter
def test_ligers_kernel_passes():
    pytest.importorskip("liger_kernel")
    turn_loss.gate(*SIZES, "triton")


@pytest.mark.parametrize("part", ["loss", "rows", "head"])
def test_a_program_that_computes_something_else_has_no_figure(part, monkeypatch):
    found = turn_loss.Case.found

    def wrong(case, impl):
        result = found(case, impl)
        result[part] = result[part] * 1.001
        return result

    monkeypatch.setattr(turn_loss.Case, "found", wrong)
    with pytest.raises(RedGate, match=part):
        turn_loss.gate(*SIZES, "eager")
    assert turn_loss.measure(*SIZES)["chunks of PyTorch's operations"]["failed"].startswith("red gate")
