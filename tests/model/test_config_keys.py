"""Keys of config.json: read as stock transformers reads them, refused by name, or named as unknown."""

import copy
import json

import pytest
import torch
from transformers import AutoConfig

from fastrm.config import load_config
from fastrm.errors import ConfigError
from fastrm.forecast.dry_run import dry_run
from fastrm.model.architectures import PUBLISHED
from fastrm.model.config_keys import KNOWN, PARTS, describe_unknown_keys, unknown_keys
from fastrm.model.export import load_model, save_model
from fastrm.model.families import TEXT_FAMILIES, VISION_FAMILIES, check_family
from tests.helpers import stock
from tests.helpers.runs import fastrm_here, text_rows, tiny_config, write_rows
from tests.helpers.support import FAMILIES, make_image, make_model, make_record, pack_of


def _options(family, text=None, vision=None, **top):
    """FAMILIES[family] with keys changed in its parts."""
    options = copy.deepcopy(FAMILIES[family])
    options.get("text_config", options).update(text or {})
    options.get("vision_config", {}).update(vision or {})
    return {**options, **top}


CASES = [
    *[(family, {"hidden_act": "gelu"}, {}, {}) for family in FAMILIES],
    ("llama", {"hidden_act": "relu2"}, {}, {}),
    ("llama", {"hidden_act": "prelu"}, {}, {}),  # which has a weight of its own in every layer
    ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"}, {}, {}),
    ("qwen2_5_vl", {}, {"hidden_act": "relu"}, {}),
    ("qwen2_vl", {}, {"hidden_act": "relu"}, {}),
    ("internvl", {}, {"hidden_act": "relu", "norm_type": "rms_norm"}, {"projector_hidden_act": "silu"}),
]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize(("family", "text", "vision", "top"), CASES, ids=[f"{f} {t} {v}" for f, t, v, _ in CASES])
def test_the_activation_is_the_one_that_the_config_names(family, text, vision, top, fused, monkeypatch):
    records = [make_record(1, num_responses=3)]
    if family in VISION_FAMILIES:
        records.append(make_record(2, images=[make_image(90, 60)]))
    usual = stock.stock_rewards(make_model(family), records)
    monkeypatch.setitem(FAMILIES, family, _options(family, text, vision, **top))
    network = make_model(family)
    wanted = stock.stock_rewards(network, records)
    if fused:
        network.fuse_projections()
    found = network(pack_of(network, records))
    assert (found - wanted).abs().max() <= 1e-5
    # The key matters: what was computed before it was read is far off.
    assert (usual - wanted).abs().max() >= 1e-4


def test_an_export_keeps_the_activation(monkeypatch, tmp_path):
    monkeypatch.setitem(FAMILIES, "qwen2", _options("qwen2", {"hidden_act": "gelu"}))
    network, records = make_model("qwen2"), [make_record(1)]
    save_model(network, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert torch.equal(again(pack_of(again, records)), network(pack_of(network, records)))


@pytest.mark.parametrize(
    ("family", "text", "vision", "top", "message"),
    [
        ("llama", {"hidden_act": "gleu"}, {}, {}, "hidden_act is 'gleu', which transformers does not know"),
        ("qwen2", {"attention_dropout": 0.1}, {}, {}, "attention_dropout is 0.1, only 0 is supported"),
        ("qwen2", {"num_attention_heads": 4, "num_key_value_heads": 3}, {}, {}, "num_key_value_heads 3; wanted"),
        ("llama", {"num_hidden_layers": 0}, {}, {}, "num_hidden_layers is 0, .* wanted a layer or more"),
        ("llama", {"is_causal": False}, {}, {}, "is_causal is False, only true is supported"),
        ("qwen2_vl", {"is_causal": False}, {}, {}, "is_causal is False, only true is supported"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 3}, {}, {}, r"layer_types has \['chunked_attention'\]"),
        (
            "llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, {}, {},
            "partial_rotary_factor is 0.5, only 1 is supported",
        ),
        ("qwen2", {}, {}, {"quantization_config": {"quant_method": "awq"}}, "quantization_config is set; quantised"),
        ("qwen2_5_vl", {}, {"in_channels": 1}, {}, "vision_config.in_channels is 1, only 3 is supported: images are"),
        ("qwen2_vl", {}, {"in_channels": 4}, {}, "vision_config.in_channels is 4, only 3 is supported"),
        ("qwen2_vl", {}, {"patch_size": [14, 14]}, {}, r"vision_config.patch_size is \[14, 14\], only one number"),
        ("qwen2_5_vl", {}, {"hidden_act": "gleu"}, {}, "vision_config.hidden_act is 'gleu'"),
        (
            "qwen2_5_vl", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, {}, {},
            r"mrope_section of rope_parameters is \[16, 24, 24\], for heads of 128; heads have",
        ),
        ("internvl", {}, {"num_channels": 1}, {}, "vision_config.num_channels is 1, only 3 is supported"),
        ("internvl", {}, {}, {"projector_hidden_act": "gleu"}, "projector_hidden_act is 'gleu'"),
        ("internvl", {}, {"norm_type": "group_norm"}, {}, "norm_type is 'group_norm', wanted layer_norm or rms_norm"),
    ],
)  # fmt: skip
def test_what_our_layers_do_not_compute_is_refused_by_name(family, text, vision, top, message):
    with pytest.raises(ConfigError, match=message):
        check_family(AutoConfig.for_model(**_options(family, text, vision, **top)))


def test_windows_in_a_config_of_qwen2_vl_are_not_read(monkeypatch):
    options = _options("qwen2_vl", {}, {"fullatt_block_indexes": [0], "window_size": 56})
    monkeypatch.setitem(FAMILIES, "qwen2_vl", options)
    network, records = make_model("qwen2_vl"), [make_record(1, images=[make_image(90, 60)])]
    assert (network(pack_of(network, records)) - stock.stock_rewards(network, records)).abs().max() <= 1e-5


def test_layers_that_differ_from_one_another_are_refused():
    config = AutoConfig.for_model(**_options("llama", {"per_layer_config": {"0": {"intermediate_size": 32}}}))
    if not hasattr(config, "is_heterogeneous"):
        pytest.skip("this transformers has no such key")
    with pytest.raises(ConfigError, match="per_layer_config is set"):
        check_family(config)


@pytest.mark.parametrize("family", TEXT_FAMILIES + VISION_FAMILIES)
def test_every_key_of_the_stock_class_was_looked_at(family):
    """A transformers whose classes have further keys fails here: somebody has to read what they do."""
    config = AutoConfig.for_model(family)
    for part in [
        config,
        *(getattr(config, name) for name in PARTS if hasattr(config, name)),
    ]:
        changed = copy.deepcopy(part)
        for name, value in part.to_dict().items():
            if not isinstance(value, dict) and name not in ("dtype", "model_type", "transformers_version"):
                changed.__dict__[name] = "another value"
        assert unknown_keys(changed) == []
    assert unknown_keys(config) == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_no_unknown_keys(name):
    assert unknown_keys(AutoConfig.for_model(**PUBLISHED[name].options)) == []


def test_keys_that_nobody_has_looked_at_are_named():
    config = AutoConfig.for_model(**_options("qwen2_5_vl", {"logit_scale": 2.0}, {"alibi": True}, residual_scale=0.5))
    assert sorted(unknown_keys(config)) == ["residual_scale", "text_config.logit_scale", "vision_config.alibi"]
    assert describe_unknown_keys(config).startswith("config.json: keys residual_scale, text_config.logit_scale")
    one = AutoConfig.for_model(**_options("llama", {"embedding_multiplier": 12.0}))
    assert describe_unknown_keys(one) == (
        "config.json: key embedding_multiplier is unknown to fastrm for llama, and not read"
    )
    assert describe_unknown_keys(AutoConfig.for_model(**_options("llama"))) is None


def test_known_keys_are_of_supported_models():
    parts = {f"{family}{part}" for family in VISION_FAMILIES for part in ("", "_text", "_vision")}
    assert KNOWN.keys() <= parts | set(TEXT_FAMILIES)


def test_a_run_and_a_score_name_unknown_keys_once(tmp_path, capfd):
    rows = write_rows(tmp_path / "rows.jsonl", text_rows(8))
    config = tiny_config(tmp_path, rows, run={"max_steps": 1})
    key = "model.init.text_config.logit_scale=2.0"
    line = "config.json: key text_config.logit_scale is unknown to fastrm for qwen2_5_vl, and not read"
    dry_run(load_config(config, [key]))
    assert capfd.readouterr().out.replace("\n", " ").count(line) == 1
    code, told = fastrm_here(capfd, "train", config, key)
    assert (code, told.count(line)) == (0, 1), told
    out = tmp_path / "out.jsonl"
    code, told = fastrm_here(capfd, "score", tmp_path / "run" / "model", rows, "--out", out, "--num-workers", "0")
    assert (code, told.count(line)) == (0, 1), told


@pytest.mark.parametrize(
    ("family", "part", "key", "value", "message"),
    [
        ("qwen2_5_vl", "vision_config", "in_channels", 1, r"vision_config\.in_channels is 1, only 3 is supported"),
        ("qwen2_5_vl", None, "image_token_id", 5, r"config\.json: image_token_id is 5, but the tokenizer has \d+ for"),
        ("qwen2_vl", None, "video_token_id", 5, r"config\.json: video_token_id is 5, but the tokenizer has \d+ for"),
        ("internvl", None, "image_token_id", 5, r"config\.json: image_token_id is 5, but the tokenizer has \d+ for"),
        (
            "llama",
            None,
            "rope_parameters",
            {"rope_type": "yarn", "rope_theta": 1e4},
            "transformers refuses it: .*factor",
        ),
        ("llama", None, "hidden_act", None, "transformers refuses it: .*hidden_act|hidden_act is None"),
        ("llama", None, "num_attention_heads", 0, "transformers refuses it: "),
    ],
)
def test_a_folder_that_does_not_fit_together_is_a_configuration_error(family, part, key, value, message, tmp_path):
    save_model(make_model(family), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    tree = json.loads(file.read_text())
    (tree if part is None else tree[part])[key] = value
    file.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=message):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("key", ["patch_size", "merge_size", "temporal_patch_size"])
def test_patches_of_another_model_are_a_configuration_error(key, tmp_path):
    save_model(make_model("qwen2_5_vl"), tmp_path / "model")
    file = tmp_path / "model" / "preprocessor_config.json"
    tree = json.loads(file.read_text())
    file.write_text(json.dumps(tree | {key: 4}))
    with pytest.raises(ConfigError, match=rf"preprocessor_config\.json: {key} is 4, but .*{key} of vision_config"):
        load_model(tmp_path / "model")
