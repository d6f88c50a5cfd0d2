"""InternVL: tiles, tokens and pixels as the stock processor makes them, the tower as the stock model runs it."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from fastrm.data.media.internvl import load_internvl_format
from fastrm.data.record import ImageRef, Message, Response, VideoRef
from fastrm.errors import ConfigError, RecordError
from fastrm.limits import MediaLimits
from fastrm.model.export import load_model, save_model
from fastrm.model.families import check_family
from fastrm.model.loading import load_backbone
from fastrm.model.text import longest_path
from tests.helpers import stock, support
from tests.helpers.support import (
    FAMILIES,
    make_image,
    make_model,
    make_record,
    make_tokenizer,
    needs_published_internvl_names,
    pack_of,
)

LIMITS = MediaLimits()
SIZES = [(56, 56), (100, 100), (190, 40), (30, 150), (1, 90), (333, 217), (57, 55), (400, 130), (12, 12)]
VISION = FAMILIES["internvl"]["vision_config"]


@pytest.fixture(scope="module")
def network():
    return make_model("internvl")


def _with(monkeypatch, text=(), vision=(), **options):
    """The family with other options."""
    base = FAMILIES["internvl"]
    made = {
        **base, **options,
        "text_config": {**base["text_config"], **dict(text)}, "vision_config": {**VISION, **dict(vision)},
    }  # fmt: skip
    monkeypatch.setitem(FAMILIES, "internvl", made)


class TestFormat:
    @pytest.mark.parametrize("max_tiles", [1, 4, 12])
    def test_pixels_and_tiles_equal_the_stock_processor_bitwise(self, network, max_tiles):
        form = load_internvl_format(network.model.config, network.encoder.tokenizer, None, max_tiles=max_tiles)
        seen = set()
        for number, (width, height) in enumerate(SIZES):
            ref = make_image(width, height, number)
            size = form.measure(ref, LIMITS)
            found = form.cut(ref, size, LIMITS)
            image = Image.open(io.BytesIO(ref.data))
            wanted = form.processor(images=[image], crop_to_patches=True, return_tensors="pt")
            assert size.frames == int(wanted["num_patches"][0]), (width, height)
            assert found.grid == (size.frames, 4, 4) and size.num_tokens == 4 * size.frames
            pixels = form.patch_format.normalize(torch.from_numpy(found.values))
            assert torch.equal(pixels, _in_patches(wanted["pixel_values"])), (width, height)
            seen.add(size.frames)
        assert seen == {1} if max_tiles == 1 else len(seen) >= 3

    def test_published_settings_are_the_default(self, network):
        config = network.model.config
        processor = load_internvl_format(config, network.encoder.tokenizer, None).processor
        assert (processor.min_patches, processor.max_patches, processor.crop_to_patches) == (1, 12, True)
        assert list(processor.image_mean) == [0.485, 0.456, 0.406]
        assert list(processor.image_std) == [0.229, 0.224, 0.225]

    def test_settings_are_saved_and_read_back(self, network, tmp_path):
        config, tokenizer = network.model.config, network.encoder.tokenizer
        form = load_internvl_format(config, tokenizer, None, max_tiles=5, image_mean=[0.1, 0.2, 0.3])
        form.save(tmp_path)
        again = load_internvl_format(config, tokenizer, str(tmp_path))
        assert again.processor.max_patches == 5 and again.patch_format == form.patch_format

    def test_other_tiles_than_the_models_are_refused(self, network, tmp_path):
        config, tokenizer = network.model.config, network.encoder.tokenizer
        for size, message in [
            ({"height": 84, "width": 84}, "tiles of 84 pixels, the model has positions for 56"),
            ({"height": 56, "width": 84}, "size is 56 x 84, wanted squares of a multiple of 28 pixels"),
        ]:
            form = load_internvl_format(config, tokenizer, None)
            form.processor.size = size
            form.save(tmp_path)
            with pytest.raises(ConfigError, match=message):
                load_internvl_format(config, tokenizer, str(tmp_path))

    def test_a_tokenizer_of_another_family_is_refused(self, network):
        with pytest.raises(ConfigError, match="no special token <IMG_CONTEXT>"):
            load_internvl_format(network.model.config, make_tokenizer("qwen"), None)

    def test_an_image_that_became_another_is_refused(self, network, tmp_path):
        path = tmp_path / "a.png"
        path.write_bytes(make_image(56, 56).data)
        form, ref = network.encoder.vision, ImageRef(str(path))
        size = form.measure(ref, LIMITS)
        path.write_bytes(make_image(190, 40).data)
        with pytest.raises(RecordError) as caught:
            form.cut(ref, size, LIMITS)
        assert caught.value.code == "IMAGE_CHANGED" and "has another size" in caught.value.message


def _in_patches(tiles):
    """(tiles, 3, 56, 56) -> (patches, 3 * 14 * 14), the four patches of a token together."""
    patches = tiles.view(-1, 3, 2, 2, 14, 2, 2, 14).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return patches.reshape(-1, 3 * 14 * 14)


class TestConversation:
    def test_tokens_equal_the_stock_template_and_expansion(self, network):
        encoder = network.encoder
        images = [make_image(100, 100, 1), make_image(190, 40, 2)]
        question = Message("user", (images[0], "Compare", images[1], "both."))
        response = Response((Message("system", ("Be brief.",)), question, Message("assistant", ("They differ.",))))
        encoded = encoder.encode(response)
        wanted = stock.stock_inputs(encoder, response)
        assert np.array_equal(encoded.tokens, wanted["input_ids"][0].numpy())
        assert encoded.positions is None  # numbered from 0
        text = encoder.tokenizer.decode(encoded.tokens)
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<img><IMG_CONTEXT>")
        assert "</img>\nCompare<img>" in text
        for span, ref in zip(encoded.media, images, strict=True):
            assert span.ref == ref
            assert (encoded.tokens[span.start : span.stop] == encoder.special_ids["<IMG_CONTEXT>"]).all()

    def test_no_system_turn_is_added(self, network):
        response = Response((Message("user", ("Hi",)), Message("assistant", ("Ho",))))
        text = network.encoder.tokenizer.decode(network.encoder.encode(response).tokens)
        assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"

    def test_typed_placeholders_stay_text(self, network):
        response = Response((Message("user", ("<img><IMG_CONTEXT></img>",)), Message("assistant", ("no",))))
        encoder = network.encoder
        ids = {encoder.special_ids[token] for token in ("<img>", "<IMG_CONTEXT>", "</img>")}
        assert ids.isdisjoint(encoder.encode(response).tokens.tolist())

    def test_a_video_is_refused_by_name(self, network):
        response = Response((Message("user", (VideoRef(path="a.mp4"), "What?")), Message("assistant", ("no",))))
        with pytest.raises(RecordError) as caught:
            network.encoder.encode(response)
        assert caught.value.code == "VIDEO_UNSUPPORTED"
        assert caught.value.message == "the record has a video but the model reads no videos"


TOWERS = {
    "published": {"attention_bias": True},
    "rms_norm, qk_norm": {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False},
    "final norm, no positions": {"use_mean_pooling": False, "use_absolute_position_embeddings": False},
}


@pytest.mark.parametrize("text", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("vision", TOWERS.values(), ids=TOWERS)
def test_tower_equals_the_stock_forward(text, vision, monkeypatch):
    _with(monkeypatch, text={"model_type": text}, vision=vision)
    network = make_model("internvl")
    tiles = torch.randn(4, 3, 56, 56)
    with torch.no_grad():
        stock_output = network.model.get_image_features(pixel_values=tiles, vision_feature_select_strategy="default")
        wanted = stock_output.pooler_output.flatten(0, 1)
        layout = network.tower.shape.lay_out([(3, 4, 4), (1, 4, 4)])
        features = network._runner.media_features(_in_patches(tiles), layout).tokens
    assert wanted.abs().max() > 0.1
    assert (features - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("text", ["qwen3", "llama"])
def test_every_text_model_gives_stock_rewards(text, monkeypatch):
    _with(monkeypatch, text={"model_type": text}, vision={"use_qk_norm": True})
    network = make_model("internvl")
    records = [make_record(1, num_responses=3, images=[make_image(100, 60)]), make_record(2)]
    assert (network(pack_of(network, records)) - stock.stock_rewards(network, records)).abs().max() <= 1e-5


class TestDynamicRope:
    def test_rewards_equal_stock_up_to_the_trained_length_and_longer_is_refused(self, monkeypatch):
        dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
        _with(monkeypatch, text={"rope_parameters": dynamic, "max_position_embeddings": 160})
        network = make_model("internvl")
        assert longest_path(network.model.config) == 160
        records = [make_record(1, num_responses=4), make_record(2, num_responses=4)]
        pack = pack_of(network, records)
        assert pack.num_tokens > 160  # of all responses, but of none alone
        assert (network(pack) - stock.stock_rewards(network, records)).abs().max() <= 1e-5
        long = pack_of(network, [make_record(3, prompt_words=300)])
        with pytest.raises(ConfigError, match=r"rope_type dynamic is exact up to 160; lower"):
            network(long)

    def test_longrope_is_refused(self, network):
        config = network.model.config.__class__.from_dict(network.model.config.to_dict())
        config.text_config.rope_parameters = {"rope_type": "longrope"}
        with pytest.raises(ConfigError, match="longrope"):
            check_family(config)


@pytest.mark.parametrize(
    ("options", "vision", "message"),
    [
        ({"vision_feature_layer": -2}, {}, "vision_feature_layer is -2, only -1 is supported"),
        ({"vision_feature_select_strategy": "full"}, {}, "vision_feature_select_strategy is 'full', only 'default'"),
        ({}, {"hidden_dropout_prob": 0.1}, "hidden_dropout_prob is 0.1, only 0.0 is supported"),
        ({}, {"image_size": [56, 84]}, "give no square tiles of whole image tokens"),
        ({}, {"image_size": [70, 70]}, "give no square tiles of whole image tokens"),
        ({"text_config": {"model_type": "gemma2"}}, {}, "text_config has model type 'gemma2'"),
    ],
)
def test_what_the_runner_does_not_compute_is_refused(options, vision, message, monkeypatch):
    _with(monkeypatch, vision=vision)
    from transformers import AutoConfig

    made = {**FAMILIES["internvl"], **options}
    with pytest.raises(ConfigError, match=message):
        check_family(AutoConfig.for_model(**made))


class TestFreeze:
    @pytest.mark.parametrize("part", ["vision", "projector"])
    def test_exactly_the_frozen_part_has_no_gradient(self, part):
        network = make_model("internvl")
        network.freeze([part])
        prefix = {"vision": "model.vision_tower.", "projector": "model.multi_modal_projector."}[part]
        pack = pack_of(network, [make_record(1, images=[make_image(60, 60)])])
        network(pack).sum().backward()
        without = {name for name, p in network.named_parameters() if p.grad is None}
        assert without == {name for name, _ in network.named_parameters() if name.startswith(prefix)} != set()


class TestFiles:
    def test_export_has_stock_names_and_reloads_to_the_bit(self, network, tmp_path):
        save_model(network, tmp_path / "model")
        names = load_file(tmp_path / "model" / "model.safetensors").keys()
        prefixes = ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.", "score.")
        assert all(name.startswith(prefixes) for name in names)
        again = load_model(tmp_path / "model")
        records = [make_record(1, num_responses=3, images=[make_image(190, 40)])]
        assert torch.equal(again(pack_of(again, records)), network(pack_of(network, records)))

    def test_transformers_loads_the_export(self, network, tmp_path):
        save_model(network, tmp_path / "model")
        model, report = AutoModelForImageTextToText.from_pretrained(
            tmp_path / "model", dtype=torch.float32, output_loading_info=True
        )
        assert set(report["missing_keys"]) <= {"lm_head.weight"}
        mine, theirs = network.model.state_dict(), model.model.state_dict()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)

    def test_limits_of_pixels_are_refused_for_a_model_that_reads_tiles(self, network, tmp_path):
        save_model(network, tmp_path / "model")
        with pytest.raises(ConfigError, match="min_pixels and max_pixels are for Qwen models; InternVL reads tiles"):
            load_model(tmp_path / "model", max_pixels=1000)

    @pytest.mark.parametrize("names", ["new", pytest.param("published", marks=needs_published_internvl_names)])
    def test_backbone_loads_from_new_and_from_published_names(self, network, tmp_path, names):
        from transformers import InternVLForConditionalGeneration

        full = InternVLForConditionalGeneration(network.model.config)
        full.model.load_state_dict(network.model.state_dict())
        full.save_pretrained(tmp_path)
        if names == "published":
            # The hub's -hf checkpoints were written before transformers moved the parts under `model.`.
            state = {_published(name): tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
            save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        loaded = load_backbone(str(tmp_path)).state_dict()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in network.model.state_dict().items())


def _published(name: str) -> str:
    name = name.removeprefix("model.")
    name = name.replace("language_model.", "language_model.model.") if name.startswith("language_model.") else name
    return name.replace("lm_head.", "language_model.lm_head.")


def test_support_model_is_small():
    assert sum(p.numel() for p in support.make_model("internvl").parameters()) < 100_000
