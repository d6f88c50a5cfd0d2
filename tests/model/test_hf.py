"""Exports in the classes of `fastrm.hf`, by transformers' Auto classes: their rewards are ours in padded batches."""

import importlib
import io
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, Qwen2ForSequenceClassification

from fastrm import RewardModel
from fastrm.config import HeadConfig
from fastrm.data.record import ImageRef
from fastrm.data.template import ConversationEncoder
from fastrm.errors import ConfigError, StorageError
from fastrm.limits import MediaLimits
from fastrm.model.export import load_model, make_encoder, save_model
from fastrm.model.families import VISION_FAMILIES
from fastrm.model.loading import load_backbone
from fastrm.model.network import RewardNetwork
from fastrm.model.vllm_classes import read_by_vllm
from tests.helpers.smollm2 import needs_smollm2
from tests.helpers.stock import stock_inputs
from tests.helpers.support import FAMILIES, make_image, make_model, make_record

HEADS = {
    "one layer": HeadConfig(layers=1, bias=False),
    "one layer with bias": HeadConfig(layers=1),
    "two layers": HeadConfig(),
    "three layers of tanh": HeadConfig(layers=3, activation="tanh", bias=False),
}
# Two images, none, and one in a batch; of different sizes.
IMAGES = ((make_image(90, 120), make_image(60, 60, seed=1)), (), (make_image(84, 56, seed=2),))


@pytest.fixture(autouse=True)
def hf():
    """The module, imported for each test anew (`stock_auto_classes` of conftest.py)."""
    return importlib.import_module("fastrm.hf")


def records_of(family):
    is_vision = family in VISION_FAMILIES
    return [make_record(seed, images=images if is_vision else ()) for seed, images in enumerate(IMAGES)]


def our_rewards(network, records) -> torch.Tensor:
    """Rewards (R,) of `RewardModel.score`, from the records' texts and images as a user has them."""
    groups = []
    for record in records:
        question = record.responses[0].messages[0]
        images = [Image.open(io.BytesIO(part.data)) for part in question.parts if isinstance(part, ImageRef)]
        text = "".join(part for part in question.parts if isinstance(part, str))
        groups.append({"prompt": text, "images": images, "responses": [answer.text for answer in record.responses]})
    return torch.tensor([reward for group in RewardModel(network).score(groups) for reward in group])


def batch_of(network, records, side, pad_id=0) -> dict:
    """One padded batch of all conversations, from the stock template, tokenizer and image processor."""
    parts = [stock_inputs(network.encoder, response) for record in records for response in record.responses]
    longest = max(part["input_ids"].shape[1] for part in parts)
    rows = {"input_ids": [], "attention_mask": []}
    for part in parts:
        ids = part["input_ids"][0]
        padding = torch.full((longest - len(ids),), pad_id)
        mask = torch.ones(len(ids), dtype=torch.long), torch.zeros(len(padding), dtype=torch.long)
        rows["input_ids"].append(torch.cat((ids, padding) if side == "right" else (padding, ids)))
        rows["attention_mask"].append(torch.cat(mask if side == "right" else mask[::-1]))
    batch = {name: torch.stack(values) for name, values in rows.items()}
    for name in ("pixel_values", "image_grid_thw"):
        if values := [part[name] for part in parts if name in part]:
            batch[name] = torch.cat(values)
    return batch


def check(network, folder, records, reading=None):
    wanted = our_rewards(network, records)
    assert wanted.max() - wanted.min() > 0.01, "rewards that are all alike prove nothing"
    save_model(network, folder, reading=reading)
    model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for side in ("left", "right"):
        batch = batch_of(network, records, side)
        assert not batch["attention_mask"].all()
        with torch.no_grad():
            logits = model(**batch).logits
        assert logits.shape == (len(wanted), 1) and logits.dtype is torch.float32
        assert (logits[:, 0] - wanted).abs().max() <= 1e-5, side
    return model


@pytest.mark.parametrize("pooling", ["anchor", "mean"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_gets_our_rewards(family, head, pooling, tmp_path, hf):
    network = make_model(family, head=HEADS[head], pooling=pooling)
    model = check(network, tmp_path / "model", records_of(family))
    assert type(model) is hf.CLASSES[type(network.model.config)]


@pytest.mark.parametrize("pooling", ["anchor", "mean"])
@pytest.mark.parametrize("head", ["one layer", "one layer with bias", "two layers"])
@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl", "internvl"])
def test_a_folder_for_vllm_gets_our_rewards_too_and_can_be_saved_again(family, head, pooling, tmp_path):
    network = make_model(family, head=HEADS[head], pooling=pooling)
    model = check(network, tmp_path / "model", records_of(family), read_by_vllm(network))
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again").score.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.score.state_dict().items())


@pytest.mark.parametrize("pooling", ["anchor", "mean"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3"])
def test_an_end_of_turn_is_found_before_what_the_template_writes_behind_it(family, pooling, tmp_path):
    network = make_model(family, pooling=pooling)
    encoder = network.encoder
    network.encoder = ConversationEncoder(encoder.tokenizer, encoder.vision, anchor="end_of_turn")
    batch = batch_of(network, records_of(family)[:1], "right")
    assert batch["input_ids"][0, -1] != network.encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = check(network, tmp_path / "model", records_of(family))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["fastrm"]["anchor_token_id"]  # as exports of before
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    older = type(model).from_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"which token ends a turn.*fastrm export MODEL"):
        older(**batch)


def test_a_model_that_reads_before_its_pad_token_is_read_there(tmp_path):
    network = make_model("llama")
    tokenizer = network.encoder.tokenizer
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    pad = tokenizer.convert_tokens_to_ids("<|im_end|>")
    network.model.config.pad_token_id = pad
    network.encoder = ConversationEncoder(tokenizer, None, anchor="before_padding", pad_token_id=pad)
    check(network, tmp_path / "model", records_of("llama"))


@needs_smollm2
def test_real_weights_get_our_rewards(smollm2_folder, tmp_path):
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    backbone = load_backbone(str(smollm2_folder))
    encoder = make_encoder(backbone.config, tokenizer, None, "last_token", MediaLimits())
    network = RewardNetwork(backbone, HeadConfig(), encoder)
    network.set_kernels(torch.float32, attention="sdpa")
    check(network, tmp_path / "model", records_of("llama"))


def test_in_bf16_the_head_stays_in_float32(tmp_path):
    save_model(make_model("qwen2_5_vl"), tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.score.parameters()} == {torch.float32}
    assert model.model.language_model.layers[0].mlp.up_proj.weight.dtype is torch.bfloat16


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl", "llama"])
@pytest.mark.parametrize("head", ["one layer", "one layer with bias", "two layers"])
def test_what_transformers_saves_again_fastrm_reads(family, head, tmp_path):
    network = make_model(family, head=HEADS[head])
    save_model(network, tmp_path / "export")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "export").save_pretrained(tmp_path / "again")
    network.encoder.tokenizer.save_pretrained(tmp_path / "again")
    if network.encoder.vision is not None:
        network.encoder.vision.save(tmp_path / "again")
    state = load_model(tmp_path / "again").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in network.state_dict().items())
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "again").num_labels == 1


def test_training_on_labels_moves_rewards_towards_them(tmp_path):
    network = make_model("qwen2")
    save_model(network, tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    batch = batch_of(network, records_of("qwen2"), "right")
    labels = torch.arange(len(batch["input_ids"]), dtype=torch.float32)
    outputs = model(**batch, labels=labels)
    assert outputs.loss.item() == pytest.approx(((outputs.logits[:, 0] - labels) ** 2).mean().item())
    outputs.loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.score.parameters())


class TestOtherFolders:
    def test_the_stock_class_goes_on_reading_its_own(self, tmp_path):
        config = make_model("qwen2").model.config
        config.num_labels = 3
        Qwen2ForSequenceClassification(config).save_pretrained(tmp_path)
        assert type(AutoModelForSequenceClassification.from_pretrained(tmp_path)) is Qwen2ForSequenceClassification
        assert type(AutoModelForSequenceClassification.from_config(config)) is Qwen2ForSequenceClassification

    def test_a_vision_model_without_our_head_is_refused(self, tmp_path):
        make_model("qwen2_5_vl").model.save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=r"no `fastrm` section.*qwen2_5_vl.*fastrm export MODEL"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path)

    def test_an_export_names_the_stock_class_though_ours_are_registered(self, tmp_path):
        save_model(make_model("qwen2", head=HEADS["one layer"]), tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen2ForSequenceClassification"]

    def test_a_weight_that_is_missing_is_not_drawn_at_random(self, tmp_path):
        save_model(make_model("qwen2_5_vl"), tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        del state["score.2.bias"]
        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(StorageError, match=r"1 weights are in no file.*score\.2\.bias"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path)


class TestBatches:
    def test_several_conversations_need_a_mask(self, tmp_path):
        network = make_model("qwen2")
        save_model(network, tmp_path)
        batch = batch_of(network, records_of("qwen2"), "right")
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="6 conversations without attention_mask"):
            model(batch["input_ids"])

    def test_a_row_of_padding_alone_is_refused(self, tmp_path):
        network = make_model("qwen2")
        save_model(network, tmp_path)
        batch = batch_of(network, records_of("qwen2"), "right")
        batch["attention_mask"][0] = 0
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="has no token"):
            model(**batch)

    def test_a_length_at_which_rewards_would_depend_on_others_is_refused(self, tmp_path):
        network = make_model("qwen2")
        network.model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
        network.model.config.max_position_embeddings = 16
        save_model(network, tmp_path)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="more than 16 tokens"):
            model(**batch_of(network, records_of("qwen2"), "right"))
