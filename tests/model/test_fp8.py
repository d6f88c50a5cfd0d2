"""FP8 linear layers: precision at the shapes of Qwen2.5-VL, awkward values, which layers, and what stays the same."""

import dataclasses
import importlib.util

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastrm.config import Config
from fastrm.data.batching import PackPlan
from fastrm.data.loader import PackBuilder
from fastrm.errors import ConfigError
from fastrm.evaluate.accuracy import Flips
from fastrm.model.export import load_model, save_model
from fastrm.model.precision import RECIPES, _check_device, convert_to_fp8, fp8_disabled, token_multiple
from tests.helpers.support import make_image, make_model, make_record

pytest.importorskip("torchao")
from fastrm.model.fp8_linear import Fp8FusedLinear, Fp8Linear, to_fp8

# (N, K) of Qwen2.5-VL's layers; q has the shape of o.
SHAPES = {
    "3B-qkv": (2560, 2048), "3B-o": (2048, 2048), "3B-gate": (11008, 2048), "3B-down": (2048, 11008),
    "7B-qkv": (4608, 3584), "7B-o": (3584, 3584),
}  # fmt: skip
LARGE_SHAPES = {
    "3B-gate_up": (22016, 2048), "7B-gate": (18944, 3584), "7B-gate_up": (37888, 3584), "7B-down": (3584, 18944),
}  # fmt: skip
# Of output, input, weight and bias gradient, in dB. 20 is what is asked for; two operands with e4m3's three
# bits of mantissa give 28.5, one of them in e5m2 with two bits 24.6, and bfloat16 gives 55.
E4M3, E5M2, BF16 = 26, 23, 50
LEAST_SQNR = {
    "tensorwise": (E4M3, E5M2, E5M2, BF16),
    "rowwise": (E4M3, E4M3, E4M3, BF16),
    "rowwise_gw_hp": (E4M3, E4M3, BF16, BF16),
}
# Of the gradient of a small network, against bf16; 0.005 is what bf16 is from float32.
LARGEST_ERROR = {"tensorwise": 0.06, "rowwise": 0.045, "rowwise_gw_hp": 0.045}
TEXT_LAYER = "model.language_model.layers.{}.{}"


def fp8_config(recipe):
    from torchao.float8 import Float8LinearConfig

    return dataclasses.replace(Float8LinearConfig.from_recipe_name(RECIPES[recipe]), emulate=True)


def forward_and_backward(linear, inputs, upstream):
    """Output, gradients of input, weight and bias; under bf16 autocast where the layer is an FP8 one."""
    linear.zero_grad()
    inputs = inputs.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=isinstance(linear, Fp8Linear)):
        output = linear(inputs)
    output.backward(upstream.to(output.dtype))
    return output.detach(), inputs.grad, linear.weight.grad.clone(), linear.bias.grad.clone()


def sqnr(exact, value) -> float:
    """Signal over quantisation noise, dB."""
    return float(20 * torch.log10(exact.norm() / (exact - value.float()).norm()))


def check_sqnr(rows, columns):
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(columns, rows, device="meta").to_empty(device="cpu")
    linear.weight.data.normal_(0, 0.02, generator=generator)
    linear.bias.data.normal_(0, 0.1, generator=generator)
    # What language models feed their layers: a few channels are far larger than the rest; and what comes
    # back to them: tokens near an anchor have far larger gradients than those far from one.
    inputs = torch.randn(64, columns, generator=generator)
    inputs[:, torch.randperm(columns, generator=generator)[: columns // 256]] *= 50
    upstream = torch.randn(64, rows, generator=generator) * 10 ** -(4 * torch.rand(64, 1, generator=generator))
    inputs, upstream = inputs.bfloat16().float(), upstream.bfloat16().float()
    exact = forward_and_backward(linear, inputs, upstream)
    for recipe, least in LEAST_SQNR.items():
        values = forward_and_backward(to_fp8(linear, fp8_config(recipe)), inputs, upstream)
        found = [sqnr(*pair) for pair in zip(exact, values, strict=True)]
        print(f"SQNR of {rows} x {columns}, {recipe}, dB: " + " ".join(f"{db:.1f}" for db in found))
        for name, db, wanted in zip(("output", "input", "weight", "bias"), found, least, strict=True):
            assert db >= wanted, f"{recipe}, {name}: {db:.1f} dB, wanted at least {wanted}"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_fp8_linear_is_precise_at_model_shapes(shape):
    check_sqnr(*shape)


@pytest.mark.slow
@pytest.mark.parametrize("shape", LARGE_SHAPES.values(), ids=LARGE_SHAPES)
def test_fp8_linear_is_precise_at_the_largest_shapes(shape):
    check_sqnr(*shape)


def with_zero_rows(inputs, upstream):
    inputs[20:], upstream[20:] = 0, 0


def with_nothing(inputs, upstream):
    inputs[:], upstream[:] = 0, 0


def with_zero_upstream(inputs, upstream):
    upstream[:] = 0


def with_an_outlier(inputs, upstream):
    inputs[3, 5], upstream[7, 2] = 3e4, 3e4


def with_tiny_values(inputs, upstream):
    inputs *= 1e-30
    upstream *= 1e-30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32-weights", "bf16-weights"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "change", [with_zero_rows, with_nothing, with_zero_upstream, with_an_outlier, with_tiny_values]
)
def test_awkward_values_give_no_nan(change, recipe, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    inputs, upstream = torch.randn(32, 64), torch.randn(32, 48)
    change(inputs, upstream)
    exact = forward_and_backward(linear, inputs, upstream)
    fp8 = to_fp8(linear.to(dtype), fp8_config(recipe))
    values = forward_and_backward(fp8, inputs, upstream)
    for name, value, truth in zip(("output", "input", "weight", "bias"), values, exact, strict=True):
        assert torch.isfinite(value).all(), f"gradient of {name}" if name != "output" else name
        # What is nothing stays nothing, and what is something is there.
        assert ((truth != 0) | (value == 0)).all() and torch.allclose(
            value.float(), truth, rtol=0.0, atol=float(truth.abs().max()) / 8 + 1e-20
        ), name
    assert {value.dtype for value in values[2:]} == {dtype}


def test_a_zero_weight_gives_the_bias():
    linear = nn.Linear(32, 32)
    linear.weight.data.zero_()
    fp8 = to_fp8(linear, fp8_config("rowwise"))
    output, grad_input, _, _ = forward_and_backward(fp8, torch.randn(16, 32), torch.randn(16, 32))
    assert torch.equal(output, linear.bias.bfloat16().expand(16, 32)) and not grad_input.any()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_weight_that_zero_3_frees_is_read_again_in_the_backward_pass(recipe):
    torch.manual_seed(0)
    linear = to_fp8(nn.Linear(32, 48), fp8_config(recipe))
    inputs, upstream = torch.randn(16, 32, requires_grad=True), torch.randn(16, 48)
    wanted = forward_and_backward(linear, inputs, upstream)
    linear.zero_grad()
    linear.weight.ds_id = 0  # DeepSpeed's mark of a weight that is divided over the ranks
    output = linear(inputs.bfloat16())
    gathered_again = linear.weight.detach().clone()
    linear.weight.data.zero_()
    linear.weight.data = gathered_again
    output.backward(upstream.bfloat16())
    assert torch.equal(inputs.grad.bfloat16(), wanted[1].bfloat16()) and inputs.grad.any()
    assert torch.equal(linear.weight.grad, wanted[2])


def pack_with(network, records, multiple=16):
    """One pack of all records, its row padded."""
    builder = PackBuilder(records, network.encoder, True, multiple=multiple)
    return builder[PackPlan(tuple(range(len(records))), 0, True)].pack


def image_records(seeds=(1, 2)):
    return [make_record(seed, images=[make_image(60, 50, seed)]) for seed in seeds]


def pairs_pack(network, seeds=(1, 2)):
    return pack_with(network, image_records(seeds))


def rewards_of(network, pack):
    with torch.autocast("cpu", torch.bfloat16):
        return network(pack)


def gradients_of(network, pack):
    """Of all parameters, of a loss with every reward in it."""
    network.zero_grad()
    rewards = rewards_of(network, pack)
    (rewards * torch.arange(1, len(rewards) + 1)).sum().backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def flat(gradients) -> torch.Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


@pytest.fixture
def network():
    return make_model("qwen2_5_vl")


def test_only_wide_layers_that_see_all_tokens_are_converted(network):
    report = convert_to_fp8(network, "rowwise")
    parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    wanted = {TEXT_LAYER.format(number, part) for number in (0, 1) for part in parts}
    assert set(report.converted) == wanted
    converted = {name: module for name, module in network.named_modules() if isinstance(module, Fp8Linear)}
    assert converted.keys() == wanted and all(linear.config.emulate for linear in converted.values())
    assert [choice.name for choice in report.choices] == [
        name for name, module in network.named_modules() if isinstance(module, nn.Linear)
    ]
    # Of 32 x 32 (q, o), 16 x 32 (k, v) and 64 x 32 (MLP): two whole layers, and k and v of the last.
    share = 2 * (2 * 1024 + 3 * 2048) / (2 * (2 * 1024 + 2 * 512 + 3 * 2048) + 2 * 512)
    assert report.flops_share == pytest.approx(share)
    lines = report.lines(compiled=False)
    assert lines[0] == (
        "FP8: rowwise, emulated (no FP8 hardware: its rounding without its speed), 10 of 40 linear layers, "
        f"{share:.1%} of the FLOPs of the language model's"
    )
    assert [line.partition(":")[2].partition(":")[0] for line in lines[1:]] == [
        " not in 17", " not in 4", " not in 7", " not in 2",
    ]  # fmt: skip
    assert "vision tower" in lines[1] and "model.fuse_projections" in lines[2]
    assert "last decoder layer" in lines[3] and "reward head" in lines[4]


def test_an_lm_head_is_not_said_to_compute_in_float32():
    report = convert_to_fp8(make_model("qwen2_5_vl", paradigm="critic"), "rowwise", emulate=True)
    reasons = {choice.name.partition(".")[0]: choice.reason for choice in report.choices}
    assert "LM head: its products stay in bf16" in reasons["lm_head"] and "float32" in reasons["score"]


def test_fused_projections_bring_k_and_v_into_fp8(network):
    network.fuse_projections()
    report = convert_to_fp8(network, "rowwise_gw_hp")
    parts = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert set(report.converted) == {TEXT_LAYER.format(number, part) for number in (0, 1) for part in parts}
    assert report.flops_share == pytest.approx(2 / 3 * (2 * 9216) / (2 * 9216 + 2 * 512))
    assert isinstance(network.get_submodule(TEXT_LAYER.format(0, "self_attn.qkv_proj")), Fp8FusedLinear)
    assert torch.isfinite(rewards_of(network, pairs_pack(network))).all()


def test_a_layer_with_an_odd_size_stays_as_it_is(network):
    mlp = network.model.language_model.layers[0].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = nn.Linear(32, 72), nn.Linear(32, 72), nn.Linear(72, 32)
    report = convert_to_fp8(network, "tensorwise")
    odd = [choice.name for choice in report.choices if choice.reason == "a size that is no multiple of 16"]
    assert odd == [TEXT_LAYER.format(0, f"mlp.{part}_proj") for part in ("gate", "up", "down")]
    assert type(mlp.gate_proj) is nn.Linear


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_text_models_are_converted_too(family):
    network = make_model(family)
    report = convert_to_fp8(network, "rowwise")
    assert len(report.converted) == 10 and report.converted[0] == "model.layers.0.self_attn.q_proj"
    pack = pack_with(network, [make_record(1)])
    assert not torch.equal(rewards_of(network, pack), rewards_of(make_model(family), pack))


def test_names_parameters_and_exports_are_those_of_the_network_before(network, tmp_path):
    network.fuse_projections()
    pack, before = pairs_pack(network), dict(network.named_parameters())
    save_model(network, tmp_path / "before")
    convert_to_fp8(network, "rowwise")
    after = dict(network.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    save_model(network, tmp_path / "after")
    assert_equal(*(load_file(tmp_path / folder / "model.safetensors") for folder in ("after", "before")))
    stock = load_model(tmp_path / "after")  # through transformers' own loading, which names missing and unknown keys
    stock.set_kernels(torch.bfloat16, attention="sdpa")
    with fp8_disabled(network), torch.no_grad():
        # In float32, without autocast: one product for q, k, v and three of them differ by its rounding alone.
        assert torch.allclose(stock(pack), network(pack), rtol=0, atol=1e-5)
    state = {name: tensor + 1 for name, tensor in network.state_dict().items()}
    network.load_state_dict(state)
    assert_equal(network.state_dict(), state)


def test_fp8_disabled_is_the_network_before(network):
    pack = pairs_pack(network)
    before = rewards_of(network, pack), gradients_of(network, pack)
    convert_to_fp8(network, "rowwise")
    fp8 = rewards_of(network, pack)
    with pytest.raises(KeyError), fp8_disabled(network):
        assert torch.equal(rewards_of(network, pack), before[0])
        assert_equal(gradients_of(network, pack), before[1])
        raise KeyError
    assert torch.equal(rewards_of(network, pack), fp8) and not torch.equal(fp8, before[0])


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_of_a_whole_network_are_close_to_bf16(recipe, network):
    pack = pairs_pack(network, seeds=(1, 2, 3))
    exact = gradients_of(network, pack)
    convert_to_fp8(network, recipe)
    found = gradients_of(network, pack)
    assert found.keys() == exact.keys()
    error = (flat(found) - flat(exact)).norm() / flat(exact).norm()
    assert 0.001 < error < LARGEST_ERROR[recipe]


@pytest.mark.parametrize(("recipe", "isolated"), [("tensorwise", False), ("rowwise", True), ("rowwise_gw_hp", True)])
def test_a_response_changes_no_other_reward_under_row_scales(recipe, isolated, network):
    convert_to_fp8(network, recipe)
    spike = network.model.language_model.embed_tokens.weight.data[7]
    pack = pairs_pack(network)
    changed = dataclasses.replace(pack, input_ids=pack.input_ids.clone())
    last = pack.anchor_rows[-1]
    changed.input_ids[last - 1] = 7
    spike[:], spike[0] = 0, 1000  # larger after the norm than any other token: it sets the scale of the whole pack
    one, other = rewards_of(network, pack), rewards_of(network, changed)
    assert one[-1] != other[-1]
    assert torch.equal(one[:-1], other[:-1]) == isolated


def test_padding_changes_no_reward_under_row_scales(network):
    convert_to_fp8(network, "rowwise")
    short, long = (pack_with(network, image_records(), multiple) for multiple in (16, 512))
    assert long.num_padding_tokens > short.num_padding_tokens + 100
    assert torch.equal(rewards_of(network, long), rewards_of(network, short))


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_activation_checkpointing_changes_no_gradient(mode, recipe, network):
    convert_to_fp8(network, recipe)
    pack = pairs_pack(network)
    kept = gradients_of(network, pack)
    network.use_activation_checkpointing(mode)
    assert_equal(gradients_of(network, pack), kept)


def test_a_frozen_language_model_passes_gradients_on(network):
    network.freeze(["language"])
    report = convert_to_fp8(network, "rowwise")
    assert len(report.converted) == 10
    found = gradients_of(network, pairs_pack(network))
    assert found and not any(".language_model." in name for name in found)
    assert any(".visual." in name and gradient.any() for name, gradient in found.items())


def test_compiled_layers_compute_the_same_in_one_graph():
    network = make_model("qwen2")
    network.fuse_projections()
    convert_to_fp8(network, "rowwise")
    packs = [pack_with(network, [make_record(seed) for seed in seeds]) for seeds in ((1, 2), (3,), (4, 5, 6))]
    eager = [(rewards_of(network, pack), flat(gradients_of(network, pack))) for pack in packs]
    graphs = network.compile_layers("aot_eager")
    network.set_kernels(torch.bfloat16, attention="sdpa")
    for pack, (rewards, gradients) in zip(packs, eager, strict=True):
        assert torch.equal(rewards_of(network, pack), rewards)
        # Sums of gradients in bfloat16 have another order.
        assert (flat(gradients_of(network, pack)) - gradients).norm() < 0.02 * gradients.norm()
    assert graphs.count == 1
    with fp8_disabled(network):
        assert not torch.equal(rewards_of(network, packs[0]), eager[0][0])
    assert graphs.count == 2


def test_a_pack_that_is_no_multiple_of_16_is_refused(network):
    convert_to_fp8(network, "rowwise")
    pack = pack_with(network, image_records((1,)), multiple=1)
    assert pack.num_tokens % 16
    with pytest.raises(ValueError, match=rf"a pack of {pack.num_tokens} tokens.*multiple of 16.*multiple=16"):
        network(pack)


def test_token_multiple_follows_the_setting():
    assert [token_multiple(recipe) for recipe in ("off", "tensorwise", "rowwise", "rowwise_gw_hp")] == [1, 16, 16, 16]


def test_devices_without_fp8_are_refused(network, monkeypatch):
    with pytest.raises(ConfigError, match=r"precision\.fp8: needs a CUDA device, this is cpu; emulate it"):
        convert_to_fp8(network, "rowwise", emulate=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(ConfigError, match=r"NVIDIA A100 has compute capability 8\.0, FP8 needs 8\.9"):
        _check_device(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    _check_device(torch.device("cuda"))


def test_missing_torchao_is_named_with_the_command(network, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'rowwise needs torchao.*pip install "fastrm\[torchao\]"'):
        convert_to_fp8(network, "rowwise")


def test_a_network_without_a_fitting_layer_is_refused(network):
    del network.model.language_model.layers[:-1]
    with pytest.raises(ConfigError, match=r"no linear layer can be converted .*last decoder layer.*set it to off"):
        convert_to_fp8(network, "rowwise")


def test_fp8_needs_bf16_products():
    model = {"path": "x"}
    with pytest.raises(ValueError, match=r"precision\.fp8 rowwise with precision\.dtype fp32"):
        Config.model_validate({"model": model, "precision": {"fp8": "rowwise", "dtype": "fp32"}})
    assert Config.model_validate({"model": model, "precision": {"fp8": "rowwise"}}).precision.dtype == "bf16"


def test_flip_rate_counts_changed_verdicts():
    preferences = torch.tensor([[0, 1], [1, 2], [0, 2], [2, 3]])
    first, second = torch.tensor([3.0, 2.0, 1.0, 1.0]), torch.tensor([1.0, 2.0, 1.5, 0.0])
    # right, right, right, equal is wrong -> wrong, right, wrong, right
    cases = ((second, preferences, 0.75), (first, preferences, 0.0), (second, preferences[:0], 0.0))
    for rewards, judged, rate in cases:
        flips = Flips()
        flips.add(first, rewards, judged)
        assert flips.rate == rate
    flips = Flips()
    flips.add(first, second, preferences[:2])
    flips.add(first, second, preferences[2:])
    assert (flips.num_preferences, flips.lost, flips.gained) == (4, 1, 2) and flips.accuracies == (0.75, 0.5)
