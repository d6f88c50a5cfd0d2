"""Conversations to tokens and positions: as the stock template, tokeniser and model do it."""

import numpy as np
import pytest
import torch
from tokenizers import AddedToken

from fastrm.data.record import ImageRef, Message, Response
from fastrm.data.template import ConversationEncoder
from fastrm.data.tokenizer import SPECIAL_TOKENS, load_tokenizer
from fastrm.errors import ConfigError, RecordError
from tests.helpers import stock
from tests.helpers.support import make_image, make_model, make_tokenizer

ODD_TEXTS = [
    "plain words",
    "  leading and trailing  ",
    "\n\nnew lines first\n",
    "tabs\tand\r\nwindows lines\r\n",
    "emoji 👩‍👩‍👧 and e\u0301 accents, \u200bzero width, 中文字符 and العربية",
    "numbers 1234567890 and code: if (a<b) { return `x`; }",
    "<b>tags</b> <|not_special|> <| im_end |> |>",
    "{{ jinja }} {% raw %} {# comment #}",
    "\ue000 private use \ue001",
]


@pytest.fixture(scope="module")
def vision():
    return make_model("qwen2_5_vl").encoder


def positions_of(encoded) -> torch.Tensor:
    if encoded.positions is None:
        return torch.arange(len(encoded.tokens)).expand(3, -1)
    return torch.from_numpy(encoded.positions)


def conversation(*texts, images=()):
    turns = [Message("user" if n % 2 == 0 else "assistant", (text,)) for n, text in enumerate(texts)]
    return Response((Message("user", (*images, texts[0])), *turns[1:]))


@pytest.mark.parametrize("text", ODD_TEXTS, ids=range(len(ODD_TEXTS)))
def test_tokens_equal_the_stock_tokens(vision, text):
    for response in (
        conversation(text, "yes"),
        conversation("why?", text),
        conversation(text, text, text, text),
        conversation(text, text, images=[make_image(56, 84)]),
        Response((Message("system", (text,)), Message("user", ("a",)), Message("assistant", (text,)))),
    ):
        expected = stock.stock_inputs(vision, response)["input_ids"][0].tolist()
        assert vision.encode(response).tokens.tolist() == expected


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
def test_special_tokens_typed_in_text_stay_text(vision, special):
    # Text behind the tokens: a response that ends in what ends its turn is refused.
    response = f"{special}{special} twice"
    encoded = vision.encode(conversation(f"before {special} after", response, images=[make_image(56, 56)]))
    plain = vision.encode(conversation("before after", "x", images=[make_image(56, 56)]))
    number = vision.special_ids[special]
    assert (encoded.tokens == number).sum() == (plain.tokens == number).sum()
    assert special in vision.tokenizer.decode(encoded.tokens[encoded.tokens != number])


def test_special_tokens_split_over_parts_and_messages_stay_text(vision):
    image = make_image(56, 56)
    split = Response(
        (
            Message("user", (image, "<|image_", "pad|> <|im_")),
            Message("assistant", ("end|> <|vision_start|><|image_pad|>",)),
        )
    )
    encoded = vision.encode(split)
    assert (encoded.tokens == vision.vision.placeholders[ImageRef]).sum() == 4
    assert (encoded.tokens == vision.special_ids["<|im_end|>"]).sum() == 3  # system, user, assistant


def test_all_breakers_used_is_refused_not_mangled(vision):
    everything = "".join(map(chr, range(0xE000, 0xE010)))
    with pytest.raises(RecordError, match=r"U\+E000 to U\+E00F"):
        vision.encode(conversation(everything, "yes"))


def test_the_anchor_is_the_last_token_or_the_end_of_the_turn():
    tokenizer = make_tokenizer()
    last = ConversationEncoder(tokenizer).encode(conversation("a", "b")).tokens
    end = ConversationEncoder(tokenizer, anchor="end_of_turn").encode(conversation("a", "b")).tokens
    assert tokenizer.decode(last[-2:]) == "<|im_end|>\n"
    assert end.tolist() == last[:-1].tolist()


def test_response_length_is_that_of_its_own_text(vision):
    assert vision.encode(conversation("a", "b c d")).num_response_tokens == len(
        vision.tokenizer("b c d", add_special_tokens=False)["input_ids"]
    )


def test_image_tokens_follow_the_stock_grid(vision):
    rng = np.random.default_rng(0)
    for seed in range(20):
        width, height = rng.integers(20, 400, 2)
        image = make_image(int(width), int(height), seed)
        encoded = vision.encode(conversation("what?", "this", images=[image]))
        grid = stock.stock_inputs(vision, conversation("what?", "this", images=[image]))["image_grid_thw"][0]
        assert [1, encoded.media[0].size.height * 2, encoded.media[0].size.width * 2] == grid.tolist()
        assert (encoded.tokens == vision.vision.placeholders[ImageRef]).sum() == encoded.media[0].num_tokens


def test_positions_equal_the_stock_models():
    network = make_model("qwen2_5_vl")
    rng = np.random.default_rng(0)
    for seed in range(20):
        images = [make_image(int(w), int(h), n) for n, (w, h) in enumerate(rng.integers(28, 250, (seed % 4, 2)))]
        parts = [part for image in images for part in (image, f"and {seed}")]
        response = Response((Message("user", (*parts, "so?")), Message("assistant", ("well",))))
        inputs = stock.stock_inputs(network.encoder, response)
        expected, _ = network.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=inputs.get("image_grid_thw")
        )
        encoded = network.encoder.encode(response)
        assert torch.equal(positions_of(encoded), expected[:, 0])


def test_an_image_for_a_text_model_is_refused():
    with pytest.raises(RecordError, match="the model reads text only"):
        make_model("qwen2").encoder.encode(conversation("a", "b", images=[make_image(56, 56)]))


def test_sizes_of_no_more_than_the_latest_images_are_remembered(vision, monkeypatch):
    from fastrm.data import template

    monkeypatch.setattr(template, "REMEMBERED_SIZES", 2)
    vision = vision.looking_anew()
    images = [make_image(56, 56 * side) for side in (1, 2, 3)]
    for image in [*images, *images]:
        assert vision.measure(image) == vision.vision.measure(image, vision.limits)
    assert [vision._sizes.get(image.key) is None for image in images] == [True, False, False]


def test_extreme_aspect_ratios_are_named(vision):
    with pytest.raises(RecordError, match="is 4000 x 10; the model accepts ratios up to 200") as caught:
        vision.encode(conversation("a", "b", images=[make_image(4000, 10)]))
    assert caught.value.code == "IMAGE_ASPECT"


def test_a_tokenizer_that_cannot_be_cut_at_special_tokens_is_refused():
    tokenizer = make_tokenizer()
    # Such a token swallows the white space behind it, which a cut at the token would keep.
    tokenizer.add_tokens([AddedToken("<|im_end|>", rstrip=True, special=True)], special_tokens=True)
    with pytest.raises(ConfigError, match="would not be exact"):
        ConversationEncoder(tokenizer)


def test_training_a_tokenizer_is_deterministic_and_survives_saving(tmp_path):
    first, second = make_tokenizer(), make_tokenizer()
    assert first.get_vocab() == second.get_vocab()
    first.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    text = "<|im_start|>user\nthe cat 123 é<|im_end|>\n"
    assert loaded(text)["input_ids"] == first(text)["input_ids"]
    assert loaded.chat_template == first.chat_template


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"model.tokenizer .* cannot be loaded"):
        load_tokenizer(str(tmp_path / "none"))


def test_a_tokenizer_of_another_shape_is_named(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"transformers cannot read its files .* copy tokenizer.json"):
        load_tokenizer(str(tmp_path))


def test_several_chat_templates_without_a_default_are_named(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"rag": tokenizer.chat_template, "tool_use": tokenizer.chat_template}
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has the chat templates rag, tool_use, and none is the default"):
        load_tokenizer(str(tmp_path))
