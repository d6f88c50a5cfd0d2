"""The tokens that a critic or judge learns to write: through templates whose turns end, or begin, in other ways."""

import pytest

from fastrm.data.record import Message, Response
from fastrm.data.template import ConversationEncoder, TurnLoss
from fastrm.errors import ConfigError, RecordError
from tests.helpers.chat_templates import tokenizer_with

_BODY = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}END{% endfor %}"
_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def _encoder(end: str, prompt: str = _PROMPT, **options) -> ConversationEncoder:
    return ConversationEncoder(tokenizer_with(_BODY.replace("END", end) + prompt), **options)


def _turn(encoder: ConversationEncoder, text: str = "yes it is") -> str:
    encoder.learn_turns(TurnLoss(per_token=True))
    encoded = encoder.encode(Response((Message("user", ("Is it?",)), Message("assistant", (text,)))))
    return encoder.tokenizer.decode(encoded.tokens[slice(*encoded.turn)])


@pytest.mark.parametrize("end", ["<|im_end|>\n", "<|im_end|>", "\n<|im_end|>\n", "<|im_end|>\n<|endoftext|>"])
def test_a_turn_ends_with_the_first_special_token_behind_its_text(end):
    assert _turn(_encoder(end)) == "yes it is" + end[: end.index("<|im_end|>")] + "<|im_end|>"


def test_a_text_that_stands_in_the_special_token_itself_ends_behind_it():
    assert _turn(_encoder("<|im_end|>\n"), "im") == "im<|im_end|>"


# The ways of two published templates with an answer's thinking: Qwen3's, which writes it in white space of its own, and
# that of DeepSeek-R1's distilled models, which leaves it out.
_THINKS = (
    "{% if '</think>' in m.content %}{% set parts = m.content.split('</think>') %}SAID"
    "{% else %}{{ m.content }}{% endif %}"
)
_SPACED = "<think>\n{{ parts[0].split('<think>')[-1].strip('\n') }}\n</think>\n\n{{ parts[-1].lstrip('\n') }}"
_DROPPED = "{{ parts[-1] }}"


def _thinking(said: str) -> ConversationEncoder:
    body = _BODY.replace("{{ m.content }}", _THINKS.replace("SAID", said)).replace("END", "<|im_end|>\n")
    return ConversationEncoder(tokenizer_with(body + _PROMPT))


@pytest.mark.parametrize("space", ["", "\n"])
def test_a_template_may_write_white_space_of_its_own_around_thinking(space):
    text = f"<think>{space}two{space}</think>{2 * space}<answer>2</answer>"
    assert _turn(_thinking(_SPACED), text) == "<think>\ntwo\n</think>\n\n<answer>2</answer><|im_end|>"


def test_a_text_of_which_the_template_leaves_something_out_is_refused_by_name():
    assert _turn(_thinking(_DROPPED), "<answer>2</answer>") == "<answer>2</answer><|im_end|>"
    with pytest.raises(RecordError, match=r'message 2, of role "assistant", has text, which .* only in part') as caught:
        _turn(_thinking(_DROPPED), "<think>two</think><answer>2</answer>")
    assert caught.value.code == "UNRENDERED_KEY"


@pytest.mark.parametrize(
    "end, prompt, options, said",
    [
        ("\n", _PROMPT, {}, "writes no special token behind a response"),
        ("<|im_end|>\n", _PROMPT.replace("{% endif %}", "<think>{% endif %}"), {}, "otherwise than"),
        (
            "<|im_end|>", _PROMPT, {"anchor": "before_padding", "pad_token_id": "<|im_end|>"},
            "takes the token that ends a response's turn for padding",
        ),
    ],
    ids=["no end", "begun thinking", "the end is padding"],
)  # fmt: skip
def test_templates_that_do_not_show_what_is_written_are_refused_before_rows_are_read(end, prompt, options, said):
    if "pad_token_id" in options:
        options = options | {"pad_token_id": tokenizer_with(_BODY).convert_tokens_to_ids(options["pad_token_id"])}
    encoder = _encoder(end, prompt, **options)
    with pytest.raises(ConfigError, match=f"{said}.*which a critic or judge has to learn"):
        encoder.learn_turns(TurnLoss(per_token=False))
