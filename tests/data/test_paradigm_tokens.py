"""The tokens that critics and judges learn to write: their texts whole, as chat templates render them."""

import json

import pytest

from fastrm.config import load_config
from fastrm.data.paradigm import TextReading, reading_of
from fastrm.data.prepared.units import open_source
from fastrm.data.record import Message, Preference, Record, Response
from fastrm.data.sources import RefusedRow
from fastrm.data.template import ConversationEncoder, TurnLoss
from fastrm.data.tokenizer import load_tokenizer
from fastrm.prompts.spec import load_spec, shipped_names
from tests.helpers.chat_templates import LLAMA3_1, QWEN2_5, QWEN3, tokenizer_with
from tests.helpers.rows import needs_data
from tests.helpers.smollm2 import needs_smollm2
from tests.helpers.source_rows import SHARED

PAIRWISE = [name for name in shipped_names() if load_spec(name).kind == "pairwise"]


def encoder_of(tokenizer) -> ConversationEncoder:
    encoder = ConversationEncoder(tokenizer)
    encoder.turns = TurnLoss(True)
    return encoder


def written(encoder, response) -> str:
    """The text of a conversation that a model learns to write."""
    encoded = encoder.encode(response)
    return encoder.tokenizer.decode(encoded.tokens[slice(*encoded.turn)])


def pair() -> Record:
    prompt = Message("user", ("Is 2 even?",))
    said = (("yes", "2 is 2 times 1."), ("no", "2 is even."))
    responses = tuple(Response((prompt, Message("assistant", (text,))), critique=why) for text, why in said)
    return Record("1", responses, (Preference(0, 1),), "source", "rows:1")


@pytest.mark.parametrize("name", PAIRWISE)
@pytest.mark.parametrize("template", [QWEN2_5, QWEN3, LLAMA3_1], ids=["qwen2.5", "qwen3", "llama3.1"])
def test_a_verdict_is_read_from_the_tokens_that_a_judge_learns(template, name):
    """Qwen3's template renders <think> tags by rules of its own."""
    spec, encoder = load_spec(name), encoder_of(tokenizer_with(template))
    record = TextReading("judge", spec.prompt, spec.system, spec.parser, order="both").convert(pair())
    texts = [written(encoder, response) for response in record.responses]
    assert [spec.parse(text).value for text in texts] == [1, 2]
    assert all("2 is 2 times 1." in text and "2 is even." in text for text in texts)


@needs_data
@needs_smollm2
@pytest.mark.parametrize("paradigm", ["critic", "judge"])
def test_critiques_that_others_wrote_are_what_a_pretrained_model_learns_to_write(paradigm, smollm2_folder):
    path = SHARED / "reward_benches" / "mm_reward_bench.jsonl"
    source = {"path": str(path), "ignore": ["image", "video"]}  # the media are not there
    config = {"run": {"dir": "runs/x"}, "model": {"path": str(smollm2_folder)}, "data": {"train": [source]}}
    config = load_config({**config, "paradigm": paradigm})
    (file,) = open_source(config.data.train[0], reading_of(config))
    records = [record for record in file.read() if not isinstance(record, RefusedRow)]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    encoder = encoder_of(load_tokenizer(str(smollm2_folder)))
    assert len(records) == len(rows) == 170
    for row, record in zip(rows, records, strict=True):
        texts = [written(encoder, response) for response in record.responses]
        critiques = [row["chosen_reason"], row["rejected_reason"]]
        if paradigm == "critic":
            assert texts == [f"{critique}<|im_end|>" for critique in critiques]
        else:
            assert len(texts) == 1
            assert all(critique.strip() in texts[0] for critique in critiques)
            assert load_spec("r1_reward").parse(texts[0]) is not None
