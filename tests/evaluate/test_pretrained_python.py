"""SmolLM2-135M-Instruct from Python: trained on a DataFrame, chosen with, evaluated on a Dataset, and given a card."""

import datasets
import pandas
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fastrm
from fastrm.share.card import make_card
from tests.helpers.smollm2 import needs_smollm2

PAIRS = [
    {"prompt": "Why does the moon shine?", "chosen": "It reflects the light of the sun.", "rejected": "It is cheese."},
    {"prompt": "How do I keep bread fresh?", "chosen": "Slice it and freeze it.", "rejected": "You cannot."},
    {"prompt": "Name a number above 2024.", "chosen": "2025", "rejected": "1999"},
]


@needs_smollm2
def test_real_weights_from_a_frame_to_a_card(smollm2_folder, tmp_path):
    config = {
        "run": {"dir": tmp_path / "run", "max_steps": 2, "device": "cpu"},
        "data": {"train": pandas.DataFrame(PAIRS), "eval": pandas.DataFrame(PAIRS), "num_workers": 0},
        "model": {"path": smollm2_folder, "freeze": ["language"], "head": {"layers": 1, "bias": False}},
        "precision": {"dtype": "fp32"},
    }
    run = fastrm.train(config, quiet=True)
    model = run.load(dtype="fp32", device="cpu")
    assert model.max_tokens == 8192 and run.metrics["steps"] == 2

    stock = AutoModelForSequenceClassification.from_pretrained(run.model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run.model_folder)
    chats = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
        for row in PAIRS
        for side in ("chosen", "rejected")
    ]
    with torch.no_grad():
        inputs = [tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True) for chat in chats]
        expected = torch.cat([stock(**one).logits[0] for one in inputs])
    tensors = model.score(datasets.Dataset.from_list(PAIRS), convert_to_tensor=True)
    assert torch.allclose(torch.cat(tensors), expected, atol=1e-4, rtol=0)
    assert torch.allclose(torch.tensor(model.get_scores(chats)), expected, atol=1e-4, rtol=0)

    right = int((expected[0::2] > expected[1::2]).sum())
    table = fastrm.evaluate(model, datasets.Dataset.from_list(PAIRS), quiet=True)
    assert table.accuracy == run.accuracy == right / 3
    best = model.best_of_n({"prompt": PAIRS[0]["prompt"], "responses": [PAIRS[0]["chosen"], PAIRS[0]["rejected"]]})
    assert best.index == int(expected[1] > expected[0])

    text = make_card("me/smol", run.model_folder, run.folder, "apache-2.0")
    assert ModelCard(text).data.pipeline_tag == "text-classification"
    assert "a local folder named SmolLM2-135M-Instruct" in text and f"| 3 | {right / 3:.4f} |" in text
