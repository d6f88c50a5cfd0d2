"""LoRA adapters: rewards are those of the base model with the products added, or the adapter is refused by name."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastrm.errors import ConfigError, StorageError
from fastrm.model import adapters
from fastrm.model.loading import open_backbone
from foreign_models import ROW, D, assert_same, merged, random, rewards_of, save_adapter, save_backbone, stock_rewards


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
    stock = merged(tmp_path, save_adapter(tmp_path, tmp_path), lambda module: 2.0)
    wanted = stock_rewards(tmp_path, lambda ids: stock(ids).last_hidden_state[0, -1] @ ROW[0])
    assert_same(rewards_of(tmp_path)[0], wanted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, r"use_dora is True; only plain LoRA .* merge_and_unload"),
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
