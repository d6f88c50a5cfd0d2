"""How layers are evaluated: fused projections, torch.compile, checkpointing, the vision layout, Liger."""

import dataclasses
import gc

import pytest
import torch
import triton
import triton.language as tl
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from fastrm.data.media import format
from fastrm.data.packing import Pack
from fastrm.errors import ConfigError
from fastrm.model import layers
from fastrm.model.backbone import PackLayouts
from fastrm.model.export import load_model, save_model
from fastrm.model.fusion import FusedLinear, join_parts, split_fused
from fastrm.model.pooling import MeanLayout
from fastrm.model.vision.internvl import TileLayout
from fastrm.model.vision.qwen2_vl import VisionLayout, VisionShape
from fastrm.model.vision.qwen3_vl import PlacedLayout
from fastrm_kernels import TreeLayout, preference_loss
from fastrm_kernels.tree_attention.tiles import TileList, WorkLists
from tests.helpers.support import FAMILIES, MROPE, make_image, make_model, make_record, needs_interpreter, pack_of

FUSED_FAMILIES = ["qwen2_5_vl", "qwen2_vl", "qwen3_vl", "internvl", "qwen2", "qwen3", "llama"]


def _records(family, seed=0):
    images = [make_image(112, 90, seed)] if "vl" in family else []
    return [make_record(10 * seed + 1, num_responses=3, images=images), make_record(10 * seed + 2, prompt_words=9)]


def _step(network, pack):
    """Rewards, and gradients by stock name."""
    rewards = network(pack)
    preference_loss(rewards, pack.edges, center=0.1).backward()
    gradients = {
        stock: piece
        for name, p in network.named_parameters()
        if p.grad is not None
        for stock, piece in split_fused(network, name, p.grad)
    }
    network.zero_grad(set_to_none=True)
    return rewards.detach(), gradients


def _difference(found, wanted):
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted)


class TestFusedProjections:
    @pytest.mark.parametrize("family", FUSED_FAMILIES)
    def test_same_rewards_gradients_and_names_as_stock(self, family):
        network, fused = make_model(family), make_model(family)
        # Three layers; the last keeps q, k and v.
        assert fused.fuse_projections() == 2 + 3
        pack = pack_of(network, _records(family))
        wanted, gradients = _step(network, pack)
        rewards, found = _step(fused, pack)
        assert (rewards - wanted).abs().max() <= 1e-6
        assert _difference(found, gradients) <= 1e-6
        state = network.state_dict()
        assert state.keys() == fused.state_dict().keys()
        assert all(torch.equal(tensor, fused.state_dict()[name]) for name, tensor in state.items())

    def test_loads_what_an_unfused_network_saved_and_the_other_way_round(self, tmp_path):
        source, target = make_model("qwen2", seed=1), make_model("qwen2", seed=2)
        target.fuse_projections()
        target.load_state_dict(source.state_dict())
        save_model(target, tmp_path / "model")
        exported = load_file(tmp_path / "model" / "model.safetensors")
        assert all(torch.equal(tensor, exported[name]) for name, tensor in source.state_dict().items())
        assert not any("qkv_proj" in name or "gate_up_proj" in name for name in exported)
        again = load_model(tmp_path / "model")
        pack = pack_of(source, _records("qwen2"))
        assert torch.equal(again(pack), source(pack))

    def test_a_missing_part_is_named(self):
        network = make_model("qwen2")
        network.fuse_projections()
        state = network.state_dict()
        del state["model.layers.0.self_attn.k_proj.weight"]
        with pytest.raises(RuntimeError, match=r"layers\.0\.self_attn\.qkv_proj\.weight"):
            network.load_state_dict(state)

    def test_parts_are_split_and_joined_by_parameter_name(self):
        network = make_model("qwen2")
        network.fuse_projections()
        state = network.state_dict()
        for name, parameter in network.named_parameters():
            pieces = dict(split_fused(network, name, parameter.data))
            assert all(torch.equal(piece, state[stock]) for stock, piece in pieces.items())
            assert torch.equal(join_parts(network, name, state), parameter)

    def test_frozen_layers_stay_frozen(self):
        network = make_model("qwen2_5_vl")
        network.freeze(["language"])
        network.fuse_projections()
        assert not any(p.requires_grad for m in network.modules() if isinstance(m, FusedLinear) for p in m.parameters())


class TestCompiledLayers:
    @pytest.fixture(autouse=True)
    def nothing_compiled_before(self):
        # torch.compile remembers which sizes have varied, also between networks of other shapes.
        torch._dynamo.reset()

    def _compiled(self, family, backend, fuse=False, mode="none"):
        network = make_model(family)
        if fuse:
            network.fuse_projections()
        graphs = network.compile_layers(backend)
        network.set_kernels(torch.float32, attention="sdpa")
        network.use_activation_checkpointing(mode)
        return network, graphs

    @pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl", "internvl", "qwen3"])
    def test_fifty_packs_of_different_sizes_make_one_graph_for_each_kind_of_layer(self, family):
        network, graphs = self._compiled(family, "aot_eager")
        stock, sizes = make_model(family), set()
        for number in range(50):
            images = "vl" in family and number % 3
            records = [
                make_record(number, num_responses=2 + number % 3, prompt_words=5 + 3 * number,
                            images=[make_image(28 + 9 * number, 200 - 3 * number, number)] if images else ())
            ]  # fmt: skip
            pack = pack_of(network, records)
            sizes.add(pack.num_tokens)
            if number % 10 == 9:
                with torch.no_grad():
                    assert (network(pack) - stock(pack)).abs().max() <= 1e-6
            elif number % 10 == 4:
                assert _difference(_step(network, pack)[1], _step(stock, pack)[1]) <= 1e-6
            else:
                _step(network, pack)
        kinds = 2 if "vl" in family else 1
        assert len(sizes) > 40
        assert graphs.count == 2 * kinds  # for training, and for evaluation

    def test_networks_do_not_use_up_each_others_graphs(self):
        # torch.compile refuses more than eight graphs of one function.
        for _ in range(10):
            network, graphs = self._compiled("qwen2", "aot_eager")
            _step(network, pack_of(network, _records("qwen2")))
            assert graphs.count == 1

    def test_selective_checkpointing_keeps_fewer_bytes_in_a_graph(self):
        kept = {}
        for mode in ("none", "selective"):
            network, _ = self._compiled("qwen2", "aot_eager_decomp_partition", mode=mode)
            pack = pack_of(network, _records("qwen2"))
            saved = {}

            def note(tensor, saved=saved):
                saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                loss = preference_loss(network(pack), pack.edges)
            kept[mode] = sum(saved.values())
            loss.backward()
        assert kept["selective"] < 0.9 * kept["none"]

    @pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl"])
    @pytest.mark.parametrize("mode", ["none", "selective", "full"])
    def test_every_checkpointing_mode_and_fused_projections_give_stock_gradients(self, mode, family):
        network, graphs = self._compiled(family, "aot_eager", fuse=True, mode=mode)
        pack = pack_of(network, _records(family))
        wanted, gradients = _step(make_model(family), pack)
        rewards, found = _step(network, pack)
        assert (rewards - wanted).abs().max() <= 1e-6
        assert _difference(found, gradients) <= 1e-6
        assert graphs.count == 2

    def test_inductor_makes_kernels_of_the_layers(self):
        network, graphs = self._compiled("qwen3", "inductor")
        pack = pack_of(network, _records("qwen3"))
        wanted, gradients = _step(make_model("qwen3"), pack)
        rewards, found = _step(network, pack)
        assert graphs.count == 1
        assert (rewards - wanted).abs().max() <= 1e-6
        assert _difference(found, gradients) <= 1e-6

    def test_attention_is_one_operator_of_the_graph(self):
        seen = []

        def backend(graph, inputs):
            seen.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
            return graph

        network, _ = self._compiled("qwen2", backend)
        network(pack_of(network, _records("qwen2")))
        assert len(seen) == 1
        assert sum("tree_attention_eager" in str(target) for target in seen[0]) == 1
        assert not any("scaled_dot_product" in str(target) for target in seen[0])

    def test_layouts_live_until_the_backward_pass_is_done(self):
        network, _ = self._compiled("qwen2", "aot_eager")
        pack = pack_of(network, _records("qwen2"))
        edges, rewards = pack.edges, network(pack)
        del pack
        gc.collect()
        preference_loss(rewards, edges).backward()
        assert all(p.grad is not None for p in network.parameters())

    @needs_interpreter
    def test_triton_kernels_inside_a_graph(self, monkeypatch):
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        monkeypatch.setitem(FAMILIES, "qwen2", {**FAMILIES["qwen2"], **heads})
        network = make_model("qwen2")
        pack = pack_of(network, [make_record(1, prompt_words=5, response_words=(1, 9))])
        wanted, gradients = _step(network, pack)
        graphs = network.compile_layers("aot_eager")
        network.set_kernels(torch.float32, attention="triton")
        # Into how many parts the gradient of the keys is divided depends on the pack.
        for num_parts in (1, 2):
            monkeypatch.setattr(TileList, "parts_wanted", lambda *_, num_parts=num_parts: num_parts)
            rewards, found = _step(network, pack)
            assert graphs.count == 1
            assert (rewards - wanted).abs().max() <= 1e-6
            assert _difference(found, gradients) <= 1e-6


class _Count(TorchDispatchMode):
    """Calls of operators by name."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        self.calls[operator.__name__] = self.calls.get(operator.__name__, 0) + 1
        return operator(*arguments, **(keywords or {}))


def test_selective_checkpointing_repeats_what_is_cheap_and_full_repeats_all():
    calls = {}
    for mode in ("none", "selective", "full"):
        network = make_model("qwen2")
        network.use_activation_checkpointing(mode)
        pack = pack_of(network, _records("qwen2"))
        loss = preference_loss(network(pack), pack.edges)
        with _Count() as counter:
            loss.backward()
        products = sum(counter.calls.get(name, 0) for name in ("mm.default", "addmm.default"))
        attention = counter.calls.get("tree_attention_eager.default", 0)
        calls[mode] = (products, attention, counter.calls.get("silu.default", 0))
    assert calls["none"][1:] == (0, 0)
    assert calls["selective"] == (calls["none"][0], 0, 3)  # silu of each of the three layers, no product
    # q, k, v, o, gate, up and down of each layer but for what the gradient does not need.
    assert calls["full"][0] >= calls["none"][0] + 3 * 6
    assert calls["full"][1] >= 3 and calls["full"][2] == 3


GRIDS = [
    [(1, 2, 2)], [(1, 8, 8)], [(1, 10, 6)], [(1, 4, 34)], [(1, 34, 2)], [(1, 14, 18), (1, 2, 2), (1, 6, 30)],
    [(2, 8, 6)], [(3, 10, 10), (1, 4, 4)],
]  # fmt: skip


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"])
def test_vision_tower_equals_the_stock_forward_on_every_shape(family):
    network = make_model(family)
    runner, width = network._runner, network.model.visual.patch_embed.proj.weight[0].numel()
    network.model.set_attn_implementation({"": "eager", "text_config": "eager", "vision_config": "eager"})
    for grids in GRIDS:
        pixels = torch.randn(sum(t * h * w for t, h, w in grids), width)
        stock = network.model.visual(pixels, grid_thw=torch.tensor(grids))
        ours = runner.media_features(pixels, runner.tower.shape.lay_out(grids))
        assert (ours.tokens - stock.pooler_output).abs().max() <= 1e-5, grids
        deep = getattr(stock, "deepstack_features", [])
        assert len(ours.deep) == len(deep) == (2 if family == "qwen3_vl" else 0)
        for found, wanted in zip(ours.deep, deep, strict=True):
            assert (found - wanted).abs().max() <= 1e-5, grids


def test_a_vision_plan_moves_with_its_tensors():
    layout = VisionLayout.build([(1, 6, 8)], VisionShape(2, 2, (0,)))
    moved = layout.to("meta")
    tensors = (moved.order, moved.restore, moved.positions, moved.windows.cu_seqlens_q)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert torch.equal(layout.order[layout.restore], torch.arange(12))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl"])
@pytest.mark.parametrize("stage", ["trained", "frozen"])
def test_a_pack_without_images_runs_the_tower_at_weight_zero_when_told(stage, family):
    network = make_model(family)
    if stage == "frozen":
        network.freeze(["vision"])
    pack = pack_of(network, [make_record(1)])
    wanted, gradients = _step(network, pack)
    network.always_run_tower = True
    rewards, found = _step(network, pack)
    assert torch.equal(rewards, wanted)
    added = found.keys() - gradients.keys()
    of_tower = network.tower.parameters()
    assert added == {name for name, p in network.named_parameters() if p in of_tower and p.requires_grad}
    assert all(not found[name].any() for name in added)
    assert all(torch.equal(found[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl"])
def test_the_blank_image_of_a_compiled_network_lives_until_the_backward_pass(family):
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        network = make_model(family)
        network.always_run_tower = True
        if compiled:
            network.compile_layers("aot_eager")
            network.set_kernels(torch.float32, attention="sdpa")
        results.append(_step(network, pack_of(network, [make_record(1)]))[1])
    assert _difference(*results) <= 1e-6


def test_always_run_tower_means_nothing_for_a_text_model():
    network = make_model("qwen2")
    network.always_run_tower = True
    assert network.always_run_tower is False


def _fake(value):
    """The same structure with every tensor replaced by a fake one: it has a shape, but nothing to read."""
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, dtype=value.dtype)
    if isinstance(value, WorkLists):
        return WorkLists.from_tensors([_fake(tensor) for tensor in value.tensors()])
    if isinstance(value, dict):
        return {key: _fake(item) for key, item in value.items()}
    if isinstance(value, TreeLayout | VisionLayout | PlacedLayout | TileLayout | MeanLayout | PackLayouts | Pack):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **{name: _fake(item) for name, item in fields.items()})
    return value


@pytest.mark.parametrize(
    ("family", "impl", "pooling"),
    [
        ("qwen2_5_vl", "triton", "anchor"),
        ("qwen3_vl", "triton", "anchor"),
        ("qwen2_5_vl", "varlen", "anchor"),
        ("qwen2_5_vl", "varlen", "mean"),
        ("internvl", "triton", "anchor"),
    ],
)
def test_a_pass_reads_nothing_back_from_the_device(family, impl, pooling, monkeypatch):
    # On a GPU every read waits for all that was given to it before. Fake tensors cannot be read at all.
    monkeypatch.setattr(PackLayouts, "to", lambda self, device: self)
    monkeypatch.setattr(format, "_byte_values", lambda form, of_video, device: torch.empty(256 * len(form.mean)))
    rope = {**MROPE, "mrope_section": [4, 2, 2]}
    if family == "internvl":
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
    text = {"num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": rope}
    options = FAMILIES[family]
    monkeypatch.setitem(FAMILIES, family, {**options, "text_config": {**options["text_config"], **text}})
    network = make_model(family, dtype=torch.bfloat16, pooling=pooling)
    pack = pack_of(network, _records(family))
    runner = network._runner
    runner.compiled = True  # attention by its traceable form, without a compiler
    runner.set_kernels(impl)
    pack.layouts = runner.layout_builder(torch.bfloat16)(pack)
    with FakeTensorMode():
        for module in network.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    fake = None if tensor is None else _fake(tensor)
                    tensors[name] = torch.nn.Parameter(fake) if isinstance(tensor, torch.nn.Parameter) else fake
        pack = _fake(pack)
        rewards = network(pack)
        assert rewards.shape == (5,)
        preference_loss(rewards, pack.edges, impl="eager").backward()
    assert all(p.grad is not None for p in network.parameters())


class _Scalar(float):
    """Triton's interpreter hands Python floats to a kernel as they are; Liger's calls this method of them."""

    def to(self, dtype):
        return self


@triton.jit
def _rsqrt(x):
    return 1 / tl.sqrt(x)


@needs_interpreter
class TestLiger:
    def test_norm_and_gate_equal_the_stock_ones(self, monkeypatch):
        rms_norm = pytest.importorskip("liger_kernel.ops.rms_norm")
        # What the interpreter lacks: numbers with methods, and CUDA's own rsqrt.
        monkeypatch.setattr(rms_norm, "rsqrt", _rsqrt)
        convert = interpreter._implicit_cvt
        monkeypatch.setattr(interpreter, "_implicit_cvt", lambda x: _Scalar(x) if type(x) is float else convert(x))
        norm = make_model("qwen2").model.norm
        states = torch.randn(7, 32, requires_grad=True)
        upstream = torch.randn(7, 32)
        wanted = torch.autograd.grad(norm(states), (states, norm.weight), upstream)
        output = layers.liger_norm(norm, states)
        assert type(output.grad_fn).__name__ == "LigerRMSNormFunctionBackward"
        kept = upstream.clone()
        found = torch.autograd.grad(output, (states, norm.weight), upstream)
        assert torch.equal(upstream, kept), "the incoming gradient was overwritten"
        for ours, stock in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6)
        gate, up = torch.randn(2, 7, 32, requires_grad=True).unbind(0)
        wanted = torch.autograd.grad(layers.stock_gate(torch.nn.SiLU(), gate, up), (gate, up), upstream)
        found = torch.autograd.grad(layers.liger_gate(torch.nn.SiLU(), gate, up), (gate, up), upstream)
        for ours, stock in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6)

    def test_what_is_not_liger_is_not_taken_for_it(self, monkeypatch):
        monkeypatch.setattr(layers, "liger_norm", layers.stock_norm)
        with pytest.raises(ConfigError, match="LigerRMSNorm did not run"):
            layers._prove_liger(False, torch.device("cpu"))


@pytest.mark.parametrize(
    "kernels, compiled, expected",
    [
        ("auto", False, "stock operations (kernels: auto)"),
        ("triton", False, "stock operations (Liger needs CUDA, this is cpu)"),
        ("triton", True, "stock operations, made into kernels by torch.compile"),
    ],
)
def test_the_choice_of_norm_and_gate_says_why(kernels, compiled, expected):
    norm, gate, why = layers.pick_norm_and_gate(kernels, compiled, False, torch.device("cpu"))
    assert (norm, gate, why) == (layers.stock_norm, layers.stock_gate, expected)
