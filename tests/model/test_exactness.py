"""Invariants 1 to 3: packed = alone, isolation, and a gradient that does not depend on the packing."""

import pytest
import torch

from fastrm.config import Config, HeadConfig
from fastrm.data.batching import PackPlan
from fastrm.data.loader import PackBuilder
from fastrm.data.record import Message, Preference, Record, Response
from fastrm.train.engine import LocalEngine
from fastrm_kernels import preference_loss
from tests.helpers import stock
from tests.helpers.support import FAMILIES, MROPE, make_image, make_model, make_record, needs_interpreter, pack_of

VISION = [name for name in FAMILIES if "vl" in name]


def _images():
    # Square, wide, tall, tiny: several windows, ragged windows, one window, one merged patch.
    return [make_image(112, 112, 1), make_image(190, 40, 2), make_image(30, 150, 3), make_image(28, 28, 4)]


def _nested(image=None):
    """One prompt; responses that begin alike for 40 words, one of them the beginning of another."""
    base = " ".join(f"word {n}" for n in range(40))
    texts = [base, base + " and more", base + " and more still", "something else", base]
    question = Message("user", ((image, "Why?") if image else ("Why?",)))
    responses = tuple(Response((question, Message("assistant", (text,)))) for text in texts)
    return Record("nested", responses, (Preference(0, 3), Preference(2, 1)), "test", "test:nested")


def _differing_prompts(images):
    """Two responses under different prompts with different images: a tree with little sharing."""
    responses = tuple(
        Response((Message("user", (image, f"Question {n}")), Message("assistant", (f"answer {n}",))))
        for n, image in enumerate(images)
    )
    return Record("differ", responses, (Preference(1, 0),), "test", "test:differ")


def _cases(family):
    if family not in VISION:
        return [make_record(1, num_responses=16), make_record(2), _nested(), make_record(3, num_responses=3)]
    a, b, c, d = _images()
    return [
        make_record(1, num_responses=16, images=[a], response_words=(1, 12)),
        make_record(2),  # text only, between image groups
        make_record(3, num_responses=2, images=[b, c]),
        make_record(4, num_responses=3, images=[a], prompt_words=6),  # another question about the first image
        _nested(d),
        make_record(5, num_responses=2, images=[c, c]),  # the same image twice in one prompt
        _differing_prompts([b, d]),
    ]


def _gradients(network):
    found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [True, False], ids=["tree", "rows"])
def test_packed_equals_alone_in_stock_transformers(family, share):
    network = make_model(family)
    records = _cases(family)
    loss, rewards = stock.stock_loss(network, records)
    loss.backward()
    expected = _gradients(network)

    pack = pack_of(network, records, share)
    packed = network(pack)
    ours = preference_loss(packed, pack.edges, center=stock.CENTER)
    ours.backward()
    got = _gradients(network)

    assert (packed - rewards).abs().max() <= 1e-5
    assert abs(ours - loss) <= 1e-5
    assert got.keys() == expected.keys() == dict(network.named_parameters()).keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, f"{name}: the oracle's gradient is zero"
        assert (got[name] - gradient).abs().max() <= 1e-5, name
    if share:
        assert pack.num_tokens < 0.6 * pack_of(network, records, share=False).num_tokens


@needs_interpreter
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl", "qwen2"])
def test_triton_kernels_equal_stock_transformers(family, monkeypatch):
    # Two heads of 16: the kernels have no head dimension of 8.
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    options = dict(FAMILIES[family])
    if family in VISION:
        options["text_config"] = {
            **options["text_config"],
            **heads,
            "rope_parameters": {**MROPE, "mrope_section": [4, 2, 2]},
        }
    monkeypatch.setitem(FAMILIES, family, options if family in VISION else options | heads)
    network = make_model(family)
    network.set_kernels(torch.float32, kernels="triton")
    assert network.attention.name == network.head_kernels.name == "triton"
    a, _, _, d = _images()
    records = [make_record(1, num_responses=4), make_record(2, images=[a, d] if family in VISION else ())]
    loss, rewards = stock.stock_loss(network, records)
    loss.backward()
    expected = _gradients(network)

    pack = pack_of(network, records)
    packed = network(pack)
    ours = preference_loss(packed, pack.edges, center=stock.CENTER, impl="triton")
    ours.backward()
    got = _gradients(network)
    assert (packed - rewards).abs().max() <= 1e-5
    assert got.keys() == expected.keys() == dict(network.named_parameters()).keys()
    for name, gradient in expected.items():
        assert (got[name] - gradient).abs().max() <= 1e-5, name


@pytest.mark.parametrize("layers, activation", [(1, "none"), (2, "tanh"), (3, "relu"), (5, "silu")])
def test_every_head_equals_stock(layers, activation):
    network = make_model("qwen2", head=HeadConfig(layers=layers, activation=activation))
    records = [make_record(1, num_responses=3), make_record(2)]
    assert (network(pack_of(network, records)) - stock.stock_rewards(network, records)).abs().max() <= 1e-5


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl", "qwen2"])
def test_bf16_error_is_at_most_twice_that_of_stock_bf16(family):
    records = [make_record(seed, num_responses=6, response_words=(5, 60)) for seed in range(8)]
    if family in VISION:
        records += [make_record(20 + n, num_responses=4, images=[image]) for n, image in enumerate(_images())]
    truth = stock.stock_rewards(make_model(family), records)
    half = make_model(family, dtype=torch.bfloat16)
    stock_error = (stock.stock_rewards(half, records).float() - truth).square().mean().sqrt()
    our_error = (half(pack_of(half, records)) - truth).square().mean().sqrt()
    assert 0 < our_error <= 2 * stock_error


def _error(gradients, truth):
    return torch.stack([(gradients[name] - truth[name]).double().square().sum() for name in truth]).sum().sqrt()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl", "qwen2"])
def test_bf16_training_gradient_is_at_most_twice_as_far_off_as_stock_autocast(family):
    network = make_model(family)
    records = _cases(family)
    loss, _ = stock.stock_loss(network, records)
    loss.backward()
    truth = _gradients(network)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = stock.stock_loss(network, records)
    loss.backward()
    stock_error = _error(_gradients(network), truth)
    config = Config.model_validate({"model": {"path": "unused"}, "loss": {"center": stock.CENTER}})
    assert config.precision.dtype == "bf16"
    ours = _step_gradient(network, config, records, [list(range(len(records)))])
    assert 0 < _error(ours, truth) <= 2 * stock_error


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl", "internvl", "qwen2"])
def test_changing_one_response_changes_no_other_bitwise(family):
    network = make_model(family)
    records = _cases(family)
    pack = pack_of(network, records)
    before = network(pack)
    starts = torch.tensor([0, *pack.lengths]).cumsum(0)
    parents = set(pack.parents)
    for segment in [s for s in range(len(pack.lengths)) if s not in parents and pack.lengths[s] > 3]:
        changed = pack_of(network, records)
        span = slice(int(starts[segment]), int(starts[segment + 1]))
        if pack.media_rows is not None and ((pack.media_rows >= span.start) & (pack.media_rows < span.stop)).any():
            continue
        changed.input_ids[span] = (pack.input_ids[span] + 11) % 250
        after = network(changed)
        inside = (pack.anchors >= span.start) & (pack.anchors < span.stop)
        assert torch.equal(after[~inside], before[~inside])
        assert (after[inside] != before[inside]).all()


def _step_gradient(network, config, records, plans):
    engine = LocalEngine(network, config)
    builder = PackBuilder(records, network.encoder, share=True)
    weight = 0.0
    for plan in plans:
        pack = builder[PackPlan(tuple(plan), 0, False)].pack
        engine.accumulate(pack)
        weight += float(pack.weight.sum())
    return {name: gradient / weight for name, gradient in _gradients(network).items()}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl", "internvl", "llama"])
def test_gradient_of_a_step_does_not_depend_on_the_packs(family):
    network = make_model(family)
    config = Config.model_validate(
        {"model": {"path": "unused"}, "precision": {"dtype": "fp32"}, "loss": {"center": 0.01}}
    )
    records = _cases(family)
    numbers = list(range(len(records)))
    cuts = [[numbers], [[n] for n in numbers], [numbers[::2][::-1], numbers[1::2]]]
    first, *others = [_step_gradient(network, config, records, cut) for cut in cuts]
    for other in others:
        for name, gradient in first.items():
            assert (other[name] - gradient).abs().max() <= 1e-6 + 1e-5 * gradient.abs().max(), name


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_changes_no_bit(mode):
    results = []
    for chosen in ("none", mode):
        network = make_model("qwen2_5_vl").train()
        network.use_activation_checkpointing(chosen)
        pack = pack_of(network, _cases("qwen2_5_vl"))
        preference_loss(network(pack), pack.edges).backward()
        results.append(_gradients(network))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_freezing_leaves_exactly_the_frozen_parts_without_gradient():
    network = make_model("qwen2_5_vl")
    network.freeze(["vision"])
    pack = pack_of(network, _cases("qwen2_5_vl"))
    preference_loss(network(pack), pack.edges).backward()
    without = {name for name, p in network.named_parameters() if p.grad is None}
    assert without == {
        name for name, _ in network.named_parameters() if "visual." in name and "visual.merger." not in name
    }


def test_an_image_is_encoded_once_per_pack():
    network = make_model("qwen2_5_vl")
    image = make_image(112, 112, 1)
    records = [make_record(n, num_responses=4, images=[image]) for n in range(3)]
    assert pack_of(network, records).media_grids == [(1, 8, 8)]
