"""Critics and judges: rewards, losses and gradients of packed trees equal naive ones on stock transformers."""

import pytest
import torch

from fastrm.model.head import total_weight
from fastrm.model.network import RewardNetwork
from tests.helpers.support import FAMILIES, pack_of
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
