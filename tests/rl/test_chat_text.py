"""Rendered prompts become the messages that they were made of."""

import pytest

from fastrm.errors import RecordError
from fastrm.rl.chat_text import read_chat, read_response
from fastrm.rl.rewards import Rewards
from fastrm.rl.samples import Sample, group_samples
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


# What Llama 3.1 Instruct's template writes for a user's turn, without and with a system's text.
DATED = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n{}<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nSo?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)


def test_dates_that_llama_writes_are_none_of_the_system_s_text():
    user = {"role": "user", "content": "So?"}
    assert read_chat(DATED.format("")) == [user]
    assert read_chat(DATED.format("Be short.")) == [{"role": "system", "content": "Be short."}, user]


CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "text, said",
    [
        ("<bos><start_of_turn>user\nSo?<end_of_turn>\n<start_of_turn>model\n", "holds '<start_of_turn>'"),
        ("<s>[INST] So? [/INST]", r"holds '\[INST\]'"),
        ("A chat. USER: So? ASSISTANT: Yes.</s>USER: Why? ASSISTANT:", "holds '</s>'"),
        ("<\uff5cbegin▁of▁sentence\uff5c><\uff5cUser\uff5c>So?<\uff5cAssistant\uff5c>", "holds '<\uff5cUser\uff5c>'"),
        ("<|user|>\nSo?<|end|>\n<|assistant|>\n", r"holds '<\|user\|>'"),
        ("<bos><|turn>user\nSo?<turn|>\n<|turn>model\n", r"holds '<\|turn>'"),
        (CHATML.format("<|vision_start|><|video_pad|><|vision_end|>So?"), r"holds '<\|vision_start\|>'"),
        ("Be short." + CHATML.format("So?"), "words before its first turn, near 'Be short.'"),
        (CHATML.format("So?<|im_end|>\nOr not?"), "words between two turns, near '\\\\nOr not"),
        ("<|im_start|>user\nSo?", r"a turn without <\|im_end\|>"),
        (CHATML.format("So?") + "The answer is", "begins the response"),
    ],
    ids=["gemma", "mistral", "vicuna", "deepseek", "phi", "gemma4", "video", "head", "between", "cut", "begun"],
)
def test_marks_that_are_not_known_are_refused(text, said):
    with pytest.raises(RecordError, match=said) as refused:
        read_chat(text)
    assert refused.value.code == "RENDERED_TEXT"


def test_a_prompt_in_text_is_read_whatever_trainer_it_comes_from():
    unknown = "<s>[INST] So? [/INST]"
    messages = [{"role": "user", "content": "So?"}]
    found = group_samples([Sample(CHATML.format("So?"), "a"), Sample(messages, "b"), Sample(unknown, "c")])
    assert found.groups == [{"messages": messages, "responses": ["a", "b"]}]
    assert [(number, error.code) for number, error in found.errors.items()] == [(2, "RENDERED_TEXT")]
    assert Rewards(scheme="rule")([Sample(unknown, "4", truth="4")]) == [1.0]  # which needs no prompt


def test_what_is_no_mark_is_read():
    messages = [{"role": "user", "content": "Is <s>a < b</s> [INST]?"}]
    assert read_chat(CHATML.format(messages[0]["content"])) == messages
    assert read_chat("<s>" + CHATML.format(messages[0]["content"]) + "<think>\n") == messages
    assert read_chat("<|begin_of_text|>2 + 2?") == [{"role": "user", "content": "2 + 2?"}]
    ended = CHATML.format("So?") + "Yes.<|im_end|>\n"
    assert read_chat(ended)[1:] == [{"role": "assistant", "content": "Yes."}]


ENDED = [
    "4", " 4<|im_end|>\n", "4<|im_end|><|endoftext|>", "4<|eot_id|>", "4</s>", "4<end_of_turn>\n", "4<|eom_id|>",
    "4<\uff5cend▁of▁sentence\uff5c>",
]  # fmt: skip


@pytest.mark.parametrize("text", ENDED)
def test_marks_at_the_end_of_a_response_are_none_of_it(text):
    assert read_response(text) == "4"
