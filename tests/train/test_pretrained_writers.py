"""SmolLM2-135M-Instruct learns to write critiques that people wrote of responses, before it rewards them."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastrm.prompts.spec import load_spec
from fastrm.prompts.template import PromptTemplate
from fastrm.train.metrics import read_rows
from tests.helpers.project import PROJECT
from tests.helpers.runs import run
from tests.helpers.smollm2 import needs_smollm2

ROWS = PROJECT.parent / "shared" / "data" / "reward_benches" / "mm_reward_bench.jsonl"
pytestmark = [
    needs_smollm2,
    pytest.mark.skipif(not ROWS.is_file(), reason="needs the folder shared/data beside the project"),
]


@pytest.fixture
def rows(tmp_path) -> list[dict]:
    """The shortest rows with both critiques, without their pictures."""
    found = [json.loads(line) for line in ROWS.read_text().splitlines()]
    names = ("prompt", "chosen", "rejected", "chosen_reason", "rejected_reason")
    found = [{name: row[name] for name in names} for row in found if row["chosen_reason"] and row["rejected_reason"]]
    found = sorted(found, key=lambda row: len(json.dumps(row)))[:4]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return found


def test_a_critic_of_real_weights_learns_critiques_that_people_wrote(rows, smollm2_folder, tmp_path):
    source = {"path": str(tmp_path / "rows.jsonl")}
    tree = {
        "paradigm": "critic",
        "run": {"dir": str(tmp_path / "run"), "max_steps": 3, "eval_at_start": True},
        "data": {"train": [source], "eval": [source], "num_workers": 0},
        "model": {"path": str(smollm2_folder), "freeze": []},
        "loss": {"center": 0.01},
        "optim": {"lr": 2.0e-5, "batch_pairs": 4, "schedule": "constant", "warmup_ratio": 0.0},
        "precision": {"dtype": "fp32"},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(tree))
    run(tmp_path / "config.yaml")
    first, last = (row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "eval/loss" in row)
    print(json.dumps([first, last]))
    assert last["eval/critique_loss"] < 0.95 * first["eval/critique_loss"]
    assert _critique_loss(smollm2_folder, rows) == pytest.approx(first["eval/critique_loss"], rel=1e-5)
    assert _critique_loss(tmp_path / "run" / "model", rows) == pytest.approx(last["eval/critique_loss"], rel=2e-2)


@torch.no_grad()
def _critique_loss(folder, rows: list[dict]) -> float:
    """The mean over rows of the mean losses of both critiques, by the stock model's own loss with labels."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, template = AutoTokenizer.from_pretrained(folder), PromptTemplate(load_spec("mm_rlhf_reward").prompt, ())
    total = 0.0
    for row in rows:
        for name in ("chosen", "rejected"):
            asked = template.fill(question=row["prompt"].strip(), response=row[name])
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": row[f"{name}_reason"]}]
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
            start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            stop = int((ids == tokenizer.convert_tokens_to_ids("<|im_end|>")).nonzero()[-1]) + 1
            logits = model(input_ids=ids[None]).logits[0]
            total += float(F.cross_entropy(logits[start - 1 : stop - 1], ids[start:stop]))
    return total / len(rows)
