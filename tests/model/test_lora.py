"""Adapters: rewards and gradients are those of PEFT on the stock class; what they hold; what is refused."""

import copy
import sys

import pytest
import torch

from fastrm.data.group import GroupSize, encode_group
from fastrm.errors import ConfigError, ExactnessError
from fastrm.lora_config import LoraConfig
from fastrm.model import layers
from fastrm.model.exactness import check_network
from fastrm.model.lora import add_lora
from fastrm.model.samples import pick_samples
from tests.helpers.stock import CENTER, stock_loss
from tests.helpers.support import make_image, make_model, make_record, pack_of

peft = pytest.importorskip("peft")
IMAGE = make_image(80, 60, 1)
RECORDS = {
    "qwen2_5_vl": [make_record(n, num_responses=2 + n % 2, images=[IMAGE] if n != 1 else ()) for n in range(3)],
    "llama": [make_record(n, num_responses=2 + n % 2) for n in range(3)],
}


def with_adapters(family, settings, seed=3):
    """A network with adapters whose B, 0 at the start, is random."""
    network = make_model(family)
    add_lora(network, LoraConfig.model_validate(settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return network


def stock_twin(network):
    """The network's stock model with adapters that peft puts there by the configuration in the adapter's files."""
    twin = copy.copy(network)
    twin._modules = dict(network._modules)
    full = type(network.model)(network.model.config).to(torch.float32)
    config = network.peft_config["default"]
    config = peft.LoraConfig(**{
        name: value for name, value in config.to_dict().items() if name not in ("runtime_config", "auto_mapping")
    })
    holder = torch.nn.Module()
    holder.model = full
    peft.inject_adapter_in_model(config, holder)
    full.load_state_dict(network.model.state_dict())
    twin._modules["model"] = full.train(network.training)
    twin._modules["score"] = copy.deepcopy(network.score)
    return twin


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"rank": 4}),
        ("llama", {"rank": 4, "rslora": True, "alpha": 3.0, "targets": ["q_proj", "1.mlp.down_proj", "2.mlp.up_proj"]}),
        ("llama", {"rank": 4, "dora": True}),
        ("qwen2_5_vl", {"rank": 4}),
        ("qwen2_5_vl", {"rank": 4, "vision": True, "dora": True}),
    ],
    ids=["all", "some, rslora", "dora", "images", "vision, dora"],
)
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_rewards_and_gradients_are_those_of_peft_on_the_stock_class(family, settings, checkpointing):
    network, records = with_adapters(family, settings), RECORDS[family]
    network.use_activation_checkpointing(checkpointing)
    twin = stock_twin(network)
    wanted_loss, wanted = stock_loss(twin, records)
    wanted_loss.backward()
    pack = pack_of(network, records)
    rewards = network(pack)
    winner, loser = (rewards[pack.edges[:, side]] for side in (0, 1))
    loss = (-torch.nn.functional.logsigmoid(winner - loser) + CENTER * (winner + loser) ** 2).mean()
    loss.backward()
    torch.testing.assert_close(rewards, wanted, rtol=1e-5, atol=1e-6)
    stock = {name: parameter.grad for name, parameter in twin.named_parameters() if parameter.requires_grad}
    own = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert own.keys() == stock.keys()
    assert all(name.startswith("score.") or ".lora_" in name for name in own)
    assert any(".visual." in name for name in own) == bool(settings.get("vision"))
    for name, gradient in own.items():
        assert gradient is not None and gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, stock[name], rtol=1e-4, atol=1e-6, msg=f"{name}: {gradient - stock[name]}")


def gradients_of(network, records):
    network.zero_grad()
    torch.manual_seed(0)
    network(pack_of(network, records)).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters() if parameter.requires_grad}


def test_compiled_layers_with_adapters_are_one_graph_more_than_without_and_compute_the_same():
    torch._dynamo.reset()
    records = RECORDS["qwen2_5_vl"]
    network = with_adapters("qwen2_5_vl", {"rank": 4, "vision": True})
    wanted, plain = gradients_of(network, records), make_model("qwen2_5_vl")
    counts = []
    for compiled in (plain, network):
        graphs = compiled.compile_layers("aot_eager")
        compiled.set_kernels(torch.float32, attention="sdpa")
        found = gradients_of(compiled, records)
        counts.append(graphs.count)
    # The first block is apart: no gradient goes through it to the frozen patch embedding.
    assert counts[1] == counts[0] + 1
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5, msg=f"{name} differs")


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_layers_draw_the_same_dropout(mode):
    network = with_adapters("llama", {"rank": 4, "dropout": 0.4}).train()
    wanted = gradients_of(network, RECORDS["llama"])
    network.use_activation_checkpointing(mode)
    found = gradients_of(network, RECORDS["llama"])
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(gradients_of(network.eval(), RECORDS["llama"])[name], wanted[name])


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (
            "llama", {"targets": ["q_proj", "wq"]},
            r"model.lora.targets: 'wq' is the end of no .* there are q_proj, k_proj, v_proj, o_proj, .*; or",
        ),
        ("qwen2_5_vl", {"targets": ["qkv"]}, r"'qkv' is the end of no linear layer's name"),
        ("llama", {"vision": True}, "model.lora.vision: llama has no vision tower; remove the key"),
    ],
    ids=["unknown", "of the tower", "no tower"],
)  # fmt: skip
def test_targets_that_match_nothing_are_refused_with_what_there_is(family, settings, message):
    with pytest.raises(ConfigError, match=message):
        add_lora(make_model(family), LoraConfig.model_validate(settings))


def test_a_run_without_peft_is_refused_before_anything_is_changed(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    network = make_model("llama")
    with pytest.raises(ConfigError, match=r'model.lora needs PEFT, .* pip install "fastrm\[lora\]"'):
        add_lora(network, LoraConfig())
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
def test_the_check_before_training_reads_adapters_and_finds_a_fault_beside_them(family, monkeypatch):
    """In bf16 the first two layers are compared in float32 besides, with their adapters."""
    network = with_adapters(family, {"rank": 4, "dropout": 0.5}).train()
    groups = [encode_group(record, network.encoder) for record in RECORDS[family]]
    samples = pick_samples([GroupSize.of(group) for group in groups], groups.__getitem__, network.encoder)
    assert set(samples) == ({"text", "image"} if family == "qwen2_5_vl" else {"text"})
    for sample in samples.values():
        assert [part.dtype for part in check_network(network, sample)] == ["fp32"]
        found = check_network(network, sample, autocast=torch.bfloat16)
        assert [(part.dtype, part.whole) for part in found] == [("bf16", True), ("fp32", False)]
        assert network.training
    monkeypatch.setattr(layers, "stock_gate", lambda activation, gate, up: gate * activation(up))
    network.set_kernels(torch.float32, attention="sdpa")
    for sample in samples.values():
        with pytest.raises(ExactnessError, match="not exact"):
            check_network(network, sample)
