"""LoRA adapters: rewards are those of the base model with the products added, or the adapter is refused by name."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSequenceClassification

from fastrm.errors import ConfigError, StorageError
from fastrm.model import adapters
from fastrm.model.lm_head import untie_other_lm_head
from fastrm.model.loading import open_backbone
from tests.helpers.foreign_models import (
    ROW,
    D,
    add_weights,
    assert_same,
    merged,
    random,
    rewards_of,
    save_adapter,
    save_backbone,
    stock_rewards,
)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, lambda module: 2.0),
        ({"use_rslora": True}, lambda module: 4.0),
        (
            {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 1}},
            lambda module: 0.25 if module.endswith("down_proj") else 4.0 if "layers.1." in module else 2.0,
        ),
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_an_adapter_is_merged_into_the_base_that_it_names(settings, scale, tmp_path):
    save_backbone(tmp_path / "base")
    products = save_adapter(tmp_path / "adapter", tmp_path / "base", **settings)
    stock = merged(tmp_path / "base", products, scale)
    found, line = rewards_of(tmp_path / "adapter")
    wanted = stock_rewards(tmp_path / "base", lambda ids: stock(ids).last_hidden_state[0, -1] @ ROW[0])
    assert_same(found, wanted)
    assert "from score.weight" in line
    # Some rows at a time, as of a large matrix, in bf16 and from the middle of a row.
    tensor = open_backbone(str(tmp_path / "adapter")).tensors["layers.0.mlp.down_proj.weight"]
    whole = tensor.read()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapters, "CHUNK_BYTES", 4 * 100)
        part = torch.empty(333, dtype=torch.bfloat16)
        tensor.read_into(part, 77)
    assert torch.equal(part, whole.flatten()[77 : 77 + 333].bfloat16())


def test_an_adapter_beside_its_base_is_not_ignored(tmp_path):
    save_backbone(tmp_path)
    # Beside its base, transformers would put it into the stock model here.
    stock = merged(tmp_path, save_adapter(tmp_path / "apart", tmp_path), lambda module: 2.0)
    for file in (tmp_path / "apart").iterdir():
        file.rename(tmp_path / file.name)
    wanted = stock_rewards(tmp_path, lambda ids: stock(ids).last_hidden_state[0, -1] @ ROW[0])
    assert_same(rewards_of(tmp_path)[0], wanted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_bdlora": True}, r"use_bdlora is True; only plain LoRA .* merge_and_unload"),
        ({"use_dora": True}, r"model.layers.0.mlp.down_proj.lora_\*, .*: not the matrices of a linear layer's LoRA"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"a_setting_of_tomorrow": [1]}, r"a_setting_of_tomorrow is \[1\]"),
        ({"lora_alpha": None}, "r is 4 and lora_alpha None for model.layers.0.mlp.down_proj, wanted two numbers"),
        ({"lora_alpha": "8"}, "lora_alpha '8'"),
        ({"base_model_name_or_path": "/nowhere/base"}, "adapter for the base model '/nowhere/base', which is not here"),
        ({"base_model_name_or_path": ""}, "names no base model"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_the_name_of_its_setting(settings, message, tmp_path):
    save_backbone(tmp_path / "base")
    save_adapter(tmp_path / "adapter", tmp_path / "base", **settings)
    with pytest.raises(ConfigError, match=message):
        rewards_of(tmp_path / "adapter")


def save_adapter_of_the_head(folder, base):
    """An adapter like `save_adapter`'s whose head is no whole weight but a product; returns the products."""
    products = save_adapter(folder, base)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    del weights["base_model.model.score.weight"]
    down, up = random(4, D) / 4, random(1, 4) / 4
    parts = {"base_model.model.score.lora_A.weight": down, "base_model.model.score.lora_B.weight": up}
    save_file(weights | parts, file)
    return products, up @ down


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora_of_the_head_is_added_to_the_bases_head(dtype, tmp_path):
    base = tmp_path / "base"
    save_backbone(base, "llama", AutoModelForSequenceClassification, num_labels=1)
    head = load_file(base / "model.safetensors")["score.weight"].to(dtype)
    add_weights(base, **{"score.weight": head})
    products, of_head = save_adapter_of_the_head(tmp_path / "adapter", base)
    stock, row = merged(base, products, lambda module: 2.0), (head.float() + 2.0 * of_head)[0]
    found, line = rewards_of(tmp_path / "adapter")
    assert_same(found, stock_rewards(base, lambda ids: stock(ids).last_hidden_state[0, -1] @ row))
    assert "from score.weight" in line


def test_lora_of_a_head_that_no_file_holds_is_refused_as_that(tmp_path):
    save_backbone(tmp_path / "base")
    save_adapter_of_the_head(tmp_path / "adapter", tmp_path / "base")
    with pytest.raises(StorageError, match=r"adds to score.weight, .* a head that was drawn at random .* is lost"):
        rewards_of(tmp_path / "adapter")


@pytest.mark.parametrize("family", ["llama", "internvl"])
def test_what_an_adapter_adds_to_a_tied_lm_head_is_refused_for_a_model_that_writes(family, tmp_path):
    """Stock adds it to the logits and not to the embeddings, so that no weight of either holds it."""
    kind = AutoModelForCausalLM if family == "llama" else AutoModelForImageTextToText
    stock = save_backbone(tmp_path / "base", family, kind, tie_word_embeddings=True)
    save_adapter(tmp_path / "adapter", tmp_path / "base")
    untie_other_lm_head(open_backbone(str(tmp_path / "adapter")))
    shape, file = stock.lm_head.weight.shape, tmp_path / "adapter" / "adapter_model.safetensors"
    parts = {"A": random(4, shape[1]), "B": random(shape[0], 4)}
    added = {f"base_model.model.lm_head.lora_{part}.weight": tensor for part, tensor in parts.items()}
    save_file(load_file(file) | added, file)
    opened = open_backbone(str(tmp_path / "adapter"))  # a reward model needs no LM head
    with pytest.raises(ConfigError, match=r"its adapter changes lm_head.weight, which the base ties to its embeddings"):
        untie_other_lm_head(opened)


def test_an_adapter_without_a_weight_is_refused(tmp_path):
    """It would score as its base does."""
    save_backbone(tmp_path / "base")
    save_adapter(tmp_path / "adapter", tmp_path / "base")
    save_file({}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(StorageError, match="holds no weight, and would leave the base as it is"):
        rewards_of(tmp_path / "adapter")


def test_an_adapter_whose_base_is_away_names_the_base(tmp_path, monkeypatch):
    monkeypatch.setattr("fastrm.model.weight_files._hub_problem", lambda: "the hub is away")
    save_backbone(tmp_path / "base")
    save_adapter(tmp_path / "adapter", tmp_path / "base", base_model_name_or_path="some/base")
    with pytest.raises(ConfigError, match=r"'some/base': no such folder here .*the hub is away"):
        rewards_of(tmp_path / "adapter")


def test_an_adapter_of_another_base_is_refused(tmp_path):
    save_backbone(tmp_path / "base")
    save_adapter(tmp_path / "adapter", tmp_path / "base")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    extra = {f"{name.replace('0', '9')}.lora_{part}.weight": random(*shape) for part, shape in
             {"A": (4, D), "B": (D, 4)}.items()}  # fmt: skip
    save_file(load_file(file) | extra, file)
    with pytest.raises(StorageError, match=r"changes model.layers.9.self_attn.q_proj.weight .*no weight of"):
        rewards_of(tmp_path / "adapter")
