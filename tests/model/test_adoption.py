"""Reward models of other trainers: their rewards are those of the class that wrote the files, or they are refused."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastrm import RewardModel
from fastrm.config import ModelConfig, load_config
from fastrm.errors import ConfigError, StorageError
from fastrm.evaluate.models import open_models
from fastrm.evaluate.options import ModelChoice, ScoringOptions
from fastrm.forecast.dry_run import dry_run
from fastrm.limits import MediaLimits
from fastrm.model import weight_files
from fastrm.model.adopt import adopt
from fastrm.model.export import save_model
from fastrm.train.export_checkpoint import export_checkpoint
from fastrm.train.loop import train
from fastrm.ui import Display
from tests.helpers.foreign_models import (
    BIAS,
    GROUPS,
    ROW,
    SQUARE,
    WIDE,
    D,
    add_weights,
    assert_same,
    merged,
    random,
    rewards_of,
    save_adapter,
    save_backbone,
    set_config,
    stock_rewards,
    tokens_of,
)
from tests.helpers.runs import text_rows, tiny_config, write_rows
from tests.helpers.support import make_model

NO_NEWLINE = "<|im_end|>' }}\n{%- endfor"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_stock_classifier_is_scored_without_a_line_of_configuration(family, tmp_path):
    stock = save_backbone(tmp_path, family, AutoModelForSequenceClassification, num_labels=1)
    found, line = rewards_of(tmp_path)
    assert_same(found, stock_rewards(tmp_path, lambda ids: stock(ids).logits))
    assert line == "head: 1 layer, no bias, from score.weight; reads the last token"


def _with_pad_at_the_end(folder: Path, kind=AutoModelForSequenceClassification, **config) -> nn.Module:
    """A classifier whose pad token is the last of a conversation, as of Llama 3 with pad = eos."""
    save_backbone(folder, "llama", kind, **config)
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|im_end|>\\n' }}\n{%- endfor", NO_NEWLINE))
    pad = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|im_end|>")
    set_config(folder, pad_token_id=pad)
    assert tokens_of(folder)[0][0][0, -1] == pad
    return kind.from_pretrained(folder).eval()


def test_a_classifier_that_pads_with_the_last_token_reads_the_one_before(tmp_path):
    stock = _with_pad_at_the_end(tmp_path, num_labels=1)
    found, line = rewards_of(tmp_path)
    assert_same(found, stock_rewards(tmp_path, lambda ids: stock(ids).logits))
    assert line.endswith("reads the last token that is not padding")
    last = stock_rewards(tmp_path, lambda ids: stock.score(stock.model(ids).last_hidden_state[:, -1]))
    assert abs(found[0][0] - last[0][0]) > 1e-3, "both tokens give the same reward: the test proves nothing"


# What a trainer leaves: (keys of config.json, weights of the head, file, class's reward of the last normed state).
HEADS = {
    "score with bias": ({}, {"score.weight": ROW, "score.bias": BIAS}, None, lambda h: h @ ROW[0] + 0.7),
    "TRL": ({}, {"v_head.summary.weight": ROW, "v_head.summary.bias": BIAS}, None, lambda h: h @ ROW[0] + 0.7),
    "LLaMA-Factory": (
        {}, {"v_head.summary.weight": ROW, "v_head.summary.bias": BIAS}, "value_head.safetensors",
        lambda h: h @ ROW[0] + 0.7,
    ),
    "OpenRLHF, normalised": (
        {"architectures": ["RewardModel"], "value_head_prefix": "value_head", "normalize_reward": True, "mean": 0.25,
         "std": 2.5}, {"value_head.weight": ROW}, None, lambda h: (h @ ROW[0] - 0.25) / 2.5,
    ),
    "OpenRLHF, not normalised": (
        {"architectures": ["RewardModel"], "normalize_reward": False, "mean": 0.25, "std": 2.5},
        {"score.weight": ROW, "mean": torch.zeros(1), "std": torch.ones(1)}, None, lambda h: h @ ROW[0],
    ),
    "OpenRLHF, another name": (
        {"architectures": ["RewardModel"], "value_head_prefix": "my_head", "normalize_reward": False},
        {"my_head.weight": ROW}, None, lambda h: h @ ROW[0],
    ),
    "Qwen2ForRewardModel": (
        {"architectures": ["Qwen2ForRewardModel"]},
        {"score.0.weight": SQUARE, "score.0.bias": WIDE, "score.2.weight": ROW, "score.2.bias": BIAS}, None,
        lambda h: torch.relu(SQUARE @ h + WIDE) @ ROW[0] + 0.7,
    ),
    "a Sequential without activation": (
        {}, {"score.0.weight": SQUARE, "score.1.weight": ROW, "score.1.bias": BIAS}, None,
        lambda h: (SQUARE @ h) @ ROW[0] + 0.7,
    ),
    "MM-RLHF": (
        {}, {"rm_head.1.weight": SQUARE, "rm_head.1.bias": WIDE, "rm_head.4.weight": ROW, "rm_head.4.bias": BIAS}, None,
        lambda h: torch.tanh(SQUARE @ h + WIDE) @ ROW[0] + 0.7,
    ),
    "InternLM": ({}, {"v_head.weight": ROW}, None, lambda h: h @ ROW[0]),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_rewards_are_those_of_the_class_that_wrote_the_head(name, tmp_path):
    keys, weights, file, reward = HEADS[name]
    stock = save_backbone(tmp_path)
    add_weights(tmp_path, file or "model.safetensors", **weights)
    set_config(tmp_path, **keys)
    found, line = rewards_of(tmp_path)
    assert_same(found, stock_rewards(tmp_path, lambda ids: reward(stock.model(ids).last_hidden_state[0, -1])))
    assert line.startswith("head: ") and next(name for name in weights if "weight" in name) in line
    assert ("normalised by mean 0.25 and std 2.5" in line) is (name == "OpenRLHF, normalised")


def test_an_export_of_a_normalised_head_is_not_normalised_once_more(tmp_path):
    keys, weights, _, _ = HEADS["OpenRLHF, normalised"]
    save_backbone(tmp_path)
    add_weights(tmp_path, **weights)
    set_config(tmp_path, **keys)
    model = RewardModel.from_pretrained(tmp_path, device="cpu", dtype="fp32")
    save_model(model.network, tmp_path / "export")
    assert rewards_of(tmp_path / "export") == (model.score(GROUPS), "")
    assert not {"normalize_reward", "mean", "std"} & json.loads((tmp_path / "export/config.json").read_text()).keys()


def test_names_of_a_wrapper_class_as_a_trainer_saves_them(tmp_path):
    """TRL's AutoModelForCausalLMWithValueHead: `pretrained_model.` before every name of the backbone."""
    stock = save_backbone(tmp_path)
    state = {f"pretrained_model.{name}": tensor.clone() for name, tensor in stock.state_dict().items()}
    state |= {"v_head.summary.weight": ROW, "v_head.summary.bias": BIAS}
    save_file(state, tmp_path / "model.safetensors")
    wanted = stock_rewards(tmp_path, lambda ids: stock.model(ids).last_hidden_state[0, -1] @ ROW[0] + 0.7)
    assert_same(rewards_of(tmp_path)[0], wanted)


def test_ms_swifts_classifier_of_a_vision_model(tmp_path):
    """`score` on a Qwen2.5-VL without LM head; its text is scored here, images by tests/model/test_exactness.py."""
    network = make_model("qwen2_5_vl")
    from transformers import AutoModelForImageTextToText

    full = AutoModelForImageTextToText.from_config(network.model.config, dtype=torch.float32).eval()
    full.model.load_state_dict(network.model.state_dict())
    full.save_pretrained(tmp_path)
    network.encoder.tokenizer.save_pretrained(tmp_path)
    network.encoder.vision.save(tmp_path)
    add_weights(tmp_path, **{"score.weight": ROW})
    set_config(tmp_path, architectures=["Qwen2_5_VLForSequenceClassification"])
    found, line = rewards_of(tmp_path)
    assert_same(found, stock_rewards(tmp_path, lambda ids: full.model(ids).last_hidden_state[0, -1] @ ROW[0]))
    assert "from score.weight" in line


REFUSED = {
    "an unknown head": ({"classifier.weight": ROW}, {}, ConfigError, r"would be lost: classifier.weight.*head: new"),
    "two heads": (
        {"score.weight": ROW, "v_head.summary.weight": ROW}, {}, ConfigError, "2 reward heads: score.weight, v_head",
    ),
    "two labels": ({"score.weight": random(2, D)}, {}, StorageError, r"shape \[2, 32\], wanted \[1, 32\]"),
    "a narrow layer": (
        {"rm_head.0.weight": random(8, D), "rm_head.2.weight": random(1, 8)}, {}, StorageError,
        r"rm_head.0.weight has shape \[8, 32\], wanted \[32, 32\]",
    ),
    "rewards of tokens": (
        {"score.weight": ROW}, {"architectures": ["Qwen2ForTokenClassification"]}, ConfigError, "for each token",
    ),
    "an unknown activation": (
        {"score.0.weight": SQUARE, "score.2.weight": ROW}, {}, ConfigError,
        r'which activation .* "fastrm": \{"head": \{"layers": 2, "activation": "silu", "bias": false\}',
    ),
    "a normalisation that no key speaks of": (
        {"score.weight": ROW, "mean": torch.tensor([0.25]), "std": torch.tensor([2.5])}, {}, ConfigError,
        "would be lost: mean, std",
    ),
    "a normalisation whose numbers are not in config.json": (
        {"score.weight": ROW, "mean": torch.tensor([0.25]), "std": torch.tensor([2.5])}, {"normalize_reward": True},
        ConfigError, "would be lost: mean, std",
    ),
    "a section beside OpenRLHF's keys": (
        {"score.weight": ROW}, {
            "fastrm": {"head": {"layers": 1, "bias": False}, "anchor": "last_token"}, "normalize_reward": True,
            "mean": 0.25, "std": 2.5,
        }, ConfigError, "has a `fastrm` section and normalize_reward",
    ),
    "an activation between some layers only": (
        {"score.0.weight": SQUARE, "score.2.weight": SQUARE, "score.3.weight": ROW},
        {"architectures": ["Qwen2ForRewardModel"]}, ConfigError, "between some layers of score.0.weight",
    ),
    "a head that is missing": (
        {}, {"architectures": ["LlamaForSequenceClassification"]}, ConfigError,
        "names LlamaForSequenceClassification, but no file holds the weights of its reward head",
    ),
    "no head": ({}, {}, ConfigError, "a backbone has no reward head yet"),
    "a layer too many": (
        {"model.layers.7.mlp.up_proj.weight": SQUARE}, {}, StorageError, "left out: model.layers.7.mlp.up_proj.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_no_weight_is_left_out_without_a_word(name, tmp_path):
    weights, keys, kind, message = REFUSED[name]
    save_backbone(tmp_path)
    add_weights(tmp_path, **weights)
    set_config(tmp_path, **keys)
    with pytest.raises(kind, match=message):
        rewards_of(tmp_path)


@pytest.mark.parametrize("template", ["{% for %}", "{{ raise_exception('no') }}"])
def test_a_template_that_renders_nothing_is_a_configuration_error(template, tmp_path):
    save_backbone(tmp_path, "llama", AutoModelForSequenceClassification, num_labels=1)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ConfigError, match="the chat template cannot render a question and an answer"):
        rewards_of(tmp_path)


def test_an_activation_that_no_file_states_is_said_to_be_the_configurations(tmp_path):
    save_backbone(tmp_path)
    add_weights(tmp_path, **{"score.0.weight": SQUARE, "score.2.weight": ROW})
    adopted, line = adopt(ModelConfig(path=str(tmp_path), head={"activation": "relu"}))
    assert adopted.head.activation == "relu"
    assert line.startswith("head: 2 layers, relu as model.head says, since no file does, no bias, from score.0.weight")


def test_a_pickled_head_is_named(tmp_path):
    save_backbone(tmp_path)
    (tmp_path / "value_head.bin").write_bytes(b"pickle")
    with pytest.raises(ConfigError, match=r"value_head.bin: a reward head in a format that can run code"):
        rewards_of(tmp_path)


def test_the_section_that_a_refusal_proposes_is_read(tmp_path):
    stock = save_backbone(tmp_path)
    add_weights(tmp_path, **{"score.0.weight": SQUARE, "score.2.weight": ROW})
    with pytest.raises(ConfigError) as refusal:
        rewards_of(tmp_path)
    text = str(refusal.value).partition('"fastrm": ')[2].rpartition(", with tanh")[0]
    set_config(tmp_path, fastrm=json.loads(text))
    reward = lambda h: nn.functional.silu(SQUARE @ h) @ ROW[0]  # noqa: E731
    wanted = stock_rewards(tmp_path, lambda ids: reward(stock.model(ids).last_hidden_state[0, -1]))
    assert_same(rewards_of(tmp_path)[0], wanted)


class TestTraining:
    """`fastrm train` goes on with the head that is there, or says what it leaves out."""

    @pytest.fixture
    def configuration(self, tmp_path):
        """(settings of the model) -> the configuration of one step from `base`, at a rate that changes nothing."""
        rows = write_rows(tmp_path / "train.jsonl", text_rows(8))

        def make(**model):
            file = tiny_config(tmp_path, rows)
            tree = yaml.safe_load(file.read_text())
            tree["model"] = {"path": str(tmp_path / "base"), **model}
            tree["optim"] |= {"lr": 1e-12, "batch_pairs": 4}
            tree["run"] |= {"max_steps": 1}
            file.write_text(yaml.safe_dump(tree))
            return load_config(file)

        return make

    def test_the_head_is_kept_and_said_and_the_run_is_of_its_depth(self, configuration, tmp_path, capsys):
        stock = save_backbone(tmp_path / "base", "qwen2", AutoModelForSequenceClassification, num_labels=1)
        train(configuration())
        output = capsys.readouterr().err
        assert "head: 1 layer, no bias, from score.weight; reads the last token" in output
        wanted = stock_rewards(tmp_path / "base", lambda ids: stock(ids).logits)
        assert_same(rewards_of(tmp_path / "run")[0], wanted)  # the run's folder stands for its model/
        kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]
        assert kept["head"] == {"layers": 1, "activation": "none", "bias": False, "new": False}

    def test_a_checkpoint_is_refused_with_the_command_that_exports_it(self, configuration, tmp_path):
        save_backbone(tmp_path / "base", "qwen2", AutoModelForSequenceClassification, num_labels=1)
        config = configuration()
        config = config.model_copy(update={"run": config.run.model_copy(update={"max_steps": 2, "save_every": 1})})
        train(config.model_copy(update={"optim": config.optim.model_copy(update={"lr": 0.01})}))
        checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
        with pytest.raises(ConfigError, match="is a checkpoint for going on with a run, not a model") as refusal:
            rewards_of(checkpoint)
        # As the message says, with a folder for FOLDER.
        run, _, step, _, folder = str(refusal.value).partition("fastrm export ")[2].split()
        assert folder == "FOLDER"
        export_checkpoint(Path(run), int(step), tmp_path / "new", "transformers", Display(silent=True))
        kept, made = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "new" / "model.safetensors")
        assert kept.keys() == made.keys() and all(torch.equal(kept[name], made[name]) for name in kept)

    def test_the_token_before_the_padding_is_read_in_training_too(self, configuration, tmp_path, capsys):
        stock = _with_pad_at_the_end(tmp_path / "base", num_labels=1)
        train(configuration())
        assert "reads the last token that is not padding" in capsys.readouterr().err
        wanted = stock_rewards(tmp_path / "base", lambda ids: stock(ids).logits)
        assert_same(rewards_of(tmp_path / "run" / "model")[0], wanted)
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model").eval()
        assert_same(stock_rewards(tmp_path / "run" / "model", lambda ids: again(ids).logits), wanted)

    def test_settings_that_contradict_the_files_are_refused(self, configuration, tmp_path, capsys):
        save_backbone(tmp_path / "base", "qwen2", AutoModelForSequenceClassification, num_labels=1)
        message = r"model.head.layers: got 2, but the reward head in .*base has 1; remove the key"
        for use in (train, dry_run):
            with pytest.raises(ConfigError, match=message):
                use(configuration(head={"layers": 2}))
        with pytest.raises(ConfigError, match=r"model.pooling: got 'mean', .* has 'anchor'"):
            train(configuration(pooling="mean"))

    def test_a_new_head_on_purpose_names_what_is_left_out(self, configuration, tmp_path, capsys):
        stock = save_backbone(tmp_path / "base", "qwen2", AutoModelForSequenceClassification, num_labels=1)
        train(configuration(head="new"))
        assert "head: new, 2 layers; left out on purpose: score.weight" in capsys.readouterr().err
        found, _ = rewards_of(tmp_path / "run")
        assert found[0] != pytest.approx(stock_rewards(tmp_path / "base", lambda ids: stock(ids).logits)[0], abs=1e-3)

    def test_an_adapter_goes_on_as_a_whole_model(self, configuration, tmp_path, capsys):
        save_backbone(tmp_path / "other")
        stock = merged(
            tmp_path / "other", save_adapter(tmp_path / "base", tmp_path / "other"), lambda module: 2.0
        )  # fmt: skip
        train(configuration())
        wanted = stock_rewards(tmp_path / "other", lambda ids: stock(ids).last_hidden_state[0, -1] @ ROW[0])
        assert_same(rewards_of(tmp_path / "run")[0], wanted)

    @pytest.mark.parametrize("use", [train, dry_run])
    def test_a_tokenizer_larger_than_the_embeddings_is_found_before_work(self, configuration, tmp_path, use):
        save_backbone(tmp_path / "base")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
        size = len(tokenizer)
        tokenizer.add_tokens(["<one>", "<two>"])
        tokenizer.save_pretrained(tmp_path / "base")
        message = f"2 of its {size + 2} tokens have no embedding, the first is '<one>' with id {size}"
        with pytest.raises(ConfigError, match=message):
            use(configuration())


def test_the_line_is_printed_by_score_and_eval(tmp_path, capsys):
    save_backbone(tmp_path / "base", "qwen2", AutoModelForSequenceClassification, num_labels=1)
    options = ScoringOptions(
        tokens_per_pack=4096, num_workers=0, device="cpu", dtype="fp32",
        limits=MediaLimits(10**6, 10**6),
    )  # fmt: skip
    with Display() as display:
        open_models(ModelChoice((tmp_path / "base",)), options, display)
    assert "head: 1 layer, no bias, from score.weight; reads the last token" in capsys.readouterr().err


def test_a_path_that_does_not_exist_is_said_with_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"runs/my/model: no such folder \(looked for {tmp_path}/runs/my/model\)"):
        rewards_of(Path("runs/my/model"))


@pytest.fixture
def waits(monkeypatch, tmp_path):
    """The seconds that the hub's client would wait, 23 at each file, while its hub cannot be reached."""
    waits = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waits.append)
    weight_files._hub_problem.cache_clear()
    yield waits
    weight_files._hub_problem.cache_clear()


def test_a_name_without_a_folder_is_an_error_at_once_where_the_hub_cannot_be_reached(tmp_path, waits):
    said = rf"'runs/model': no such folder here in {tmp_path}, and config.json does not come from the hub \(http://127"
    with pytest.raises(ConfigError, match=said):
        rewards_of("runs/model")
    assert waits == []


def test_a_model_of_the_hubs_cache_is_read_at_once_where_the_hub_cannot_be_reached(tmp_path, waits):
    """Its configuration and its tokenizer too, for which transformers asks the hub by itself."""
    cached = tmp_path / "cache" / "models--some--model"
    save_backbone(cached / "snapshots" / "abc", "qwen2", AutoModelForSequenceClassification, num_labels=1)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    assert rewards_of("some/model")[0] == rewards_of(cached / "snapshots" / "abc")[0]
    assert waits == []


def test_a_configuration_that_is_no_json_is_named(tmp_path):
    save_backbone(tmp_path, "qwen2", AutoModelForSequenceClassification, num_labels=1)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"')
    with pytest.raises(StorageError, match=r"config.json: cannot be read \(.*line 1.*\); download or copy it again"):
        rewards_of(tmp_path)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    """transformers makes one without a vocabulary, in which the first special token would be missed."""
    save_model(make_model("qwen2_5_vl"), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match="the folder has no tokenizer, wanted tokenizer"):
        rewards_of(tmp_path)


def test_a_run_that_has_exported_nothing_says_so(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="a run that has exported no model yet; finish it"):
        rewards_of(tmp_path)
