"""Messages recovered from rendered text: proved by rendering them again, or refused with the place."""

import pytest

from fastrm.data.sources.layouts.groups import group_record
from fastrm.data.template import ConversationEncoder
from fastrm.errors import RecordError
from fastrm.serve.rendered_text import RenderedTextReader
from tests.helpers.chat_templates import TEMPLATES, TRIMMED, tokenizer_with
from tests.helpers.support import make_image, make_model

IMAGE = make_image(56, 84).data
CONVERSATIONS = {
    "question": [("user", "Is this a cat?")],
    "system": [("system", "Be short."), ("user", "Why?\n\n")],
    "dialogue": [("user", "one"), ("assistant", "two\nlines"), ("user", " three")],
    "code": [("user", "print('<image>') # <<image>> <b>assistant</b>\n<think>")],
}


def plain(turns) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture(scope="module")
def encoders():
    models = {family: make_model(family).encoder for family in ("qwen2_5_vl", "qwen3_vl", "internvl")}
    return models | {name: ConversationEncoder(tokenizer_with(text)) for name, text in TEMPLATES.items()}


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "internvl", *TEMPLATES])
@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
@pytest.mark.parametrize("said", ["", "It is a red cat.", "<image>\n\n1 < 2 <<image>>"])
def test_recovered_messages_make_the_tokens_of_the_rendered_text(encoders, kind, turns, said):
    encoder = encoders[kind]
    text = encoder.tokenizer.apply_chat_template(plain([*turns, ("assistant", said)]), tokenize=False)
    found = RenderedTextReader(encoder).read(text)
    assert found.finished
    record = group_record(found.group, 0)
    stock = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encoder.encode(record.responses[0]).tokens.tolist() == stock


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "internvl"])
@pytest.mark.parametrize("is_expanded", [False, True], ids=["single", "expanded"])
def test_images_go_back_to_their_places(encoders, kind, is_expanded):
    encoder = encoders[kind]
    content = [{"type": "text", "text": "Look "}, {"type": "image"}, {"type": "image"}, {"type": "text", "text": "?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "two <image>"}]
    text = encoder.tokenizer.apply_chat_template(messages, tokenize=False)
    if is_expanded:
        text = text.replace("<|image_pad|>", "<|image_pad|>" * 6)
        text = text.replace("<IMG_CONTEXT>", "<img>" + "<IMG_CONTEXT>" * 6 + "</img>")
    other = make_image(84, 56, seed=1).data
    group = RenderedTextReader(encoder).read(text, [IMAGE, other]).group
    assert group["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Look "}, {"type": "image", "image": IMAGE}, {"type": "image", "image": other},
                {"type": "text", "text": "?"},
            ],
        }
    ]  # fmt: skip
    assert group_record(group, 0).responses[0].text == "two <image>"


@pytest.mark.parametrize("end, finished", [("<|im_end|>\n", True), ("<|im_end|>", True), ("", False)])
@pytest.mark.parametrize("padding", ["", "<|endoftext|>"])
def test_a_cut_response_is_told_from_a_finished_one(encoders, end, finished, padding):
    encoder = encoders["qwen2_5_vl"]
    prompt = encoder.tokenizer.apply_chat_template(
        plain([("user", "Is this a cat?")]), tokenize=False, add_generation_prompt=True
    )
    found = RenderedTextReader(encoder).read(prompt + "Yes, it" + end + padding)
    assert found.finished == (finished or padding != "")
    assert found.group["responses"] == ["Yes, it"]


def test_the_default_system_turn_and_none_are_the_same_group(encoders):
    encoder = encoders["qwen2_5_vl"]
    text = encoder.tokenizer.apply_chat_template(plain([("user", "a"), ("assistant", "b")]), tokenize=False)
    assert text.startswith("<|im_start|>system")
    assert RenderedTextReader(encoder).read(text).group == {"messages": plain([("user", "a")]), "responses": ["b"]}


def test_reasoning_of_qwen3_is_kept_where_the_template_writes_it_again(encoders):
    reader = RenderedTextReader(encoders["qwen3"])
    head = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    said = "<think>\nIt is so.\n</think>\n\nBecause."
    assert reader.read(head + said + "<|im_end|>\n").group["responses"] == [said]
    # This template writes empty reasoning in front of an answer without any, which the text does not hold.
    with pytest.raises(RecordError, match=r"writes '<think>.*near .*Because"):
        reader.read(head + "Because.<|im_end|>\n")


def test_white_space_that_the_template_trims_is_no_difference():
    encoder = ConversationEncoder(tokenizer_with(TRIMMED))
    text = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n Because.\n\n"
    group = RenderedTextReader(encoder).read(text).group
    assert encoder.rendered_text(group_record(group, 0).responses[0]) == text.replace(
        " Because.\n\n", "Because.<|im_end|>\n"
    )


def test_a_system_text_inside_the_turn_of_the_user_stays_there():
    merged = (
        "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.system = m.content + '\n\n' %}{% else %}<|im_start|>{{ m.role }}\n{{ ns.system }}{{ m.content }}"
        "<|im_end|>\n{% set ns.system = '' %}{% endif %}{% endfor %}"
    )
    encoder = ConversationEncoder(tokenizer_with(merged))
    turns = plain([("system", "Be short."), ("user", "Why?"), ("assistant", "no")])
    text = encoder.tokenizer.apply_chat_template(turns, tokenize=False)
    group = RenderedTextReader(encoder).read(text).group
    assert group["messages"] == plain([("user", "Be short.\n\nWhy?")])
    assert encoder.rendered_text(group_record(group, 0).responses[0]) == text


def test_the_token_that_begins_texts_may_be_missing(encoders):
    encoder = encoders["llama3.1"]
    text = encoder.tokenizer.apply_chat_template(plain([("user", "a"), ("assistant", "b")]), tokenize=False)
    reader = RenderedTextReader(encoder)
    assert reader.read(text.removeprefix("<|begin_of_text|>")) == reader.read(text)


def test_tokens_are_read_as_their_text(encoders):
    encoder = encoders["qwen2_5_vl"]
    reader = RenderedTextReader(encoder)
    text = encoder.tokenizer.apply_chat_template(plain([("user", "a cat"), ("assistant", "no")]), tokenize=False)
    tokens = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert reader.read_tokens(tokens) == reader.read(text)
    letters = [token for letter in "cat" for token in encoder.tokenizer(letter)["input_ids"]]
    with pytest.raises(RecordError, match="are not the tokens that"):
        reader.read_tokens([*tokens[:-2], *letters, *letters, *tokens[-2:]])
    with pytest.raises(RecordError, match="is no token of the model"):
        reader.read_tokens([10**9])


GOOD = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
BAD = {
    "another template": ("<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>", 2, "writes 'im_start|>"),
    "text in front": ("Hello " + GOOD + "<|im_start|>assistant\nb", 0, "writes '<|im_start|>"),
    "unknown role": (GOOD + "<|im_start|>judge\nb<|im_end|>\n<|im_start|>assistant\nb", len(GOOD) - 11, "<|im_end|>"),
    "end in a turn": (GOOD + "<|im_start|>assistant\nb<|im_end|>c", len(GOOD) + 23, "holds '<|im_end|>'"),
    "no answer": (GOOD.removesuffix("<|im_end|>\n"), len(GOOD) - 11, "ends with a turn of the user"),
    "image in an answer": (GOOD + "<|im_start|>assistant\n<|image_pad|>", len(GOOD) + 22, "holds '<|image_pad|>'"),
    "broken join": (GOOD + "<|im_start|>assistant \nb", len(GOOD) - 11, "holds '<|im_end|>'"),
}


@pytest.mark.parametrize("text, at, reason", BAD.values(), ids=BAD.keys())
def test_what_the_template_does_not_write_is_refused_with_the_place(encoders, text, at, reason):
    with pytest.raises(RecordError) as caught:
        RenderedTextReader(encoders["qwen2_5_vl"]).read(text, name="query[3]")
    assert caught.value.code == "RENDERED_TEXT"
    assert caught.value.message.startswith("query[3]: ")
    assert reason in caught.value.message and f"at character {at:,}," in caught.value.message


@pytest.mark.parametrize("num_places, num_images", [(1, 0), (0, 1), (2, 1)])
def test_images_and_placeholders_must_be_as_many(encoders, num_places, num_images):
    one = "<|vision_start|><|image_pad|><|vision_end|>"
    text = GOOD.replace("\na<", f"\n{one * num_places}a<") + "<|im_start|>assistant\nb"
    with pytest.raises(RecordError, match=f"has {num_places} image placeholders, and {num_images} images") as caught:
        RenderedTextReader(encoders["qwen2_5_vl"]).read(text, [IMAGE] * num_images)
    assert caught.value.code == "IMAGE_COUNT"


def test_a_template_without_special_tokens_between_turns_is_refused():
    words = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(RecordError, match="parts turns by plain text"):
        RenderedTextReader(ConversationEncoder(tokenizer_with(words))).read("user: a\nassistant: b\n")


def test_a_response_of_very_many_end_tokens_is_read_at_once(encoders):
    """A search from every one of them to the end would take hours."""
    reader, marks = RenderedTextReader(encoders["qwen2_5_vl"]), "<|im_end|>" * 200_000
    assert reader.response_text(marks + "x") == (marks + "x", False)
    assert reader.response_text("yes" + marks) == ("yes", True)
    assert reader.response_text(marks + "\n") == ("<|im_end|>" * 199_999, True)


@pytest.mark.parametrize(
    "end", ["", "<|im_end|>", "<|im_end|>\n", "<|im_end|>\n<|endoftext|>", "<|im_end|><|endoftext|><|endoftext|>"]
)
def test_the_tokens_that_end_a_turn_are_no_part_of_the_response(encoders, end):
    reader = RenderedTextReader(encoders["qwen2_5_vl"])
    for said in ("yes", "", "so\n", "a <|im_end|> b"):
        assert reader.response_text(said + end) == (said, end != "")
