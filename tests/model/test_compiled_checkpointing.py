"""What a compiled backward pass computes again: never attention, whose forward pass is dear."""

from collections import Counter

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

from tests.helpers.support import FAMILIES, MROPE, make_image, make_model, make_record, pack_of

FORWARD = {
    "triton": "fastrm.tree_attention.default",
    "varlen": "torch_attn._varlen_attn.default",
    "eager": "fastrm.tree_attention_eager.default",
}


class WithoutAttention(torch.fx.Interpreter):
    """Runs a graph; what no CPU has a kernel for gives zeros in the shape of the queries."""

    def call_function(self, target, args, kwargs):
        if str(target) in FORWARD.values() and str(target) != FORWARD["eager"]:
            return (torch.zeros_like(args[0]), *[torch.zeros(())] * 3)
        return super().call_function(target, args, kwargs)


class Partitions:
    """A torch.compile backend that keeps the operators of its forward and backward graphs, as inductor divides them."""

    def __init__(self):
        self.forward: list[Counter] = []
        self.backward: list[Counter] = []
        self._backend = aot_autograd(fw_compiler=self._run, partition_fn=self._divide)

    def __call__(self, graph, inputs):
        return self._backend(graph, inputs)

    def _divide(self, joint, inputs, **options):
        parts = min_cut_rematerialization_partition(joint, inputs, **options)
        for found, part in zip((self.forward, self.backward), parts, strict=True):
            found.append(Counter(str(node.target) for node in part.graph.nodes if node.op == "call_function"))
        return parts

    @staticmethod
    def _run(graph, inputs):
        from torch._functorch.aot_autograd import make_boxed_func

        return make_boxed_func(WithoutAttention(graph).run)


@pytest.mark.parametrize("impl", FORWARD)
@pytest.mark.parametrize("mode", ["none", "selective"])
def test_the_backward_pass_never_calls_attentions_forward(impl, mode, monkeypatch):
    torch._dynamo.reset()
    options = FAMILIES["qwen2_5_vl"]  # with heads of 16, which the kernels have
    rope = {**MROPE, "mrope_section": [4, 2, 2]}
    text = {**options["text_config"], "num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": rope}
    monkeypatch.setitem(FAMILIES, "qwen2_5_vl", {**options, "text_config": text})
    network, partitions = make_model("qwen2_5_vl"), Partitions()
    network.compile_layers(partitions)
    network.use_activation_checkpointing(mode)
    runner = network._runner
    runner.set_kernels(impl)
    pack = pack_of(network, [make_record(1, num_responses=3, images=[make_image(80, 60, 1)])])
    # All layers but the last, which is never compiled.
    runner._run_layers(runner.language.layers[:-1], pack, runner._layouts(pack))
    assert len(partitions.forward) >= 2  # decoder layers and vision blocks
    assert {graph[FORWARD[impl]] for graph in partitions.forward} == {1}
    assert {graph[FORWARD[impl]] for graph in partitions.backward} == {0}
