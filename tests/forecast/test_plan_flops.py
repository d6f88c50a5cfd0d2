"""Counts of parameters and operations: against dimensions, published sizes, and what torch counts."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import fastrm.model.layers
from fastrm.config import HeadConfig, LossConfig, ModelConfig, load_config
from fastrm.data.group import GroupSize, encode_group
from fastrm.data.record import Message, Preference, Record, Response
from fastrm.data.template import TurnLoss
from fastrm.errors import ConfigError
from fastrm.forecast.flops import generation_flops, pass_flops, step_flops
from fastrm.forecast.full_pack import full_pack, make_pack
from fastrm.forecast.parameters import count_parameters
from fastrm.forecast.workload import RESPONSE_TOKENS, WRITTEN_TOKENS, Workload, typical_workload
from fastrm.model.architectures import PUBLISHED, find_architecture, meta_network
from tests.helpers import support


def network_of(**settings):
    settings = ModelConfig(**settings)
    return meta_network(find_architecture(settings)[0], settings)


@pytest.mark.parametrize("name", [name for name, found in PUBLISHED.items() if found.num_parameters])
def test_architecture_has_published_size(name):
    counts = count_parameters(network_of(path=f"Qwen/{name}"))
    backbone = sum(count.total for part, count in counts.items() if part != "head")
    options = PUBLISHED[name].options
    tied = options.get("text_config", options)["tie_word_embeddings"]
    # An LM head that is not tied has the size of the embeddings.
    assert backbone + (0 if tied else counts["embeddings"].total) == PUBLISHED[name].num_parameters


def test_parameters_7b_follow_from_dimensions():
    counts = count_parameters(network_of(path="Qwen/Qwen2.5-VL-7B-Instruct"))
    hidden, intermediate, key_value, layers, vocabulary = 3584, 18944, 4 * 128, 28, 152_064
    attention = 2 * hidden * hidden + 2 * hidden * key_value + hidden + 2 * key_value
    layer = attention + 3 * hidden * intermediate + 2 * hidden
    assert counts["language model"].total == layers * layer + hidden == 6_525_621_760
    assert counts["embeddings"].total == vocabulary * hidden
    width, wide, patch = 1280, 3420, 3 * 2 * 14 * 14
    block = 4 * width * width + 4 * width + 3 * width * wide + 2 * wide + width + 2 * width
    merged = 4 * width
    assert counts["vision tower"].total == patch * width + 32 * block
    assert counts["projector"].total == width + merged * merged + merged + merged * hidden + hidden
    assert counts["vision tower"].total + counts["projector"].total == 676_550_144
    assert counts["head"].total == hidden * hidden + hidden + hidden + 1


# hidden, intermediate, layers, width of keys and values, vocabulary, 1 if q, k and v have biases
INTERNVL = {
    "InternVL3-1B-hf": (896, 4864, 24, 128, 151_674, 1),
    "InternVL3-2B-hf": (1536, 8960, 28, 256, 151_674, 1),
    "InternVL3-8B-hf": (3584, 18944, 28, 512, 151_674, 1),
    "InternVL2_5-8B-MPO-hf": (4096, 14336, 32, 1024, 92_553, 0),
}


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "InternVL" in name])
def test_parameters_of_internvl_follow_from_dimensions(name):
    hidden, intermediate, layers, key_value, vocabulary, biased = INTERNVL[name]
    counts = count_parameters(network_of(path=f"OpenGVLab/{name}"))
    layer = 2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * intermediate + 2 * hidden
    layer += biased * (hidden + 2 * key_value)
    assert counts["language model"].total == layers * layer + hidden
    assert counts["embeddings"].total == vocabulary * hidden
    # InternViT-300M: four square matrices and two of the MLP with biases, two norms, two scales.
    width, wide, patch = 1024, 4096, 3 * 14 * 14
    block = 4 * (width * width + width) + 2 * width * wide + wide + width + 4 * width + 2 * width
    embeddings = patch * width + width + width + (1 + 32 * 32) * width
    assert counts["vision tower"].total == embeddings + 24 * block
    merged = 4 * width
    assert counts["projector"].total == 2 * merged + merged * hidden + hidden + hidden * hidden + hidden


def test_parameters_equal_a_real_network():
    head = HeadConfig(layers=3)
    real = support.make_model("qwen2_5_vl", head=head)
    tokenizer = {"train_vocab_size": len(real.encoder.tokenizer)}
    meta = network_of(init=support.FAMILIES["qwen2_5_vl"], tokenizer=tokenizer, head=head)
    assert {n: p.shape for n, p in meta.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(p.is_meta for p in meta.parameters())


@pytest.mark.parametrize(
    ("freeze", "trained"),
    [
        (["vision"], {"projector", "embeddings", "language model", "head"}),
        (["vision", "projector"], {"embeddings", "language model", "head"}),
        (["vision", "projector", "language"], {"head"}),
    ],
    ids=["vision", "vision-projector", "all-but-head"],
)
def test_parameters_trained_follow_freeze(freeze, trained):
    counts = count_parameters(network_of(path="Qwen2-VL-2B-Instruct", freeze=freeze))
    assert {part for part, count in counts.items() if count.trainable} == trained
    assert all(count.trainable in (0, count.total) for count in counts.values())


def test_architecture_of_local_folder_comes_from_its_config(tmp_path):
    network = support.make_model("qwen2_vl")
    # A name from the table: the folder's own config must win.
    folder = tmp_path / "Qwen2-VL-7B-Instruct"
    network.model.config.save_pretrained(folder)
    config, origin = find_architecture(ModelConfig(path=str(folder)))
    assert config.get_text_config().hidden_size == 32 and origin == f"{folder}/config.json"
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: not a model configuration"):
        find_architecture(ModelConfig(path=str(folder)))


def test_architecture_of_other_family_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ConfigError, match="model type 'gpt2' is not supported"):
        find_architecture(ModelConfig(path=str(tmp_path)))


class _MultipliesNothing(torch.autograd.Function):
    """Attention without an operation that torch would count."""

    @staticmethod
    def forward(ctx, query, key, value):
        ctx.save_for_backward(key, value)
        return query.clone()

    @staticmethod
    def backward(ctx, gradient):
        key, value = ctx.saved_tensors
        return gradient, torch.zeros_like(key), torch.zeros_like(value)


@pytest.fixture
def medium_network(monkeypatch):
    """Makes networks whose matrices are all that torch counts."""

    def attend(query, key, value, layout, **_):
        return _MultipliesNothing.apply(query, key.contiguous(), value.contiguous())

    monkeypatch.setattr(fastrm.model.layers, "tree_attention", attend)
    text = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 3, "num_key_value_heads": 2}
    rope = {"head_dim": 64, "rope_parameters": {**support.MROPE, "mrope_section": [8, 12, 12]}}

    def make(family, freeze=(), pooling="anchor", paradigm="reward"):
        options = dict(support.FAMILIES[family])
        if family == "qwen2":
            options |= text
        else:
            options["text_config"] = {**options["text_config"], **text, **(rope if family != "internvl" else {})}
            if family != "internvl":
                width = "hidden_size" if family == "qwen2_vl" else "out_hidden_size"
                options["vision_config"] = {**options["vision_config"], width: 256}
        monkeypatch.setitem(support.FAMILIES, family, options)
        network = support.make_model(family, pooling=pooling, paradigm=paradigm)
        network.freeze(freeze)
        return network.train()

    return make


def one_pair(with_image):
    """A group whose responses have the same number of tokens: the same words in another order."""
    prompt = (support.make_image(200, 120), "Is this the cat?") if with_image else ("Is this the cat? " * 20,)
    texts = (" cat dog no yes maybe so 1 2", " dog cat yes no maybe so 2 1")
    responses = tuple(Response((Message("user", prompt), Message("assistant", (text,)))) for text in texts)
    return Record("pair", responses, (Preference(0, 1),), "test", "test:1")


def workload_of(pack):
    image_tokens = 0 if pack.media_rows is None else len(pack.media_rows)
    prompt, *responses = pack.lengths
    assert pack.parents == [-1, 0, 0] and responses[0] == responses[1]
    return Workload(1, image_tokens, prompt - image_tokens, responses[0])


@pytest.mark.parametrize(
    ("family", "freeze"),
    [
        ("qwen2", []),
        ("qwen2_5_vl", []),
        ("qwen2_5_vl", ["vision"]),
        ("qwen2_5_vl", ["vision", "projector", "language"]),
        ("qwen2_5_vl", ["language"]),
        ("qwen2_vl", ["projector"]),
        ("qwen3_vl", []),
        ("qwen3_vl", ["vision"]),
        ("qwen3_vl", ["projector", "language"]),
        ("internvl", []),
        ("internvl", ["vision"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "nothing",
)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointed"])
def test_flops_are_what_torch_counts(medium_network, family, freeze, checkpointing):
    network = medium_network(family, freeze)
    if checkpointing:
        network.use_activation_checkpointing("full")
    pack = support.pack_of(network, [one_pair(family != "qwen2")])
    with FlopCounterMode(display=False) as counter:
        network(pack).sum().backward()
    ways = {"shared": True, "images_once": True, "pruned": True}
    parts = step_flops(network, workload_of(pack), **ways, checkpointing=checkpointing)
    counted = parts["vision"].total + parts["language"].total
    assert counter.get_total_flops() == pytest.approx(counted, rel=2e-3)


def test_flops_of_means_are_what_torch_counts(medium_network):
    network = medium_network("qwen2", pooling="mean")
    pack = support.pack_of(network, [one_pair(False)])
    with FlopCounterMode(display=False) as counter:
        network(pack).sum().backward()
    ways = {"shared": True, "images_once": True, "pruned": False}
    counted = step_flops(network, workload_of(pack), **ways, checkpointing=False)["language"].total
    assert counter.get_total_flops() == pytest.approx(counted, rel=2e-3)


@pytest.mark.parametrize("paradigm", ["critic", "judge"])
@pytest.mark.parametrize("freeze", [[], ["language"]], ids=["nothing", "language"])
def test_flops_of_a_model_that_writes_are_what_torch_counts(medium_network, paradigm, freeze):
    network = medium_network("qwen2_5_vl", freeze, paradigm=paradigm)
    network.encoder.turns = TurnLoss(per_token=paradigm == "judge")
    record = one_pair(True)
    if paradigm == "judge":
        record = replace(record, responses=record.responses[:1], preferences=(Preference(0, 0),))
    pack = support.pack_of(network, [record])
    prompt, *tails = pack.lengths if paradigm == "critic" else (pack.num_tokens, 0)
    written = len(pack.turn_rows) // len(tails)
    assert 0 < written < (tails[0] or prompt)
    shared = 0 if paradigm == "critic" else written
    load = Workload(
        1, len(pack.media_rows), prompt - shared - len(pack.media_rows), tails[0] + shared - written,
        tails=len(tails), written_tokens=written, learnt_tokens=written,
    )  # fmt: skip
    assert load.num_tokens(True) == pack.num_tokens
    loss = LossConfig(kind="cross_entropy" if paradigm == "judge" else "bradley_terry")
    with FlopCounterMode(display=False) as counter:
        network(pack, loss)[0].sum().backward()
    ways = {"shared": True, "images_once": True, "pruned": False}
    parts = step_flops(network, load, **ways, checkpointing=False)
    assert counter.get_total_flops() == pytest.approx(parts["vision"].total + parts["language"].total, rel=2e-3)


def writer_load(paradigm, spec="", **sections):
    head = {"model": {"path": "Qwen2.5-VL-7B-Instruct"}, "run": {"dir": "unused"}}
    own = {paradigm: {"spec": str(spec)} if spec else {}} if paradigm != "reward" else {}
    for name, values in sections.items():
        own[name] = own.get(name, {}) | values
    config = load_config(head | {"paradigm": paradigm} | own)
    return config, typical_workload(config, network_of(path="Qwen2.5-VL-7B-Instruct"))


def test_a_critics_step_has_its_critiques_and_the_specs_words_besides_a_reward_models(tmp_path):
    config, reward = writer_load("reward")
    prompt = "x" * 41 + "{{ question }}{{ response }}" + "y" * 8
    (tmp_path / "own.yaml").write_text(f"kind: critic\nsystem: {'s' * 39}\nprompt: '{prompt}'\n")
    _, critic = writer_load("critic", tmp_path / "own.yaml")
    assert critic.num_pairs == reward.num_pairs == config.optim.batch_pairs and critic.unit == "pairs"
    assert critic.prompt_tokens == reward.prompt_tokens + 20
    assert critic.tail_tokens == reward.tail_tokens + 2 + WRITTEN_TOKENS
    assert (critic.tails, critic.learnt_tokens) == (2, WRITTEN_TOKENS)
    assert "22 of the SPEC's own words, 300 of each response, 300 of each critique" in critic.lengths
    assert writer_load("critic", critic={"lm_weight": 0.0})[1].learnt_tokens == 0


def test_a_judges_step_has_one_text_for_each_of_batch_pairs_with_both_responses_in_its_prompt(tmp_path):
    config, reward = writer_load("reward")
    prompt = "{{ question }}{{ first }}abcd{{ second }}" + "x" * 36
    (tmp_path / "own.yaml").write_text(f"kind: pairwise\nparser: r1_reward\nprompt: '{prompt}'\n")
    judge = writer_load("judge", tmp_path / "own.yaml")[1]
    assert judge.num_tails == judge.num_pairs == config.optim.batch_pairs and judge.unit == "texts"
    assert judge.prompt_tokens == reward.prompt_tokens + 10 + 2 * RESPONSE_TOKENS
    assert judge.tail_tokens == judge.learnt_tokens == WRITTEN_TOKENS
    assert judge.num_tokens(True) == judge.num_tokens(False)


@pytest.mark.parametrize("paradigm", ["critic", "judge"])
@pytest.mark.parametrize("share", [True, False], ids=["shared", "whole"])
def test_a_full_pack_of_a_model_that_writes_has_its_groups(paradigm, share):
    config, load = writer_load(paradigm, data={"share_prefixes": share})
    network = meta_network(find_architecture(config.model)[0], config.model, paradigm)
    shape = full_pack(config, load, network)
    assert sum(shape.lengths) == config.optim.tokens_per_pack
    assert shape.num_learnt == len(shape.anchor_rows) * WRITTEN_TOKENS < sum(shape.lengths) / 2
    assert len(shape.anchor_rows) == load.tails * len(shape.grids)
    with torch.device("meta"):
        assert len(make_pack(shape, network).turn_rows) == shape.num_learnt


def pass_of(network, record):
    """Return the operations of the pass that scores a record, and those of its attention."""
    group = encode_group(record, network.encoder)
    size, paths = GroupSize.of(group), [len(response.tokens) for response in group.responses]
    images, pruned = [medium.num_tokens for medium in size.media], network.pooling == "anchor"
    total = pass_flops(network, size.num_tokens, size.num_attention_pairs, paths, images, pruned=pruned)
    config = network.model.config.get_text_config()
    pairs = (config.num_hidden_layers - 1) * size.num_attention_pairs
    pairs += sum(paths) if pruned else size.num_attention_pairs
    attention = 4 * config.num_attention_heads * (getattr(config, "head_dim", None) or 64) * pairs
    if images:
        vision = network.tower.kernels.attention.shape
        attention += 4 * vision.heads * vision.head_dim * sum(map(network.tower.num_attention_pairs, images))
    return total, attention


@pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl", "qwen3_vl", "internvl"])
@pytest.mark.parametrize("pooling", ["anchor", "mean"])
def test_flops_of_a_pass_are_what_torch_counts(medium_network, family, pooling):
    network, pair = medium_network(family, pooling=pooling).eval(), one_pair(family != "qwen2")
    longer = (*pair.responses[0].messages[:-1], Message("assistant", ("yes " * 30,)))
    group = replace(pair, responses=(*pair.responses, Response(longer)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(support.pack_of(network, [group]))
    total, attention = pass_of(network, group)
    assert counter.get_total_flops() == pytest.approx(total - attention, rel=2e-3)
    # Of two responses of one length it is the forward pass of a training step.
    ways = {"shared": True, "images_once": True, "pruned": pooling == "anchor", "checkpointing": False}
    parts = step_flops(network, workload_of(support.pack_of(network, [pair])), **ways)
    assert pass_of(network, pair)[0] == sum(part.forward for part in parts.values())


@pytest.mark.parametrize("written", [1, 9])
def test_flops_of_generation_are_what_torch_counts(written):
    network, read = support.make_model("llama"), 23
    config, tokens = network.model.config, torch.arange(read)[None] % 20
    stock = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    exactly = {"max_new_tokens": written, "min_new_tokens": written, "do_sample": False}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        stock.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **exactly)
    # Eager attention multiplies the half of the first pass that the mask hides, too.
    width = config.num_attention_heads * config.head_dim
    hidden = 4 * width * config.num_hidden_layers * (read * (read - 1) // 2)
    assert counter.get_total_flops() - hidden == generation_flops(network, read, written)


def test_flops_pruning_saves_the_last_layer():
    network = network_of(path="Qwen2.5-VL-7B-Instruct", freeze=["vision"])
    load = Workload(4, 0, 100, 300)
    ways = {"shared": True, "images_once": True, "checkpointing": False}
    whole, pruned = (step_flops(network, load, pruned=p, **ways)["language"].total for p in (False, True))
    matrices = 2 * 3584 * 3584 + 3 * 3584 * 18944
    assert whole - pruned == 6 * matrices * (load.num_tokens(True) - 8)


def test_workload_counts_pairs_of_a_drawn_mask():
    load = Workload(3, 2, 3, 4)
    prompt, response = 5, 4
    whole = torch.ones(prompt + response, prompt + response).tril().sum()
    assert load.attention_pairs(shared=False) == 3 * 2 * whole
    tree = torch.ones(prompt + 2 * response, prompt + 2 * response).tril()
    tree[prompt + response :, prompt : prompt + response] = 0
    assert load.attention_pairs(shared=True) == 3 * tree.sum()
    assert load.anchor_pairs == 3 * 2 * (prompt + response)
    assert (load.num_tokens(False), load.num_tokens(True)) == (3 * 18, 3 * 13)
