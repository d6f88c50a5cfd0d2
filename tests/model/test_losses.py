"""The training objectives against their formulas, written plainly in float64, and what they do in a step."""

import math

import pytest
import torch

from fastrm.config import Config, LossConfig
from fastrm.data.packing import EncodedGroup
from fastrm.data.record import Preference
from fastrm.model.head import loss_sum, total_weight
from fastrm.train.engine import LocalEngine
from tests.helpers.support import make_image, make_model, make_record, pack_of

KINDS = ("bradley_terry", "hinge", "plackett_luce", "mse")


class Edges:
    """The part of a pack that a loss reads."""

    def __init__(self, num_responses, preferences):
        self.edges = torch.tensor([[p.winner, p.loser] for p in preferences], dtype=torch.int64).view(-1, 2)
        self.margin = torch.tensor([p.margin for p in preferences], dtype=torch.float32)
        self.weight = torch.tensor([p.weight for p in preferences], dtype=torch.float32)
        self.response_lengths = torch.arange(1, num_responses + 1)


def ranking(scores, weight=1.0):
    """All pairs of rated responses, without the ties."""
    places = range(len(scores))
    return [Preference(i, j, weight=weight) for i in places for j in places if scores[i] > scores[j]]


def naive(kind, rewards, preferences, center=0.0):
    """(sum of weighted terms, weight) in Python's floats, from the formula of each kind."""
    if kind == "plackett_luce":
        total = weight = 0.0
        for winner in {p.winner for p in preferences}:
            own = [p for p in preferences if p.winner == winner]
            mean = sum(p.weight for p in own) / len(own)
            others = sum(math.exp(rewards[p.loser] + p.margin) for p in own)
            total -= mean * math.log(math.exp(rewards[winner]) / (math.exp(rewards[winner]) + others))
            weight += mean
        return total, weight
    terms = {
        "bradley_terry": lambda w, x, margin: -math.log(1 / (1 + math.exp(-(w - x - margin)))),
        "hinge": lambda w, x, margin: max(0.0, 1 - (w - x - margin)) + center * (w + x) ** 2,
        "mse": lambda w, x, margin: (w - margin) ** 2,
    }
    found = [(p.weight, terms[kind](rewards[p.winner], rewards[p.loser], p.margin)) for p in preferences]
    return sum(weight * term for weight, term in found), sum(weight for weight, _ in found)


def random_case(kind, seed):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(9, generator=generator)
    numbers = torch.rand(3, 12, generator=generator)
    ends = torch.randint(0, 9, (12, 2), generator=generator).tolist()
    preferences = [
        Preference(winner, winner if kind == "mse" else loser, float(numbers[0, i]), float(numbers[1, i]))
        for i, (winner, loser) in enumerate(ends)
        if kind == "mse" or winner != loser
    ]
    return rewards, preferences


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_is_its_formula(kind, seed):
    rewards, preferences = random_case(kind, seed)
    pack, settings = Edges(9, preferences), LossConfig(kind=kind, center=0.1 if kind == "hinge" else 0.0)
    total, weight = naive(kind, rewards.double().tolist(), preferences, settings.center)
    assert float(loss_sum(rewards, pack, settings)) == pytest.approx(total, rel=2e-6)
    assert total_weight(pack, settings) == pytest.approx(weight, rel=1e-6)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_formula_in_float64(kind, seed):
    rewards, preferences = random_case(kind, seed)
    pack, settings = Edges(9, preferences), LossConfig(kind=kind)
    own = rewards.clone().requires_grad_()
    loss_sum(own, pack, settings).backward()
    for place in range(9):
        step = torch.zeros(9, dtype=torch.float64)
        step[place] = 1e-6
        above, below = (naive(kind, (rewards.double() + sign * step).tolist(), preferences)[0] for sign in (1, -1))
        assert float(own.grad[place]) == pytest.approx((above - below) / 2e-6, abs=2e-5)


def test_plackett_luce_is_the_likelihood_of_a_ranking():
    """-log prod_k exp(r_k) / sum_{j >= k} exp(r_j), the responses in the order of their ranks."""
    rewards = torch.randn(6, generator=torch.Generator().manual_seed(0))
    scores = [3.0, 1.0, 5.0, 0.5, 4.0, 2.0]
    ordered = [math.exp(float(rewards[i])) for i in sorted(range(6), key=lambda i: -scores[i])]
    wanted = -sum(math.log(ordered[k] / sum(ordered[k:])) for k in range(6))
    pack, settings = Edges(6, ranking(scores)), LossConfig(kind="plackett_luce")
    assert float(loss_sum(rewards, pack, settings)) == pytest.approx(wanted, rel=1e-6)
    assert total_weight(pack, settings) == 5.0  # the last place is no choice


def test_two_responses_are_bradley_terry_and_tied_ones_are_no_rivals():
    rewards = torch.tensor([0.3, -1.2, 0.9])
    plackett_luce, bradley_terry = LossConfig(kind="plackett_luce"), LossConfig()
    one = Edges(3, [Preference(0, 1, margin=0.5, weight=0.7)])
    assert torch.equal(loss_sum(rewards, one, plackett_luce), loss_sum(rewards, one, bradley_terry))
    tied = Edges(3, ranking([2.0, 1.0, 2.0]))  # 0 and 2 are each better than 1, and neither than the other
    assert torch.allclose(loss_sum(rewards, tied, plackett_luce), loss_sum(rewards, tied, bradley_terry))


def test_the_hinge_is_that_of_torch():
    rewards, preferences = random_case("hinge", 5)
    pack = Edges(9, [Preference(p.winner, p.loser) for p in preferences])
    chosen, rejected = rewards[pack.edges[:, 0]], rewards[pack.edges[:, 1]]
    ones = torch.ones_like(chosen)
    wanted = torch.nn.functional.margin_ranking_loss(chosen, rejected, ones, margin=1.0, reduction="sum")
    torch.testing.assert_close(loss_sum(rewards, pack, LossConfig(kind="hinge")), wanted)


@pytest.mark.parametrize("size", [1e4, 1e15])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_rewards_give_finite_losses_and_gradients(kind, size):
    rewards = torch.tensor([size, -size, 0.0, size, -size], requires_grad=True)
    pairs = [Preference(n, n, margin=2.0) for n in range(5)] if kind == "mse" else ranking([1, 2, 3, 4, 5])
    loss = loss_sum(rewards, Edges(5, pairs), LossConfig(kind=kind))
    loss.backward()
    assert loss.isfinite() and rewards.grad.isfinite().all() and rewards.grad.abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_without_preferences_has_no_loss_and_a_gradient_of_zero(kind):
    rewards = torch.ones(1, requires_grad=True)
    pack, settings = Edges(1, []), LossConfig(kind=kind)
    loss = loss_sum(rewards, pack, settings)
    loss.backward()
    assert loss.item() == 0.0 and total_weight(pack, settings) == 0.0 and rewards.grad.item() == 0.0


def engine_of(kind, dtype="fp32"):
    config = {"model": {"init": {"model_type": "qwen2_5_vl"}, "tokenizer": "unused"}, "loss": {"kind": kind}}
    return LocalEngine(make_model("qwen2_5_vl"), Config.model_validate({**config, "precision": {"dtype": dtype}}))


def records_of(kind):
    image = make_image(80, 60, 1)
    records = [make_record(n, num_responses=2 + n % 3, images=[image] if n % 2 else ()) for n in range(5)]
    if kind != "mse":
        return records
    rated = []
    for record in records:
        ratings = tuple(Preference(n, n, margin=float(n) - 1.0) for n in range(len(record.responses)))
        rated.append(type(record)(record.id, record.responses, ratings, record.source, record.origin))
    return rated


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_step_does_not_depend_on_how_it_is_packed(kind):
    records, found = records_of(kind), []
    for parts in ([records], [[record] for record in records], [records[:2], records[2:]]):
        engine = engine_of(kind)
        for part in parts:
            engine.accumulate(pack_of(engine.network, part))
        trained = engine.network.named_parameters()
        gradients = {name: p.grad / engine._weight_sum for name, p in trained if p.grad is not None}
        found.append((gradients, engine.update(1e-3, 0)))
    (first, done), *others = found
    assert done.finite and done.grad_norm > 0
    for gradients, update in others:
        assert (update.loss, update.grad_norm) == pytest.approx((done.loss, done.grad_norm), rel=1e-5)
        for name, gradient in first.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_and_the_evaluation_compute_the_same_loss(kind):
    engine = engine_of(kind, "bf16")
    pack = pack_of(engine.network, records_of(kind))
    total, rewards = engine.loss_and_rewards(pack)
    torch.testing.assert_close(total, engine.loss(rewards, pack), rtol=1e-6, atol=0)


def test_a_rating_is_one_conversation_of_a_pairwise_trainer_and_no_pair_for_accuracy():
    network = make_model("qwen2")
    (record,) = records_of("mse")[:1]
    pack = pack_of(network, [record])
    lengths = [len(network.encoder.encode(response).tokens) for response in record.responses]
    assert pack.num_unshared_tokens == sum(lengths) and pack.is_tie.all()
    assert EncodedGroup("", "", "", ()).num_unshared_tokens == 0
