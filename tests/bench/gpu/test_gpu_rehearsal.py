"""Every stage of a GPU day through its own code, on a CPU; see "Rehearsal" in bench/README.md."""

import json
import subprocess
import sys

import pytest

from tests.helpers.project import PROJECT
from tests.helpers.waiting import PATIENCE

# The stand-ins against fastrm's own eager attention. In a process of its own: they replace operators.
EMULATED = """
import math, sys
sys.path[:0] = [".", "kernels"]
import torch
from bench.gpu import emulation
from fastrm_kernels import TreeLayout, tree_attention
from fastrm_kernels.tree_attention.autograd import tree_attention_triton
from fastrm_kernels.tree_attention.gather import take_rows
from fastrm_kernels.tree_attention.varlen import varlen_arguments, varlen_options
from torch.nn.attention.varlen import varlen_attn

operators = emulation.register()
layout = TreeLayout.build([9, 4, 7, 5], [-1, 0, 0, 2])
torch.manual_seed(0)
leaves = [torch.randn(25, heads, 16, dtype=torch.bfloat16).requires_grad_() for heads in (4, 2, 2)]
upstream = torch.randn(25, 4, 16, dtype=torch.bfloat16)

def varlen(query, key, value):
    rows = (take_rows(x, layout.key_index) for x in (key, value))
    return varlen_attn(*varlen_arguments(query, *rows, layout), **varlen_options(4, 2, None, True))

def results(attention, inputs):
    output = attention(*inputs)
    return [output, *torch.autograd.grad(output, inputs, upstream.to(output.dtype))]

exact = [x.detach().double().requires_grad_() for x in leaves]
truth = results(lambda *x: tree_attention(*x, layout, impl="eager"), exact)
ways = {"triton": lambda *x: tree_attention_triton(*x, layout), "varlen": varlen}
for name, way in ways.items():
    for found, wanted in zip(results(way, leaves), truth):
        error = float((found.double() - wanted).abs().max() / wanted.abs().max())
        assert error < 4 * torch.finfo(torch.bfloat16).eps, (name, error)
print("agree")
"""


def test_emulated_operators_compute_attention():
    done = subprocess.run(
        [sys.executable, "-c", EMULATED], cwd=PROJECT, env={"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.stdout == "agree\n", done.stderr


@pytest.mark.slow
def test_every_stage_runs_on_a_cpu_and_no_fault_reaches_another(tmp_path):
    """About ten minutes on one core that is idle."""
    command = [sys.executable, "bench/gpu_day.py", "--rehearse", "--out", str(tmp_path), "--seconds", "2000"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=2400)
    record = json.loads((tmp_path / "gpu_day.json").read_text())
    statuses = {stage["name"]: stage["status"] for stage in record["stages"]}
    assert record["rehearsal"] and done.returncode == 1
    for name, status in statuses.items():
        if not name.startswith("fault-"):
            assert status == "done", (name, status, record)
    assert statuses["fault-hang"].startswith("killed") and statuses["fault-death"] == "died: SIGKILL"
    results = {name for stage in record["stages"] for name in stage.get("results", {})}
    assert {"facts.json", "tests.json", "update.json", "memory.json", "turn_loss.json", "summary.json"} <= results
    training = [found for stage in record["stages"] for name, found in stage.get("results", {}).items()
                if name.endswith("-training.json")]  # fmt: skip
    variants = [v for found in training for entry in found["entries"] for v in entry["variants"].values()]
    assert len(training) == 4 and variants and not [v["failed"] for v in variants if v["failed"]]
    assert "A rehearsal" in (tmp_path / "gpu_day.md").read_text()
