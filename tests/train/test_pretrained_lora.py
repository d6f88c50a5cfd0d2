"""SmolLM2-135M-Instruct with adapters: some steps, and the rewards of plain PEFT on stock transformers."""

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastrm import RewardModel
from tests.helpers.runs import run, write_rows
from tests.helpers.smollm2 import needs_smollm2
from tests.train.test_pretrained_rooms import GROUPS, ROWS

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytestmark = needs_smollm2


@pytest.mark.parametrize("quantize", [None, "nf4"], ids=["lora", "qlora"])
def test_a_run_on_real_weights_learns_and_is_loaded_again(quantize, smollm2_folder, tmp_path):
    tree = {
        "run": {"dir": str(tmp_path / "run"), "max_steps": 3, "log_every": 1},
        "data": {"train": [{"path": str(write_rows(tmp_path / "rows.jsonl", ROWS))}], "num_workers": 0},
        "model": {
            "path": str(smollm2_folder), "head": {"layers": 1, "bias": False}, "lora": {"rank": 8},
            "quantize": quantize,
        },
        "optim": {"lr": 1.0e-3, "batch_pairs": 8, "warmup_ratio": 0.0},
        "precision": {"dtype": "fp32"},
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    run(path)
    model = tmp_path / "run" / "model"
    found = RewardModel.from_pretrained(tmp_path / "run", device="cpu", dtype="fp32").score(GROUPS)
    assert all(rewards[0] > max(rewards[1:]) for rewards in found), "three steps on three prompts are enough"
    weights = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*.safetensors"))
    assert weights < 0.1 * sum(file.stat().st_size for file in smollm2_folder.glob("*.safetensors"))
    with safe_open(model / "adapter_model.safetensors", "pt") as tensors:
        assert all("lora_" in name or "score" in name for name in tensors.keys())  # noqa: SIM118  (no iterator)
    wanted = peft_rewards(smollm2_folder, model)
    pairs = [pair for ours, stock in zip(found, wanted, strict=True) for pair in zip(ours, stock, strict=True)]
    difference = max(abs(ours - stock) for ours, stock in pairs)
    if quantize is None:
        assert difference < 2e-4
    else:  # PEFT puts the adapter on the base in full precision, which is another model
        assert difference > 1e-3


@torch.no_grad()
def peft_rewards(base, adapter) -> list[list[float]]:
    """Rewards by transformers' class for sequence classification with the adapter that peft loads into it."""
    stock = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    stock = peft.PeftModel.from_pretrained(stock, adapter).eval()
    stock.config.pad_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    return [
        [
            float(stock(input_ids=tokenizer.apply_chat_template(
                [{"role": "user", "content": group["prompt"]}, {"role": "assistant", "content": response}],
                return_tensors="pt", return_dict=False,
            )).logits)
            for response in group["responses"]
        ]
        for group in GROUPS
    ]  # fmt: skip
