"""`fastrm export`: what it writes for each reader, and what it refuses."""

import importlib.util
import io
import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoConfig

from fastrm import cli
from fastrm.config import HeadConfig
from fastrm.data.template import ConversationEncoder
from fastrm.errors import ConfigError
from fastrm.model.export import load_model, save_model
from fastrm.model.export_command import export_model
from fastrm.model.families import VISION_FAMILIES
from fastrm.ui import Display
from tests.helpers.foreign_models import rewards_of, save_backbone, stock_rewards
from tests.helpers.project import PROJECT
from tests.helpers.support import FAMILIES, make_model

PLUGIN = PROJECT / "kernels" / "vllm_plugin" / "fastrm_vllm" / "__init__.py"
# By model type, the class of transformers for sequence classification as vLLM writes it.
NAMES = {
    "llama": "LlamaForSequenceClassification",
    "qwen2": "Qwen2ForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
    "qwen2_vl": "Qwen2VLForSequenceClassification",
    "qwen2_5_vl": "Qwen2_5_VLForSequenceClassification",
    "internvl": "InternVLForSequenceClassification",
}


def export(network, folder, reader) -> str:
    """Export a network; returns what is said."""
    save_model(network, folder / "ours")
    said = io.StringIO()
    export_model(folder / "ours", folder / "out", reader, Display(Console(file=said, width=500)))
    return said.getvalue()


def config_of(folder) -> dict:
    return json.loads((folder / "out" / "config.json").read_text())


def plugin_architectures() -> tuple[str, ...]:
    spec = importlib.util.spec_from_file_location("fastrm_vllm", PLUGIN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ARCHITECTURES


def assert_same_weights(folder, network):
    state = load_model(folder).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("family", NAMES)
def test_one_layer_is_for_stock_vllm(family, bias, tmp_path):
    network = make_model(family, head=HeadConfig(layers=1, bias=bias))
    said = export(network, tmp_path, "vllm")
    config, keys = config_of(tmp_path), load_file(tmp_path / "out" / "model.safetensors").keys()
    assert config["architectures"] == [NAMES[family]]
    assert config["num_labels"] == 1 and config["problem_type"] == "regression"
    if family in VISION_FAMILIES:  # vLLM makes the head of InternVL by the text model's config alone
        text = AutoConfig.from_pretrained(tmp_path / "out").text_config
        assert text.num_labels == 1 and text.problem_type == "regression"
    head = "language_model.score" if family in VISION_FAMILIES else "score"
    assert {name for name in keys if "score" in name} == {f"{head}.weight", *([f"{head}.bias"] if bias else [])}
    assert "vllm serve" in said and "plugin" not in said
    is_vision = family in VISION_FAMILIES
    assert ("--mm-processor-kwargs '{\"use_fast\": false}'" in said) == is_vision, "training resizes with PIL"
    # transformers has no classifier of its own for vision models, that could read the head without its bias.
    assert (f"transformers' own {NAMES[family]} would leave the bias" in said) == (bias and not is_vision)
    assert_same_weights(tmp_path / "out", network)


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl", "internvl"])
def test_one_layer_without_bias_is_for_the_stock_classifier_where_there_is_one(family, tmp_path):
    said = export(make_model(family, head=HeadConfig(layers=1, bias=False)), tmp_path, "transformers")
    if family == "llama":
        assert said.endswith("out: transformers' LlamaForSequenceClassification gives its rewards\n")
        assert config_of(tmp_path)["architectures"] == ["LlamaForSequenceClassification"]
    else:
        assert said.endswith("out: AutoModelForSequenceClassification gives its rewards after import fastrm.hf\n")
        assert config_of(tmp_path)["architectures"][0].endswith("Model")


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - NAMES.keys()))
def test_a_family_that_vllm_is_not_known_to_read_is_refused_by_name(family, tmp_path):
    with pytest.raises(ConfigError, match=f"{family}: how vLLM would read its exports is not known"):
        export(make_model(family, head=HeadConfig(layers=1)), tmp_path, "vllm")


NEED_PLUGIN = {
    "two layers": ({}, "last_token", "Fastrm", "the head has 2 layers"),
    "means": ({"head": HeadConfig(layers=1), "pooling": "mean"}, "last_token", "FastrmWhole", "model.pooling is mean"),
    "end of turn": ({"head": HeadConfig(layers=1)}, "end_of_turn", "FastrmWhole", "model.anchor is end_of_turn"),
}


@pytest.mark.parametrize("case", NEED_PLUGIN)
@pytest.mark.parametrize("family", NAMES)
def test_other_heads_are_for_a_class_of_the_plugin(family, case, tmp_path):
    options, anchor, kind, why = NEED_PLUGIN[case]
    network = make_model(family, **options)
    encoder = network.encoder
    network.encoder = ConversationEncoder(encoder.tokenizer, encoder.vision, anchor=anchor)
    said = export(network, tmp_path, "vllm")
    config, state = config_of(tmp_path), load_file(tmp_path / "out" / "model.safetensors")
    assert config["architectures"] == [kind + NAMES[family]]
    assert config["architectures"][0] in plugin_architectures()
    assert f"since {why}" in said and "pip install kernels/vllm_plugin" in said
    # transformers' stock classifiers refuse the empty tensor; the plugin leaves it out.
    assert state["score.weight"].numel() == 0 and "score.0.weight" in state
    if anchor == "end_of_turn":
        assert config["fastrm"]["anchor_token_id"] == encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert_same_weights(tmp_path / "out", network)


def test_the_plugin_has_a_class_for_every_family_and_no_other():
    assert set(plugin_architectures()) == {kind + name for kind in ("Fastrm", "FastrmWhole") for name in NAMES.values()}


def test_rotary_frequencies_that_follow_the_longest_are_written_as_those_up_to_the_limit(tmp_path):
    network = make_model("qwen2")
    network.model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    export(network, tmp_path, "vllm")
    assert config_of(tmp_path)["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


def test_what_the_stock_processor_asks_of_an_internvl_tokenizer_is_written(tmp_path):
    from transformers import AutoTokenizer

    export(make_model("internvl"), tmp_path, "vllm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.start_image_token == "<img>" and tokenizer.context_image_token == "<IMG_CONTEXT>"
    assert tokenizer.video_token == "<IMG_CONTEXT>" and len(tokenizer) == len(make_model("internvl").encoder.tokenizer)
    # A tile of 4 x 4 patches is four tokens.
    assert json.loads((tmp_path / "out" / "processor_config.json").read_text())["image_seq_length"] == 4


MISREAD = {
    "tower's activation": ("qwen2_vl", lambda c: setattr(c.vision_config, "hidden_act", "gelu"), "vision_config.hid"),
    "activation": ("llama", lambda c: setattr(c, "hidden_act", "gelu"), "hidden_act is 'gelu'"),
    "tower's rotary base": (
        "qwen2_5_vl", lambda c: c.vision_config.rope_parameters.update(rope_theta=500.0), "vision_config's rope_theta",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISREAD)
def test_what_vllm_would_misread_is_refused(case, tmp_path):
    family, change, why = MISREAD[case]
    network = make_model(family)
    change(network.model.config)
    with pytest.raises(ConfigError, match=f"{family}: {why}.*whatever config.json says"):
        export(network, tmp_path, "vllm")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llama"])
def test_for_transformers_it_is_an_export_like_that_of_a_run(family, tmp_path):
    said = export(make_model(family), tmp_path, "transformers")
    names = {path.name for path in (tmp_path / "ours").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    ours, written = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "out"))
    assert ours.keys() == written.keys() and all(torch.equal(ours[name], written[name]) for name in ours)
    assert "import fastrm.hf" in said and "the head has 2 layers" in said


def test_a_model_of_another_trainer_is_converted(tmp_path):
    from transformers import AutoModelForSequenceClassification

    stock = save_backbone(tmp_path / "theirs", kind=AutoModelForSequenceClassification, num_labels=1, pad_token_id=0)
    wanted = stock_rewards(tmp_path / "theirs", lambda ids: stock(ids).logits[0, 0])
    said = io.StringIO()
    export_model(tmp_path / "theirs", tmp_path / "out", "vllm", Display(Console(file=said, width=500)))
    found, adopted = rewards_of(tmp_path / "out")
    assert not adopted and "head: 1 layer, no bias, from score.weight" in said.getvalue()
    assert found == [pytest.approx(group, abs=1e-5) for group in wanted]


class TestCommand:
    def run(self, *words, monkeypatch, capsys):
        monkeypatch.setattr("sys.argv", ["fastrm", "export", *map(str, words)])
        with pytest.raises(SystemExit) as leave:
            cli.main()
        said = capsys.readouterr()
        return leave.value.code, said.out + said.err

    def test_it_writes_and_says_how_it_is_served(self, tmp_path, monkeypatch, capsys):
        save_model(make_model("qwen2"), tmp_path / "ours")
        words = tmp_path / "ours", "--out", tmp_path / "new" / "out", "--for", "vllm"
        code, said = self.run(*words, monkeypatch=monkeypatch, capsys=capsys)
        assert not code and "FastrmQwen2ForSequenceClassification" in said
        assert (tmp_path / "new" / "out" / "config.json").is_file()

    @pytest.mark.parametrize(
        ("reader", "wanted"), [("sglang", "got 'sglang', wanted one of transformers, vllm"), ("vllm", "exists already")]
    )
    def test_another_reader_and_a_folder_in_use_are_refused(self, reader, wanted, tmp_path, monkeypatch, capsys):
        save_model(make_model("qwen2"), tmp_path / "ours")
        words = tmp_path / "ours", "--out", tmp_path / "ours", "--for", reader
        code, said = self.run(*words, monkeypatch=monkeypatch, capsys=capsys)
        assert code == ConfigError.exit_code and wanted in said
        assert (tmp_path / "ours" / "config.json").is_file()
