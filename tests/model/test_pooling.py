"""Mean pooling: the mean of packed paths is that of each response alone, in values, gradients and layouts."""

import numpy as np
import pytest
import torch

from fastrm.config import HeadConfig
from fastrm.data.record import Message, Preference, Record, Response
from fastrm.errors import ConfigError
from fastrm.model.adopt import adopt
from fastrm.model.export import load_model, save_model
from fastrm.model.pooling import MeanLayout
from fastrm_kernels import TreeLayout, preference_loss
from tests.helpers import stock
from tests.helpers.support import make_image, make_model, make_record, needs_interpreter, pack_of

LINEAR = HeadConfig(layers=1, bias=False)


def _records(family):
    """A shared prompt, a response that is the beginning of another, and (where the model sees) groups of one image."""
    base = " ".join(f"word {n}" for n in range(40))
    question = Message("user", ((make_image(60, 60, 7), "Why?") if "vl" in family else ("Why?",)))
    texts = (base, base + " and more", base + " and more still", "something else, which is another thing")
    responses = [Response((question, Message("assistant", (text,)))) for text in texts]
    longer = (*responses[3].messages, Message("user", ("Go on.",)), Message("assistant", ("No.",)))
    pairs = (Preference(0, 3), Preference(2, 1), Preference(4, 0), Preference(3, 4))
    nested = Record("nested", (*responses, Response(longer)), pairs, "test", "test:nested")
    images = [make_image(84, 56, 3)] if "vl" in family else ()
    return [make_record(1, num_responses=5, images=images), nested, make_record(2), make_record(3, images=images)]


def test_records_hold_the_hard_cases():
    network = make_model("internvl", pooling="mean")
    pack = pack_of(network, _records("internvl"))
    last_rows = (np.cumsum(pack.lengths) - 1).tolist()
    parents = {last_rows[parent] for parent in pack.parents if parent >= 0}
    assert parents & set(pack.anchor_rows)  # a response goes on where another ends
    assert pack.parents.count(-1) == len(pack.groups) - 1 == 3  # two groups stand on one image


def _gradients(network):
    found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl", "qwen2"])
@pytest.mark.parametrize("share", [True, False], ids=["tree", "rows"])
def test_mean_of_packed_paths_equals_stock_transformers(family, share):
    network = make_model(family, head=LINEAR, pooling="mean")
    records = _records(family)
    loss, rewards = stock.stock_loss(network, records)
    loss.backward()
    expected = _gradients(network)
    pack = pack_of(network, records, share)
    packed = network(pack)
    preference_loss(packed, pack.edges, center=stock.CENTER).backward()
    got = _gradients(network)
    assert (packed - rewards).abs().max() <= 1e-5
    assert got.keys() == expected.keys() == dict(network.named_parameters()).keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert (got[name] - gradient).abs().max() <= 1e-5, name


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2"])
def test_bf16_error_of_means_is_at_most_twice_that_of_stock_bf16(family):
    records = [make_record(seed, num_responses=6, response_words=(5, 60)) for seed in range(8)]
    truth = stock.stock_rewards(make_model(family, pooling="mean"), records)
    half = make_model(family, dtype=torch.bfloat16, pooling="mean")
    stock_error = (stock.stock_rewards(half, records).float() - truth).square().mean().sqrt()
    our_error = (half(pack_of(half, records)) - truth).square().mean().sqrt()
    assert 0 < our_error <= 2 * stock_error


def test_changing_one_response_changes_no_other_mean_bitwise():
    network = make_model("qwen2", pooling="mean")
    records = _records("qwen2")
    pack = pack_of(network, records)
    before = network(pack)
    starts = [0, *np.cumsum(pack.lengths).tolist()]
    leaves = [s for s in range(len(pack.lengths)) if s not in pack.parents and pack.lengths[s] > 3]
    assert len(leaves) > 4
    for segment in leaves:
        changed = pack_of(network, records)
        span = slice(starts[segment], starts[segment + 1])
        changed.input_ids[span] = (pack.input_ids[span] + 11) % 250
        after = network(changed)
        inside = (pack.anchors >= span.start) & (pack.anchors < span.stop)
        assert torch.equal(after[~inside], before[~inside])
        assert (after[inside] != before[inside]).all()


def test_mean_plan_weighs_each_row_of_a_path_alike_and_cuts_where_a_response_ends():
    # 0: rows 0-3, its children 1: rows 4-8 and 2: rows 9-10; 3: rows 11-12 by itself.
    tree = TreeLayout.build([4, 5, 2, 2], [-1, 0, 0, -1])
    rows = [8, 5, 10, 12]
    layout = MeanLayout.build(tree, rows)
    assert sum(layout.pieces) == 13
    per_row = layout.weights.repeat_interleave(torch.tensor(layout.pieces), dim=1)
    expected = torch.zeros(4, 13)
    for number, path in enumerate([range(9), range(6), [*range(4), 9, 10], [11, 12]]):
        expected[number, list(path)] = 1 / len(path)
    assert torch.equal(per_row, expected)


def test_padding_belongs_to_no_mean():
    network = make_model("qwen2", pooling="mean")
    records = _records("qwen2")
    from fastrm.data.batching import PackPlan
    from fastrm.data.loader import PackBuilder

    plan = PackPlan(tuple(range(len(records))), 0, True)
    padded = PackBuilder(records, network.encoder, True, multiple=64)[plan].pack
    assert padded.num_padding_tokens > 0
    assert (network(padded) - network(pack_of(network, records))).abs().max() <= 1e-6


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_compiled_fused_and_checkpointed_layers_give_the_same_means(mode):
    torch._dynamo.reset()
    results = []
    for changed in (False, True):
        network = make_model("qwen2", pooling="mean")
        if changed:
            network.fuse_projections()
            graphs = network.compile_layers("aot_eager")
            network.set_kernels(torch.float32, attention="sdpa")
            network.use_activation_checkpointing(mode)
        pack = pack_of(network, _records("qwen2"))
        rewards = network(pack)
        preference_loss(rewards, pack.edges).backward()
        results.append((rewards.detach(), network.model.embed_tokens.weight.grad))
    # The last layer keeps q, k and v apart, which is a graph of its own.
    assert graphs.count == 2
    assert all((ours - plain).abs().max() <= 1e-6 for ours, plain in zip(*results, strict=True))


@needs_interpreter
def test_triton_head_reads_means(monkeypatch):
    from tests.helpers.support import FAMILIES

    monkeypatch.setitem(FAMILIES, "qwen2", {**FAMILIES["qwen2"], "num_attention_heads": 2, "num_key_value_heads": 1})
    network = make_model("qwen2", pooling="mean")
    records = [make_record(1, num_responses=4)]
    wanted = stock.stock_rewards(network, records)
    network.set_kernels(torch.float32, kernels="triton")
    assert network.head_kernels.name == "triton"
    assert (network(pack_of(network, records)) - wanted).abs().max() <= 1e-5


def test_pooling_is_stored_in_the_export_and_read_back(tmp_path):
    network = make_model("qwen2", head=LINEAR, pooling="mean")
    save_model(network, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert again.pooling == "mean"
    pack = pack_of(network, _records("qwen2"))
    assert torch.equal(again(pack), network(pack))

    from fastrm.config import ModelConfig

    settings, line = adopt(ModelConfig(path=str(tmp_path / "model")))
    assert (settings.pooling, settings.head, line) == ("mean", LINEAR, "")
    with pytest.raises(ConfigError, match=r"model.pooling: got 'anchor', but the reward head in .* has 'mean'"):
        adopt(ModelConfig(path=str(tmp_path / "model"), head=LINEAR, pooling="anchor"))


def test_stock_classifier_refuses_the_export_of_means(tmp_path):
    from transformers import AutoModelForSequenceClassification

    # It would read the last token alone, and say nothing.
    save_model(make_model("qwen2", head=LINEAR, pooling="mean"), tmp_path / "mean")
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "mean")
    save_model(make_model("qwen2", head=LINEAR), tmp_path / "anchor")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "anchor")


def test_an_export_that_does_not_name_its_pooling_reads_the_anchor(tmp_path):
    import json

    network = make_model("qwen2")
    save_model(network, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    del config["fastrm"]["pooling"]
    file.write_text(json.dumps(config))
    assert load_model(tmp_path / "model").pooling == "anchor"
    config["fastrm"]["pooling"] = "max"
    file.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="no valid `fastrm` section"):
        load_model(tmp_path / "model")
