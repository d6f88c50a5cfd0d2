"""Small runs with adapters on a base model in files, and their rewards by peft and stock transformers alone."""

import json
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from fastrm.model.export import load_model
from tests.helpers.runs import colour_rows, text_rows, tiny_config, write_rows
from tests.helpers.stock import save_stock_checkpoint, stock_rewards
from tests.helpers.support import make_model


def lora_config(folder: Path, family: str = "llama", model: dict | None = None, **sections) -> Path:
    """Write a base model, rows and the configuration of a run of six steps on them; return the configuration."""
    base = folder / "base"
    if not base.exists():
        save_stock_checkpoint(base, make_model(family), torch.float32)
    rows = colour_rows(folder) if "vl" in family else write_rows(folder / "rows.jsonl", text_rows(40))
    path = tiny_config(folder, rows, **{"run": {"save_every": 3}, "optim": {"lr": 1e-2}, **sections})
    tree = yaml.safe_load(path.read_text())
    tree["model"] = {"path": str(base), "lora": {"rank": 4}, **(model or {})}
    path.write_text(yaml.safe_dump(tree))
    return path


def peft_rewards(run: Path, records) -> torch.Tensor:
    """Rewards (R,) of a run's adapter as peft loads it into the stock class, with the head of its files."""
    from peft import PeftModel

    network = load_model(run)
    adapter = run / "model"
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    kind = AutoModelForImageTextToText if network.is_vision else AutoModelForCausalLM
    stock = PeftModel.from_pretrained(kind.from_pretrained(base, dtype=torch.float32), adapter).eval()
    network.model = stock.get_base_model().model
    head = load_file(adapter / "value_head.safetensors")
    network.score.load_state_dict({name.removeprefix("score."): tensor for name, tensor in head.items()})
    assert any("lora_A" in name for name, _ in network.model.named_modules())
    assert isinstance(network.score, nn.Sequential)
    with torch.no_grad():
        return stock_rewards(network, records)
