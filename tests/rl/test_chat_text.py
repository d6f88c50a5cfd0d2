"""Rendered prompts become the messages that they were made of."""

import pytest

from fastrm.rl.chat_text import read_chat, read_response
from tests.helpers.support import make_tokenizer

LLAMA = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe short.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nSo?\n\nOr not?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


@pytest.mark.parametrize("layout", ["qwen", "internvl"])
def test_messages_come_back_from_a_template(layout):
    messages = [
        {"role": "system", "content": "Be\nshort."},
        {"role": "user", "content": [{"type": "text", "text": "First "}, {"type": "image"}, {"type": "image"},
                                     {"type": "text", "text": "so?\n"}]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And now?"},
    ]  # fmt: skip
    tokenizer = make_tokenizer(layout)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    # As trainers decode it: a run of tokens for each image.
    text = text.replace("<|image_pad|>", "<|image_pad|>" * 4).replace("<IMG_CONTEXT>", "<IMG_CONTEXT>" * 4)
    assert read_chat(text) == messages


def test_llama_and_texts_without_marks():
    assert read_chat(LLAMA) == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "So?\n\nOr not?"},
    ]
    assert read_chat("2 + 2?") == [{"role": "user", "content": "2 + 2?"}]


@pytest.mark.parametrize("text", ["4", " 4<|im_end|>\n", "4<|im_end|><|endoftext|>", "4<|eot_id|>"])
def test_marks_at_the_end_of_a_response_are_none_of_it(text):
    assert read_response(text) == "4"
