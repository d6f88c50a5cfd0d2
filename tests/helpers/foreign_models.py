"""Reward models as other trainers leave them, tiny and random, and the rewards of their own classes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from fastrm import RewardModel
from tests.helpers.support import FAMILIES, make_model

PROMPTS = {"Which bird is this?": ["a red robin", "blue", "it is green and big"], "Why?": ["no idea", "because"]}
GROUPS = [{"prompt": prompt, "responses": responses} for prompt, responses in PROMPTS.items()]


def random(*shape) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


D = FAMILIES["llama"]["hidden_size"]
ROW, BIAS, SQUARE, WIDE = random(1, D), torch.tensor([0.7]), random(D, D) / 4, random(D)
LORA = {
    "peft_type": "LORA", "task_type": "SEQ_CLS", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "bias": "none",
    "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["classifier", "score"], "inference_mode": True,
    "base_model_name_or_path": None, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "use_dora": False,
}  # fmt: skip


def save_backbone(folder: Path, family="llama", kind=AutoModelForCausalLM, **config) -> nn.Module:
    """A tiny stock model with its tokenizer, as transformers writes it; returns the stock model."""
    network = make_model(family)
    options = network.model.config.to_dict() | config
    full = kind.from_config(type(network.model.config).from_dict(options), dtype=torch.float32)
    full.model.load_state_dict(network.model.state_dict())
    if hasattr(full, "score"):
        nn.init.normal_(full.score.weight)
    full.save_pretrained(folder)
    network.encoder.tokenizer.save_pretrained(folder)
    return full.eval()


def set_config(folder: Path, **keys) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def add_weights(folder: Path, file="model.safetensors", **tensors) -> None:
    """Write tensors into a file of weights, besides those that are there."""
    path = folder / file
    there = load_file(path) if path.exists() else {}
    save_file(there | {name: tensor.clone() for name, tensor in tensors.items()}, path, {"format": "pt"})


def tokens_of(folder: Path) -> list[list[torch.Tensor]]:
    """Token ids (1, n) of every conversation, by the stock tokenizer and template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}], return_tensors="pt",
                return_dict=False,
            )
            for response in responses
        ]
        for prompt, responses in PROMPTS.items()
    ]  # fmt: skip


@torch.no_grad()
def stock_rewards(folder: Path, reward) -> list[list[float]]:
    """`reward` of the ids of each conversation alone."""
    return [[float(reward(ids)) for ids in group] for group in tokens_of(folder)]


def rewards_of(folder: Path) -> tuple[list[list[float]], str]:
    model = RewardModel.from_pretrained(folder, device="cpu", dtype="fp32")
    return model.score(GROUPS), model.network.adopted


def assert_same(found: list[list[float]], wanted: list[list[float]]) -> None:
    for ours, stock in zip(found, wanted, strict=True):
        assert ours == pytest.approx(stock, abs=1e-5)
    assert max(map(max, wanted)) - min(map(min, wanted)) > 0.05, "rewards that are all alike prove nothing"


def save_adapter(folder: Path, base: Path, **settings) -> dict[str, torch.Tensor]:
    """A LoRA of `q_proj` and `down_proj` of all layers with a head of its own, by PEFT's layout; returns B @ A."""
    folder.mkdir(exist_ok=True)
    settings = LORA | {"base_model_name_or_path": str(base)} | settings
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    weights, products = {"base_model.model.score.weight": ROW}, {}
    state = load_file(base / "model.safetensors")
    for number, (name, tensor) in enumerate(sorted(state.items())):
        module = name.removesuffix(".weight")
        if module.endswith(("q_proj", "down_proj")):
            rank = settings["rank_pattern"].get("layers.1.self_attn.q_proj", 4) if "1.self_attn" in module else 4
            down, up = random(rank, tensor.shape[1]), random(tensor.shape[0], rank) * (1 + number % 3) / 10
            weights[f"base_model.model.{module}.lora_A.weight"] = down
            weights[f"base_model.model.{module}.lora_B.weight"] = up
            products[name] = up @ down
    save_file(weights, folder / "adapter_model.safetensors")
    return products


def merged(base: Path, products: dict[str, torch.Tensor], scale) -> nn.Module:
    model = AutoModel.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, product in products.items():
            module = name.removesuffix(".weight")
            model.get_submodule(module.removeprefix("model.")).weight += scale(module) * product
    return model
