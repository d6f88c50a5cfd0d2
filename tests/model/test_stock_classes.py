"""Exports in the stock classes that config.json and the documentation name: their rewards are ours, or they refuse."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForSequenceClassification, AutoTokenizer

from fastrm.config import HeadConfig
from fastrm.data.record import Message, Response
from fastrm.data.template import ConversationEncoder
from fastrm.model.export import load_model, save_model
from fastrm.model.families import TEXT_FAMILIES
from fastrm.model.stock_classes import padding_note, read_by_stock
from tests.helpers.stock import stock_inputs
from tests.helpers.support import FAMILIES, make_image, make_model, make_record, make_tokenizer, pack_of

LINEAR = HeadConfig(layers=1, bias=False)
TEXT = sorted(TEXT_FAMILIES)
# As Llama 3 closes a turn: its end token is the last of a conversation, and what most people pad with.
CLOSED = "{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
TURNED = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OPEN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
TEMPLATES = {"closed": CLOSED, "turned": TURNED, "open": OPEN}
PADS = {"the end of a turn": "<|im_end|>", "another": "<|endoftext|>", "none": None}


def records_of(family):
    if family in TEXT:
        return [make_record(seed, num_responses=3) for seed in range(2)]
    return [make_record(1, images=(make_image(90, 120), make_image(60, 60, seed=1))), make_record(2)]


@torch.no_grad()
def ours(network, records):
    return network(pack_of(network, records))


@torch.no_grad()
def rewards_from(backbone, folder, network, records):
    """Rewards (R,) of a stock backbone's last states and the head in the files, written out."""
    state = load_file(folder / "model.safetensors")
    rewards = []
    for record in records:
        for response in record.responses:
            hidden = backbone(**stock_inputs(network.encoder, response), use_cache=False).last_hidden_state[0, -1]
            for number in ("0", "2"):
                weight, bias = state.get(f"score.{number}.weight"), state.get(f"score.{number}.bias")
                if weight is not None:
                    hidden = hidden if number == "0" else torch.nn.functional.silu(hidden)
                    hidden = torch.nn.functional.linear(hidden, weight, bias)
            rewards.append(hidden.squeeze(-1))
    return torch.stack(rewards)


@pytest.mark.parametrize("head", [HeadConfig(), HeadConfig(layers=1)], ids=["two layers", "linear with bias"])
@pytest.mark.parametrize("family", FAMILIES)
def test_automodel_loads_every_weight_of_the_backbone_and_gives_our_rewards(family, head, tmp_path):
    network, records = make_model(family, head=head), records_of(family)
    save_model(network, tmp_path)
    kinds = [AutoModel] if family in TEXT else [AutoModel, AutoModelForImageTextToText]
    for kind in kinds:
        stock, report = kind.from_pretrained(tmp_path, output_loading_info=True)
        # What docs/exports.md says: the class without a head names ours, that for texts has an LM head besides.
        assert set(report["missing_keys"]) <= ({"lm_head.weight"} if kind is AutoModelForImageTextToText else set())
        layers = (0,) if head.layers == 1 else (0, 2)
        heads = {f"score.{number}.{part}" for number in layers for part in ("weight", "bias")}
        assert set(report["unexpected_keys"]) == heads | {"score.weight"}
        backbone = stock.eval() if kind is AutoModel else stock.eval().model
        found = rewards_from(backbone, tmp_path, network, records)
        assert (found - ours(network, records)).abs().max() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_architectures_names_a_class_that_loads_the_export(family, tmp_path):
    import transformers

    save_model(make_model(family, head=LINEAR), tmp_path)
    (name,) = json.loads((tmp_path / "config.json").read_text())["architectures"]
    assert name.endswith("ForSequenceClassification") == (family in TEXT)
    _, report = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert set(report["unexpected_keys"]) == (set() if family in TEXT else {"score.weight"})


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
def test_exports_with_the_names_of_before_are_read(family, tmp_path):
    network = make_model(family, head=HeadConfig(layers=1))
    save_model(network, tmp_path)
    save_file(network.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["fastrm"]["format"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = load_model(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in network.state_dict().items())


def text_network(template, pad, *, family="llama", head=LINEAR, anchor="last_token"):
    network, tokenizer = make_model(family, head=head), make_tokenizer()
    tokenizer.chat_template, tokenizer.pad_token = TEMPLATES[template], PADS[pad]
    network.encoder = ConversationEncoder(tokenizer, None, anchor=anchor)
    network.model.config.pad_token_id = tokenizer.pad_token_id
    return network


def texts_of(folder, records):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    conversations = [
        [{"role": message.role, "content": message.text} for message in response.messages]
        for record in records
        for response in record.responses
    ]
    return tokenizer, [tokenizer.apply_chat_template(turns, tokenize=False) for turns in conversations]


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_stock_classifier_gives_our_rewards_however_it_pads(template, pad, tmp_path):
    network, records = text_network(template, pad), records_of("llama")
    wanted = ours(network, records)
    save_model(network, tmp_path)
    stock, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokenizer, texts = texts_of(tmp_path, records)
    batches = [tokenizer([text], return_tensors="pt", add_special_tokens=False) for text in texts]
    alone = torch.cat([stock.eval()(**batch).logits.detach() for batch in batches]).squeeze(-1)
    assert (alone - wanted).abs().max() <= 1e-5
    for side in ("left", "right"):
        batch = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt", add_special_tokens=False)
        assert not batch["attention_mask"].all()
        assert (stock(**batch).logits.detach().squeeze(-1) - wanted).abs().max() <= 1e-5
    assert network.encoder.tokenizer.pad_token == PADS[pad], "the network's own tokenizer has changed"


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_other_families_pad_alike(family, tmp_path):
    network, records = text_network("closed", "the end of a turn", family=family), records_of(family)
    save_model(network, tmp_path)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer, texts = texts_of(tmp_path, records)
    batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    assert (stock(**batch).logits.detach().squeeze(-1) - ours(network, records)).abs().max() <= 1e-5


MISREAD = {
    "bias": ({"head": HeadConfig(layers=1)}, "the head has a bias"),
    "two layers": ({"head": HeadConfig(bias=False)}, "the head has 2 layers"),
    "anchor": ({"anchor": "end_of_turn", "template": "turned"}, "model.anchor is end_of_turn"),
}


@pytest.mark.parametrize("labels", [{}, {"num_labels": 1}], ids=["as saved", "one label asked for"])
@pytest.mark.parametrize("case", MISREAD)
def test_what_the_stock_classifier_would_misread_does_not_load_in_it(case, labels, tmp_path):
    options, why = MISREAD[case]
    network = text_network(**{"template": "closed", "pad": "another", **options})
    assert read_by_stock(network).why.startswith(why)
    save_model(network, tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, **labels)
    again = load_model(tmp_path)
    records = records_of("llama")
    assert torch.equal(ours(again, records), ours(network, records))


def test_an_end_of_turn_that_is_the_last_token_is_read_by_the_stock_classifier(tmp_path):
    network = text_network("closed", "the end of a turn", anchor="end_of_turn")
    assert read_by_stock(network).classifies
    save_model(network, tmp_path)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer, texts = texts_of(tmp_path, records_of("llama"))
    batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    assert (stock(**batch).logits.detach().squeeze(-1) - ours(network, records_of("llama"))).abs().max() <= 1e-5


class TestPadToken:
    def test_one_without_a_row_in_the_embeddings_is_replaced(self):
        network = text_network("turned", "another")
        network.encoder.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        network.encoder = ConversationEncoder(network.encoder.tokenizer, None)
        assert read_by_stock(network).pad_token == "<|endoftext|>"

    def test_where_no_token_is_free_the_stock_classifier_is_kept_out(self, tmp_path):
        network = text_network("closed", "the end of a turn")
        # All but the turn's own tokens stand in the template.
        others = "".join(token for token in network.encoder.special_ids if token not in ("<|im_start|>", "<|im_end|>"))
        network.encoder.tokenizer.chat_template = others + CLOSED
        reading = read_by_stock(network)
        assert not reading.classifies and "none can pad" in reading.why
        save_model(network, tmp_path)
        with pytest.raises(RuntimeError, match="mismatch"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)

    def test_it_is_not_one_that_stands_for_images(self):
        network = make_model("qwen2_5_vl", head=LINEAR)
        network.encoder.tokenizer.pad_token = None
        assert read_by_stock(network).pad_token == "<|endoftext|>"

    def test_typed_in_a_response_it_is_text(self):
        network = text_network("open", "another")
        typed = Response((Message("user", ("Hi",)), Message("assistant", ("It is <|endoftext|>, I think",))))
        pad_id = network.encoder.tokenizer.pad_token_id
        assert pad_id not in network.encoder.encode(typed).tokens.tolist()

    @pytest.mark.parametrize(
        ("pad", "why"),
        [("the end of a turn", "padded with <|im_end|>, with which conversations end"), ("none", "had no pad token")],
    )
    def test_another_one_is_said(self, pad, why):
        note = padding_note(text_network("closed", pad))
        assert note.startswith("export: its tokenizer and config.json pad with <|endoftext|>") and note.endswith(why)

    def test_its_own_needs_no_word(self):
        assert padding_note(text_network("turned", "the end of a turn")) is None
