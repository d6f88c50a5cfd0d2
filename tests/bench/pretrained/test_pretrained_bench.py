"""The comparison of bench/pretrained/run_pretrained.py, on a tiny model in place of the pretrained one."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.pretrained import run_pretrained, tables
from bench.pretrained.batches import WORKLOADS
from bench.pretrained.preferences import DATA, answer_pairs, caption_pairs, split
from fastrm.data.record import Message
from fastrm.data.tokenizer import train_tokenizer

pytest.importorskip("trl")
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="needs the folder shared/data beside the project")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A random Llama whose rewards differ, with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("model")
    texts = [row["prompt"] + "\n" + row["chosen"] for row in answer_pairs()]
    tokenizer = train_tokenizer([[Message("user", (text,))] for text in texts], 1024)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def report(tiny_model, tmp_path_factory):
    """Two workloads of groups: several pairs of one instruction, and all pairs of a list."""
    out = tmp_path_factory.mktemp("results")
    for name in ("answers", "lists of 8"):
        file = run_pretrained.measure(tiny_model, name, out)
    return json.loads(file.read_text())


def test_all_trainers_end_at_the_same_rewards(report):
    for name, entry in report["workloads"].items():
        assert entry["reward_difference"] < 1e-3
        assert len({variant["accuracy"] for variant in entry["variants"].values()}) == 1
        assert entry["held_out_pairs"] == WORKLOADS[name].held_out_pairs


def test_tokens_and_flops_are_those_of_trees_and_of_padded_pairs(report):
    for entry in report["workloads"].values():
        assert entry["variants"]["fastrm"]["tokens"] == entry["tree_tokens"] < entry["pairwise_tokens"]
        assert entry["variants"]["trl"]["tokens"] == entry["variants"]["plain"]["tokens"] >= entry["pairwise_tokens"]
    groups = report["workloads"]["lists of 8"]
    assert groups["num_pairs"] == 28 and groups["pairwise_tokens"] > 7 * groups["tree_tokens"]


def test_the_tables_replace_what_stands_between_their_marks(report):
    part, lines = tables.COMPARISON, tables.comparison_lines([report])
    made = part.replaced(f"before {part.begin} old {part.end} after", lines)
    assert made.startswith("before ") and made.endswith(" after") and " old " not in made
    assert part.replaced(made, lines) == made
    entry = report["workloads"]["lists of 8"]
    trl, ours = (entry["variants"][name]["seconds"] for name in ("trl", "fastrm"))
    assert f"| lists of 8 | 28 | TRL | {trl:.2f} |" in made and f"| {trl / ours:.2f}x |" in made


@pytest.mark.parametrize("name", WORKLOADS)
def test_no_conversation_is_held_out_and_trained_on(name):
    train, held_out = (
        {(record.prompt_key, response.text) for record in half for response in record.responses}
        for half in WORKLOADS[name].read()
    )
    assert train and held_out and not train & held_out


def test_pairs_are_divided_by_prompt_and_the_longer_caption_wins_half_of_them():
    for rows in (list(caption_pairs()), list(answer_pairs())):
        train, held_out = split(iter(rows))
        assert len(train) + len(held_out) == len(rows)
        assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    captions = list(caption_pairs())
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in captions)
    assert longer + sum(len(row["chosen"]) == len(row["rejected"]) for row in captions) / 2 == len(captions) / 2
