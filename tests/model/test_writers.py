"""Critics and judges: rewards, losses and gradients of packed trees equal naive ones on stock transformers."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastrm.data.template import TurnLoss
from fastrm.model.head import total_weight
from fastrm.model.network import RewardNetwork
from fastrm.model.turn_loss import turn_losses
from tests.helpers.support import FAMILIES, make_model, needs_interpreter, pack_of
from tests.helpers.writers import LOSSES, naive, writer_network, writer_records


def _gradients(network: RewardNetwork) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("paradigm", ["critic", "judge"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_naive_in_stock_transformers(family, paradigm):
    network, records = writer_network(family, paradigm), writer_records(family, paradigm)
    wanted, wanted_rewards = naive(network, records)
    wanted.backward()
    expected = _gradients(network)
    pack = pack_of(network, records)
    parts, rewards = network(pack, LOSSES[paradigm])
    total = parts.sum()
    total.backward()
    got = _gradients(network)
    assert (rewards - wanted_rewards).abs().max() <= 1e-5
    assert (network(pack) - wanted_rewards).abs().max() <= 1e-5
    assert abs(total - wanted) <= 1e-6 * abs(wanted)
    assert got.keys() == expected.keys() == dict(network.named_parameters()).keys()
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, f"{name}: the oracle's gradient is zero"
        assert (got[name] - gradient).abs().max() <= 1e-6 * scale, name
    assert pack.num_tokens < 0.8 * pack_of(network, records, share=False).num_tokens
    count = sum(len(part) for part in (pack.turn_rows, pack.turn_targets, pack.turn_owners, pack.turn_weights)) / 4
    weight = sum(edge.weight for record in records for edge in record.preferences)
    assert total_weight(pack, LOSSES[paradigm]) == pytest.approx(weight if paradigm == "critic" else _tokens(pack))
    assert count == len(pack.turn_rows) > 0


def _tokens(pack) -> float:
    """The tokens of all turns, each as often as its text weighs."""
    return float(pack.turn_weights.double().sum())


def _error(gradients, truth) -> torch.Tensor:
    return torch.stack([(gradients[name] - truth[name]).double().square().sum() for name in truth]).sum().sqrt()


@pytest.mark.parametrize("paradigm", ["critic", "judge"])
def test_bf16_gradient_is_at_most_twice_as_far_off_as_stock_autocast(paradigm):
    network, records = writer_network("qwen2", paradigm), writer_records("qwen2", paradigm)
    naive(network, records)[0].backward()
    truth = _gradients(network)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = naive(network, records)
    total.backward()
    stock_error = _error(_gradients(network), truth)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts, _ = network(pack_of(network, records), LOSSES[paradigm])
    parts.sum().backward()
    assert 0 < _error(_gradients(network), truth) <= 2 * stock_error


def _turn_loss(network, pack, impl):
    states = network._runner.all_states(pack).detach().requires_grad_()
    total, means = turn_losses(states, network.language.norm, network.lm_weight, pack, impl)
    total.backward()
    return total.detach(), means.detach(), states.grad, _gradients(network)


def _assert_same(found, wanted) -> None:
    """Equal but for a few roundings of sums, relative to the largest element."""
    assert found[3].keys() == wanted[3].keys()
    for one, other in [*zip(found[:3], wanted[:3], strict=True), *((found[3][k], wanted[3][k]) for k in wanted[3])]:
        assert (one - other).abs().max() <= 3e-6 * other.abs().max()


@pytest.mark.parametrize("rows", [1, 7, 10**6])
def test_the_loss_does_not_depend_on_the_chunks(rows, monkeypatch):
    network = writer_network("llama", "critic")
    pack = pack_of(network, writer_records("llama", "critic"))
    whole = _turn_loss(network, pack, "eager")
    monkeypatch.setattr("fastrm.model.turn_loss.CHUNK_LOGITS", rows * network.lm_weight.shape[0])
    found = _turn_loss(network, pack, "eager")
    _assert_same(found, whole)


@needs_interpreter
def test_ligers_kernel_gives_the_same_losses_and_gradients():
    pytest.importorskip("liger_kernel")
    network = writer_network("llama", "critic")
    pack = pack_of(network, writer_records("llama", "critic"))
    wanted, found = _turn_loss(network, pack, "eager"), _turn_loss(network, pack, "triton")
    _assert_same(found, wanted)


@pytest.mark.gpu
def test_ligers_kernel_on_a_gpu_gives_the_same_losses_and_gradients():
    pytest.importorskip("liger_kernel")
    network = writer_network("llama", "critic")
    pack = pack_of(network, writer_records("llama", "critic")).to("cuda")
    network.to("cuda")
    _assert_same(_turn_loss(network, pack, "triton"), _turn_loss(network, pack, "eager"))


def test_a_pack_without_anything_to_write_reaches_the_lm_head():
    """Several ranks wait for one another's gradients of every weight."""
    network = writer_network("llama", "critic")
    pack = pack_of(network, writer_records("llama", "critic"))
    none = torch.zeros(0, dtype=torch.int64)
    pack.turn_rows = pack.turn_targets = pack.turn_owners = none
    pack.turn_weights = torch.zeros(0)
    for impl in ("eager", "triton"):
        network.lm_kernels = impl
        network(pack, LOSSES["critic"])[0].sum().backward()
        assert _gradients(network)["lm_head.weight"].abs().max() == 0


def test_the_lm_heads_gradient_is_the_memory_that_chunks_are_summed_in():
    """It is in float32 as large as the embeddings of a whole model."""
    network = writer_network("llama", "critic")
    pack = pack_of(network, writer_records("llama", "critic"))
    made = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            output = function(*arguments, **(options or {}))
            if function is torch.ops.aten.zeros_like.default and output.shape == network.lm_weight.shape:
                made.append(output.data_ptr())
            return output

    with Made():
        total = network(pack, LOSSES["critic"])[0].sum()
    total.backward(retain_graph=True)
    assert made == [network.lm_weight.grad.data_ptr()]
    with pytest.raises(RuntimeError, match="a second backward pass"):
        total.backward()


def test_no_logits_are_computed_of_critiques_that_do_not_count():
    network = writer_network("llama", "critic")
    first, second, _ = writer_records("llama", "critic")
    weightless = replace(first, preferences=tuple(replace(one, weight=0.0) for one in first.preferences))
    pack, alone = (pack_of(network, records) for records in ([weightless, second], [second]))
    assert 0 < len(pack.turn_rows) == len(alone.turn_rows)
    assert pack.turn_owners.min() == len(first.responses)
    network.encoder.turns = TurnLoss(per_token=False, factor=0.0)
    pack = pack_of(network, [first, second])
    assert not len(pack.turn_rows)
    sums = network(pack, LOSSES["critic"])[0]
    sums.sum().backward()
    assert sums[1] == 0 < sums[0] and not network.lm_weight.grad.any()


def test_a_judge_has_no_head_and_a_reward_model_no_lm_head():
    kinds = ("reward", "critic", "judge")
    names = {kind: dict(make_model("llama", paradigm=kind).named_parameters()) for kind in kinds}
    has = {kind: ("score.0.weight" in own, "lm_head.weight" in own) for kind, own in names.items()}
    assert has == {"reward": (True, False), "critic": (True, True), "judge": (False, True)}


def test_an_evaluation_computes_no_gradient():
    network = writer_network("llama", "judge")
    pack = pack_of(network, writer_records("llama", "judge"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(pack)
    ours = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network._runner.all_states(pack)
    layers = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert ours - layers == 2 * len(pack.turn_rows) * network.lm_weight.numel()
