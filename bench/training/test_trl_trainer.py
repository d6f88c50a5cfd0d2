"""Benchmark of fastrm's training step against TRL's RewardTrainer, on text pairs and a small Qwen2."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest

from bench import DATA
from bench.training.comparison import ROUNDS, compare
from bench.training.trl_step import TrlStep
from bench.training.workloads import TEXT, VOCABULARY, FastrmStep, random_network, train_config
from fastrm.config import HeadConfig
from fastrm.data.group import encode_group
from fastrm.data.packing import EncodedGroup
from fastrm.data.quarantine import Quarantine
from fastrm.data.record import Message, Preference, Record, Response
from fastrm.data.sources import read_source
from fastrm.data.template import ConversationEncoder
from fastrm.data.tokenizer import train_tokenizer

MAX_TOKENS = 1024  # TRL's default max_length; longer pairs are left out for both


def chat_records() -> list[Record]:
    """Read LLaMA-Factory's English DPO demo: long, often with several turns before the responses."""
    return list(read_source(DATA / "llamafactory_dpo_demo" / "dpo_en_demo.json", quarantine=Quarantine(None)))


def instruction_records() -> list[Record]:
    """Read PandaLM's test set: one short instruction, two short responses; pairs with a majority verdict."""
    records = []
    for row in json.loads((DATA / "pandalm" / "testset-v1.json").read_text(encoding="utf-8")):
        votes = [row[f"annotator{n}"] for n in (1, 2, 3)]
        verdict = next((choice for choice in (1, 2) if votes.count(choice) >= 2), None)
        texts = row["response1"], row["response2"]
        if verdict is not None and all(isinstance(text, str) and text for text in texts):
            prompt = "\n".join(part for part in (row["instruction"], row["input"]) if part)
            records.append(_record(f"pandalm {row['idx']}", prompt, texts if verdict == 1 else texts[::-1]))
    return records


def synthetic_records(prompt_words: tuple[int, int], response_words: tuple[int, int], count: int = 128) -> list[Record]:
    """Return random words with log-normal lengths, (median, 90th percentile), for machines without the data."""
    rng = np.random.default_rng(0)
    vocabulary = [f"word{n}" for n in range(1000)]

    def text(words):
        median, high = words
        return " ".join(rng.choice(vocabulary, 1 + int(median * (high / median) ** (rng.standard_normal() / 1.28))))

    return [
        _record(f"synthetic {n}", text(prompt_words), (text(response_words), text(response_words)))
        for n in range(count)
    ]


def _record(name: str, prompt: str, responses: tuple[str, str]) -> Record:
    """Return a record of two responses, of which the first is preferred."""
    question = Message("user", (prompt,))
    conversations = tuple(Response((question, Message("assistant", (text,)))) for text in responses)
    return Record(name, conversations, (Preference(0, 1),), "bench", name)


@dataclass(frozen=True)
class Workload:
    """The source of the pairs, its replacement where the data is absent, and the floor."""

    read: Callable[[], list[Record]]
    prompt_words: tuple[int, int]
    response_words: tuple[int, int]
    pairs_per_step: int
    floor: float

    def records(self) -> list[Record]:
        return self.read() if DATA.is_dir() else synthetic_records(self.prompt_words, self.response_words)


# Floors against measured ratios (CPU seconds, one thread): 3.0 and 2.5.
WORKLOADS = {
    "llamafactory-dpo": Workload(chat_records, (120, 600), (180, 350), pairs_per_step=4, floor=1.8),
    "pandalm": Workload(instruction_records, (30, 60), (30, 100), pairs_per_step=16, floor=1.5),
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_training_step_beats_trl(name, tmp_path, benchmark, comparisons):
    pytest.importorskip("trl")
    workload = WORKLOADS[name]
    records = workload.records()
    conversations = (response.messages for record in records for response in record.responses)
    encoder = ConversationEncoder(train_tokenizer(conversations, VOCABULARY))
    size = workload.pairs_per_step
    chosen, groups = zip(*islice(_fitting(records, encoder), size * (ROUNDS + 1)), strict=True)
    network = random_network(_text_config(encoder.tokenizer), HeadConfig(layers=1, bias=False), encoder)
    batches = [groups[first : first + size] for first in range(0, len(groups), size)]
    fastrm = FastrmStep.of_groups(network, batches, {})
    records = [chosen[first : first + size] for first in range(0, len(chosen), size)]
    trl = TrlStep(network, records, train_config("qwen2").optim, tmp_path)
    label = name if DATA.is_dir() else f"{name} (synthetic)"
    comparisons.add(compare(label, fastrm, trl, size, workload.floor, benchmark), benchmark)


def _text_config(tokenizer):
    from transformers import Qwen2Config

    return Qwen2Config(**{**TEXT, "vocab_size": len(tokenizer)}, pad_token_id=tokenizer.pad_token_id)


def _fitting(records: list[Record], encoder: ConversationEncoder) -> Iterator[tuple[Record, EncodedGroup]]:
    """Yield (record, encoded group) of the records that TRL's length filter would keep."""
    for record in records:
        group = encode_group(record, encoder)
        if all(len(response.tokens) <= MAX_TOKENS for response in group.responses):
            yield record, group
