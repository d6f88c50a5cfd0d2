"""The dry run: counts against dimensions and published sizes, costs against what torch does."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

import fastrm.model.attention
import support
from fastrm.config import HeadConfig, ModelConfig, load_config
from fastrm.data.record import Message, Preference, Record, Response
from fastrm.errors import ConfigError
from fastrm.model.architectures import PUBLISHED, find_architecture, meta_network
from fastrm.train.cost import (
    Parameters,
    Workload,
    activation_bytes,
    autocast_weight_bytes,
    count_parameters,
    local_state_bytes,
    step_flops,
    sum_parameters,
    zero_state_bytes,
)
from fastrm.train.dry_run import dry_run

ROOT = Path(__file__).parents[1]


def network_of(**settings):
    settings = ModelConfig(**settings)
    return meta_network(find_architecture(settings)[0], settings)


def quiet():
    return Console(file=io.StringIO())


@pytest.fixture
def small_config(tmp_path):
    """A configuration of a tiny random model, and a function that changes it."""
    tree = {
        "run": {"dir": str(tmp_path / "run")},
        "data": {"train": [{"path": "digits:train"}], "max_tokens_per_group": 1024, "max_pixels": 28 * 28 * 10},
        "model": {"init": support.FAMILIES["qwen2_5_vl"], "tokenizer": {"train_vocab_size": 300}},
        "optim": {"batch_pairs": 8, "tokens_per_pack": 1024},
    }

    def make(*overrides):
        file = tmp_path / "small.yaml"
        file.write_text(yaml.safe_dump(tree))
        return load_config(file, overrides)

    return make


@pytest.mark.parametrize("name", PUBLISHED)
def test_architecture_has_published_size(name):
    counts = count_parameters(network_of(path=f"Qwen/{name}"))
    backbone = sum(count.total for part, count in counts.items() if part != "head")
    tied = PUBLISHED[name].options["text_config"]["tie_word_embeddings"]
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


def test_zero_state_divides_by_stage():
    parameters = Parameters(total=1000, trainable=600)
    by_stage = [zero_state_bytes(parameters, stage, 8) for stage in range(4)]
    weights, gradients, optimizer = 2000, 1200, 7200
    assert by_stage == [
        weights + gradients + optimizer,
        weights + gradients + optimizer / 8,
        weights + (gradients + optimizer) / 8,
        (weights + gradients + optimizer) / 8,
    ]
    assert {zero_state_bytes(parameters, stage, 1) for stage in range(4)} == {by_stage[0]}


def test_zero_state_matches_the_papers_example():
    # Rajbhandari et al. 2020, figure 1: 7.5B parameters on 64 GPUs, in units of 10^9 bytes.
    parameters = Parameters(7_500_000_000, 7_500_000_000)
    by_stage = [round(zero_state_bytes(parameters, stage, 64) / 1e9, 1) for stage in range(4)]
    assert by_stage == [120.0, 31.4, 16.6, 1.9]


def test_local_state_is_what_the_optimizer_holds():
    from fastrm.train.optim import make_optimizer

    network = support.make_model("qwen2_5_vl")
    network.freeze(["vision"])
    optimizer = make_optimizer(network, load_config(ROOT / "configs/quickstart.yaml").optim)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [*network.parameters(), *(p.grad for p in network.parameters() if p.grad is not None)]
    tensors += [m for state in optimizer.state.values() for name, m in state.items() if name.startswith("exp_avg")]
    assert local_state_bytes(sum_parameters(count_parameters(network))) == sum(t.nbytes for t in tensors)


class _KeepsLikeFlash(torch.autograd.Function):
    """Keeps what FlashAttention keeps (query, key, value, output) and multiplies nothing."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = query.clone()
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx, gradient):
        _, key, value, _ = ctx.saved_tensors
        return gradient, torch.zeros_like(key), torch.zeros_like(value)


@pytest.fixture
def medium_network(monkeypatch):
    """Makes networks wide enough that what the formulas leave out (rotary tables) is small."""

    def attend(query, key, value, layout, **_):
        return _KeepsLikeFlash.apply(query, key.contiguous(), value.contiguous())

    monkeypatch.setattr(fastrm.model.attention, "tree_attention", attend)
    text = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 3, "num_key_value_heads": 2}
    rope = {"rope_parameters": {**support.MROPE, "mrope_section": [8, 12, 12]}}

    def make(family, freeze=()):
        options = dict(support.FAMILIES[family])
        if family == "qwen2":
            options |= text
        else:
            options["text_config"] = {**options["text_config"], **text, **rope}
            width = "out_hidden_size" if family == "qwen2_5_vl" else "hidden_size"
            options["vision_config"] = {**options["vision_config"], width: 256}
        monkeypatch.setitem(support.FAMILIES, family, options)
        network = support.make_model(family)
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
    image_tokens = 0 if pack.image_rows is None else len(pack.image_rows)
    prompt, *responses = pack.lengths
    assert pack.parents == [-1, 0, 0] and responses[0] == responses[1]
    return Workload(1, image_tokens, prompt - image_tokens, responses[0])


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointed"])
def test_activations_are_what_autograd_keeps(medium_network, family, bf16, checkpointing):
    network = medium_network(family, ["vision"] if family == "qwen2_5_vl" else [])
    if checkpointing:
        network.use_gradient_checkpointing()
    pack = support.pack_of(network, [support.make_record(1, prompt_words=400)])
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            # The tensor itself is kept too: a freed address would be given out again.
            kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        rewards = network(pack)
    assert rewards.requires_grad
    num_bytes = sum(size for size, _ in kept.values())
    estimate = activation_bytes(network, pack.num_tokens, 0, bf16)
    if checkpointing:
        # One layer at a time comes on top, in the backward pass.
        expected = 3 * pack.num_tokens * 4 * 256
        assert expected < estimate["checkpointed"]
    else:
        expected = estimate["whole"] + (autocast_weight_bytes(network) if bf16 else 0)
    assert num_bytes == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("family", "freeze"),
    [
        ("qwen2", []),
        ("qwen2_5_vl", []),
        ("qwen2_5_vl", ["vision"]),
        ("qwen2_5_vl", ["vision", "projector", "language"]),
        ("qwen2_5_vl", ["language"]),
        ("qwen2_vl", ["projector"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "nothing",
)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointed"])
def test_flops_are_what_torch_counts(medium_network, family, freeze, checkpointing):
    network = medium_network(family, freeze)
    if checkpointing:
        network.use_gradient_checkpointing()
    pack = support.pack_of(network, [one_pair(family != "qwen2")])
    with FlopCounterMode(display=False) as counter:
        network(pack).sum().backward()
    ways = {"shared": True, "images_once": True, "pruned": True}
    parts = step_flops(network, workload_of(pack), **ways, checkpointing=checkpointing)
    counted = parts["vision"].total + parts["language"].total
    assert counter.get_total_flops() == pytest.approx(counted, rel=2e-3)


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


def test_dry_run_prints_full_recipe_and_ends_well(tmp_path):
    command = [sys.executable, "-m", "fastrm.cli", "train", str(ROOT / "configs/full.yaml"), "--dry-run"]
    # Elsewhere than in the repository, where a data folder could exist.
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert run.returncode == 0, run.stderr
    for expected in ("data/rlaif-v/", "does not exist", "7,760,021,505", "8 of 8 inputs are missing", "estimate"):
        assert expected in run.stdout
    assert list(tmp_path.iterdir()) == []


def test_dry_run_tells_found_from_missing(small_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here.jsonl").write_text("{}\n")
    Path("empty").mkdir()
    config = small_config(
        "data.eval=[{path: here.jsonl}, {path: empty}, {path: here.jsonl, images: pictures.tar}, {path: digits:none}]"
    )
    inputs = dry_run(config, quiet())["inputs"]
    assert [(name, state) for name, state, _ in inputs] == [
        ("data.train.0", "found"),
        ("data.eval.0", "found"),
        ("data.eval.1", "missing"),
        ("data.eval.2", "missing"),
        ("data.eval.3", "missing"),
    ]
    details = [detail for _, _, detail in inputs]
    assert "here.jsonl: 1 file, 0.0 MiB" in details[1]
    assert "a folder without data files" in details[2]
    assert 'images "pictures.tar" does not exist' in details[3]
    assert "digits:none" in details[4]


def test_dry_run_checks_model_folder(small_config, tmp_path):
    folder = tmp_path / "model"
    support.make_model("qwen2").model.config.save_pretrained(folder)
    overrides = ("model.init=null", "model.tokenizer=null", f"model.path={folder}")
    report = dry_run(small_config(*overrides), quiet())
    assert report["inputs"][-1] == ("model.path", "missing", f"{folder}: has no *.safetensors")
    (folder / "model.safetensors").touch()
    report = dry_run(small_config(*overrides), quiet())
    assert report["inputs"][-1][:2] == ("model.path", "found")
    assert report["step"]["workload"].image_tokens == 0
    assert all(way["images"] == 0 for way in report["step"]["ways"].values())


def test_dry_run_of_unknown_model_still_checks_inputs(small_config, capsys):
    config = small_config("model.init=null", "model.tokenizer=null", "model.path=someone/some-model")
    report = dry_run(config)
    assert set(report) == {"inputs"}
    output = capsys.readouterr().out
    assert "Model not sized: no config.json in 'someone/some-model'" in output
    assert "1 of 2 inputs are missing here" in output


def test_dry_run_refuses_freeze_that_cannot_work(small_config):
    text = json.dumps(support.FAMILIES["qwen2"])
    with pytest.raises(ConfigError, match="qwen2 has no vision tower"):
        dry_run(small_config(f"model.init={text}", "model.freeze=[vision]"), quiet())


def test_dry_run_sizes_follow_the_configuration(small_config):
    shared, alone = (dry_run(small_config(f"data.share_prefixes={x}"), quiet()) for x in ("true", "false"))
    load = shared["step"]["workload"]
    assert (load.num_pairs, load.image_tokens) == (8, 10)
    ways = shared["step"]["ways"]
    assert list(ways) == ["stock pairwise", "shared prompts", "fastrm"]
    assert [way["tokens"] for way in ways.values()] == [load.num_tokens(s) for s in (False, True, True)]
    assert [way["images"] for way in ways.values()] == [16, 8, 8]
    totals = [sum(part.total for part in way["flops"].values()) for way in ways.values()]
    assert totals[0] > totals[1] > totals[2]
    assert alone["step"]["ways"]["fastrm"]["tokens"] == load.num_tokens(False)
    plain = dry_run(small_config("precision.dtype=fp32"), quiet())["memory"]
    assert plain["autocast"] == 0 < shared["memory"]["autocast"]
    assert plain["activations"]["whole"] > shared["memory"]["activations"]["whole"]


def test_dry_run_marks_the_configured_activations(small_config, capsys):
    dry_run(small_config("model.activation_checkpointing=full"))
    assert "activations with gradient checkpointing (as configured)" in capsys.readouterr().out
    dry_run(small_config())
    assert "activations (as configured)" in capsys.readouterr().out


def test_dry_run_prints_brackets_in_paths_as_they_are(small_config, capsys):
    dry_run(small_config("data.train=[{path: 'odd[red]name.jsonl'}]"))
    assert "odd[red]name.jsonl" in capsys.readouterr().out
