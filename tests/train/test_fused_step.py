"""The training step computes head and loss in one operation, and what it computes is what the two gave apart."""

from dataclasses import replace

import pytest
import torch

from fastrm.config import Config, HeadConfig
from fastrm.model.kernel_choice import pick_head_kernels
from fastrm.train.engine import LocalEngine
from fastrm_kernels import preference_loss
from fastrm_kernels.dispatch import Choice
from fastrm_kernels.launch import record_launches
from fastrm_kernels.preference_head import autograd, reference
from tests.helpers.support import make_image, make_model, make_record, needs_interpreter, pack_of

# What may be set of the loss, the head, its input and the precision: each must reach the operation.
SETTINGS = {
    "plain": {},
    "center": {"loss": {"center": 0.1}},
    "smoothing": {"loss": {"label_smoothing": 0.2}},
    "length normalization": {"loss": {"length_normalization": True}},
    "margins": {"margins": True},
    "ties": {"ties": True},
    "everything": {
        "loss": {"center": 0.1, "label_smoothing": 0.2, "length_normalization": True}, "margins": True, "ties": True,
    },
    "means": {"pooling": "mean"},
    "one layer": {"head": {"layers": 1, "activation": "none"}},
    "four layers": {"head": {"layers": 4, "bias": False}},
    "bf16": {"dtype": "bf16"},
    "internvl": {"family": "internvl"},
    "qwen2": {"family": "qwen2"},
    "no preference": {"edges": 0},
}  # fmt: skip


def make_case(margins=False, ties=False, edges=None, family="qwen2_5_vl", pooling="anchor", head=None, **settings):
    """(engine, pack) of two groups, the first with an image where the family sees one."""
    network = make_model(family, head=HeadConfig(**head or {}), pooling=pooling)
    image = [make_image(80, 60, 1)] if network.is_vision else []
    records = [make_record(1, num_responses=4, images=image), make_record(2)]
    pack = pack_of(network, records)
    generator = torch.Generator().manual_seed(0)
    if margins:
        pack.margin = torch.rand(pack.margin.shape, generator=generator)
    if ties:  # each edge and its opposite, of half the weight
        both = torch.cat([pack.edges, pack.edges.flip(1)])
        pack = replace(pack, edges=both, margin=pack.margin.repeat(2), weight=pack.weight.repeat(2) / 2)
    if edges is not None:
        pack = replace(pack, edges=pack.edges[:edges], margin=pack.margin[:edges], weight=pack.weight[:edges])
    config = {
        "model": {"init": {"model_type": family}, "tokenizer": "unused"},
        "loss": settings.get("loss", {}),
        "precision": {"dtype": settings.get("dtype", "fp32")},
    }
    return LocalEngine(network, Config.model_validate(config)), pack


def use_triton(engine):
    """Triton for head and loss alone: the attention of tiny models has heads that it does not run."""
    layers = engine.network.head_settings.layers
    engine.network.head_kernels = pick_head_kernels("triton", torch.device("cpu"), layers)


def two_calls(engine, pack):
    """(loss sum, rewards, gradients) by two operations: the mean over the preferences, times their weights."""
    settings = engine.config.loss
    rewards, weight = engine.rewards(pack), float(pack.weight.double().sum())
    loss = weight * preference_loss(
        rewards, pack.edges, margin=pack.margin, weight=pack.weight, label_smoothing=settings.label_smoothing,
        center=settings.center, lengths=pack.response_lengths if settings.length_normalization else None,
        impl=engine.network.head_kernels.name,
    )  # fmt: skip
    loss.backward()
    return float(loss.detach()), rewards.detach(), take_gradients(engine)


def one_call(engine, pack):
    rewards = engine.accumulate(pack)
    return float(engine._loss_sum), rewards, take_gradients(engine)


def take_gradients(engine):
    found = {name: p.grad for name, p in engine.network.named_parameters() if p.grad is not None}
    engine.network.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_eager_gradients_are_those_of_two_calls_to_the_bit(settings):
    engine, pack = make_case(**settings)
    (wanted, old_rewards, old), (loss, rewards, new) = two_calls(engine, pack), one_call(engine, pack)
    assert torch.equal(rewards, old_rewards)
    assert old.keys() == new.keys() and any(name.startswith("score.") for name in old)
    assert [name for name in old if not torch.equal(old[name], new[name])] == []
    assert settings.get("edges") == 0 or all(tensor.any() for name, tensor in new.items() if name.endswith("0.weight"))
    # The mean was rounded twice, when it was divided by the weights and when it was multiplied by them.
    assert abs(loss - wanted) <= 2 * torch.finfo(torch.float32).eps * abs(wanted)


@needs_interpreter
@pytest.mark.parametrize("name", sorted(SETTINGS.keys() - {"bf16", "internvl", "qwen2"}))
def test_triton_gradients_are_those_of_two_eager_calls(name):
    engine, pack = make_case(**SETTINGS[name])
    wanted, old_rewards, old = two_calls(engine, pack)
    use_triton(engine)
    loss, rewards, new = one_call(engine, pack)
    assert not torch.equal(rewards, old_rewards) or engine.network.head_settings.layers == 1  # the kernels did run
    assert (rewards - old_rewards).abs().max() <= 1e-5 and abs(loss - wanted) <= 1e-5
    assert old.keys() == new.keys()
    largest = max(float(tensor.abs().max()) for tensor in old.values())
    for parameter, gradient in old.items():
        assert (new[parameter] - gradient).abs().max() <= 1e-5 * max(largest, 1.0), parameter


def step_launches(engine, pack):
    with record_launches() as launches:
        engine.accumulate(pack)
    engine.discard()
    return [launch.kernel.__name__ for launch in launches]


@needs_interpreter
def test_a_step_launches_two_kernels_forward_and_one_backward_for_head_and_loss(monkeypatch):
    engine, pack = make_case(loss={"center": 0.1, "length_normalization": True})
    use_triton(engine)

    def forbidden(*arguments, **options):
        raise AssertionError("eager code ran")

    for name in ("reward_head", "preference_loss"):
        monkeypatch.setattr(reference, name, forbidden)
    for module in (reference, autograd):
        monkeypatch.setattr(module, "rms_norm", forbidden)
        monkeypatch.setattr(module, "mlp", forbidden)
    assert step_launches(engine, pack) == ["head_fwd_kernel", "head_finish_kernel", "head_bwd_kernel"]


@needs_interpreter
def test_what_is_not_fused_has_launches_of_its_own_and_the_line_says_so(monkeypatch):
    engine, pack = make_case(head={"layers": 1, "activation": "none"})
    use_triton(engine)
    assert step_launches(engine, pack) == [
        "linear_head_fwd_kernel", "preference_loss_kernel", "linear_head_bwd_kernel", "linear_head_sum_kernel",
    ]  # fmt: skip
    said = "set by kernels in the configuration; "
    alone = "not fused: a head of one layer leaves the loss to a launch of its own"
    assert engine.network.head_kernels == ("triton", said + alone)
    engine, pack = make_case()
    use_triton(engine)
    limits = "fused in packs of up to 128 responses and 1,024 preferences"
    assert engine.network.head_kernels == ("triton", f"{said}head and loss {limits}")
    monkeypatch.setattr(autograd, "FUSED_EDGES", len(pack.edges) - 1)
    assert "preference_loss_kernel" in step_launches(engine, pack)
    assert pick_head_kernels("triton", torch.device("cpu"), 3).why == f"{said}last two of 3 layers and loss {limits}"


def test_the_loss_of_an_evaluation_is_that_of_rewards_on_the_cpu_whatever_runs_the_step(monkeypatch):
    engine, pack = make_case(loss={"center": 0.1})
    wanted, rewards, _ = two_calls(engine, pack)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # as beside a GPU: no kernel runs on CPU tensors
    engine.network.head_kernels = Choice("triton", "")
    assert float(engine.loss(rewards, pack)) == pytest.approx(wanted, rel=1e-6)
