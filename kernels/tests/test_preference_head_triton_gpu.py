"""The Triton kernels of the preference head, on a GPU alone: bitwise repeats, CUDA graphs, several devices."""

import pytest
import torch

from fastrm_kernels.preference_head import preference_head_loss
from kernel_cases import heads
from kernel_cases.heads import check, equal, make


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [7, 70, 300])
@pytest.mark.parametrize("widths", [(200, 96), (200,)], ids=["two layers", "one layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_hundred_runs_are_bitwise_equal(widths, num_rows, dtype):
    """Programs run in any order, and anchors repeat."""
    case = make(num_rows, widths, dtype, edges=2000)
    first = case.run("triton", dtype)
    for _ in range(100):
        assert equal(case.run("triton", dtype), first)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [7, 70, 300])
@pytest.mark.parametrize("widths", [(40, 33), (40,), (40, 33, 24)], ids=["two", "one", "three"])
def test_a_cuda_graph_replays_forward_and_backward_bitwise(widths, num_rows):
    cases = [make(num_rows, widths, seed=seed) for seed in (0, 1)]
    inputs = [[x.float() for x in case.tensors] for case in cases]
    leaves = [x.clone().requires_grad_() for x in inputs[0]]
    anchors, edges = cases[0].anchors.clone(), cases[0].edges.clone()
    upstream = [cases[0].upstream_loss.float(), cases[0].upstream_rewards.float()]

    def step():
        pairs = list(zip(leaves[2::2], leaves[3::2], strict=True))
        outputs = preference_head_loss(
            leaves[0], anchors, pairs, edges, norm_weight=leaves[1], center=0.01, impl="triton"
        )
        return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, upstream)]

    def fill(case, values):
        with torch.no_grad():
            for leaf, value in zip(leaves, values, strict=True):
                leaf.copy_(value)
        anchors.copy_(case.anchors)
        edges.copy_(case.edges)

    # Captured after a run on another stream, which compiles the kernels.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for case, values in zip(cases, inputs, strict=True):
        fill(case, values)
        expected = step()
        for x in captured:
            x.fill_(torch.nan)
        graph.replay()
        assert equal(captured, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("widths", [(40, 33), (40,), (40, 33, 24)], ids=["two", "one", "three"])
def test_tensors_need_not_be_on_the_current_device(widths, monkeypatch):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    monkeypatch.setattr(heads, "DEVICE", "cuda:1")
    with torch.cuda.device(0):
        for num_rows in (7, 70):
            check(make(num_rows, widths), torch.float32)
        assert torch.cuda.current_device() == 0
