"""The check of a loaded model against the stock class: it agrees, it finds what is wrong, and it costs once."""

import json

import pytest
import torch

import fastrm
from bench.models import check_exactness
from fastrm.config import load_config
from fastrm.data.group import GroupSize, encode_group
from fastrm.data.media.qwen2_vl import stock_keeps_video_seconds
from fastrm.data.record import Message, Record, Response
from fastrm.errors import ExactnessError, RecordError
from fastrm.evaluate.reward_model import DTYPES
from fastrm.model import exactness, first_use, layers
from fastrm.model.exactness import Agreement, StockModel, check_network, describe
from fastrm.model.export import save_model
from fastrm.model.first_use import FirstUse
from fastrm.model.precision import convert_to_fp8
from fastrm.model.samples import pick_samples
from fastrm.model.vision import qwen2_vl
from fastrm.train.loop import train
from tests.helpers.runs import colour_rows, fastrm_here, text_rows, tiny_config, write_rows
from tests.helpers.support import FAMILIES, make_image, make_model, make_record, pack_of
from tests.helpers.video_files import make_video

VISION = [name for name in FAMILIES if "vl" in name]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def stock_models(monkeypatch) -> list:
    """Every stock model that is made, in order."""
    made = []

    class Counted(StockModel):
        def __init__(self, network):
            super().__init__(network)
            made.append(self)

    monkeypatch.setattr(exactness, "StockModel", Counted)
    return made


def _records(family):
    image = [make_record(2, num_responses=4, images=[make_image(112, 90, 1)])] if family in VISION else []
    return [make_record(1, num_responses=3), *image]


def _samples(network, records):
    groups = [encode_group(record, network.encoder) for record in records]
    return pick_samples([GroupSize.of(group) for group in groups], groups.__getitem__, network.encoder)


def _tamper(monkeypatch, *, of=lambda mlp: True):
    """Our layers take another activation than the config's, as they did before `hidden_act` was read."""
    stock_mlp = layers.apply_mlp

    def tampered(mlp, states, kernels):
        gelu = kernels._replace(gate=lambda activation, gate, up: torch.nn.functional.gelu(gate) * up)
        return stock_mlp(mlp, states, gelu if of(mlp) else kernels)

    for module in (layers, qwen2_vl):
        monkeypatch.setattr(module, "apply_mlp", tampered)


class TestAgreement:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize(
        ("dtype", "autocast"),
        [(torch.float32, None), (torch.bfloat16, None), (torch.float32, torch.bfloat16)],
        ids=["fp32", "bf16", "autocast"],
    )
    def test_every_family_agrees_in_every_precision(self, family, dtype, autocast):
        for seed in range(2):
            network = make_model(family, seed=seed, dtype=dtype)
            samples = _samples(network, _records(family))
            assert samples.keys() == ({"text", "image"} if family in VISION else {"text"})
            for sample in samples.values():
                found = check_network(network, sample, autocast=autocast)
                used = autocast or dtype
                wanted = [(used, True)] + [(torch.float32, False)] * (used is not torch.float32)
                assert [(DTYPES[part.dtype], part.whole) for part in found] == wanted
                for part in found:
                    assert part.num_rewards == 2
                    # A bound that could hide a fault would be no bound: rewards are of order 1.
                    assert 0 < part.bound <= 400 * torch.finfo(DTYPES[part.dtype]).eps
                    # Far below the bound, which must not be met by chance.
                    assert part.difference <= part.bound / 3

    @pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl", "qwen3"])
    @pytest.mark.parametrize("setting", ["fused", "compiled", "fp8", "mean"])
    def test_settings_that_change_no_reward_agree(self, family, setting):
        network = make_model(family, pooling="mean" if setting == "mean" else "anchor")
        options = {}
        if setting == "compiled":
            graphs = network.compile_layers("eager")
        if setting == "fused":
            network.fuse_projections()
        if setting == "fp8":
            pytest.importorskip("torchao")
            network.fp8 = convert_to_fp8(network, "rowwise")
            options = {"autocast": torch.bfloat16, "multiple": 16}
        network.set_kernels(torch.float32, attention="sdpa")
        for sample in _samples(network, _records(family)).values():
            for found in check_network(network, sample, **options):
                assert found.difference <= found.bound / 3
        if setting == "compiled":
            assert graphs.count == 0, "the check compiled a graph that no step needs"
            network(pack_of(network, _records(family)))
            assert graphs.count > 0, "the network is not compiled any more"

    @pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
    def test_a_video_agrees(self, family):
        pytest.importorskip("av")
        network = make_model(family)
        question = Message("user", (make_video(8, 64, 48), "What moves?"))
        responses = tuple(Response((question, Message("assistant", (text,)))) for text in ("a ball", "nothing at all"))
        samples = _samples(network, [Record("v", responses, (), "test", "test:v")])
        if family == "qwen2_5_vl" and not stock_keeps_video_seconds():
            assert not samples, "an old transformers gives frames other times"
            return
        assert samples.keys() == {"video"}
        (found,) = check_network(network, samples["video"])
        assert found.difference <= found.bound / 3

    def test_nothing_is_copied_and_nothing_is_changed(self):
        network = make_model("qwen2_5_vl").train()
        network.fuse_projections()
        stock = StockModel(network)
        mine = {parameter.untyped_storage().data_ptr() for parameter in network.model.parameters()}
        assert {parameter.untyped_storage().data_ptr() for parameter in stock._model.parameters()} == mine
        config, state = network.model.config.to_dict(), torch.get_rng_state()
        attention = network.model.config._attn_implementation
        (sample, *_) = _samples(network, _records("qwen2_5_vl")).values()
        check_network(network, sample)
        assert torch.equal(torch.get_rng_state(), state)
        assert network.training and all(p.grad is None and p.requires_grad for p in network.parameters())
        assert network.model.config.to_dict() == config and network.model.config._attn_implementation == attention
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


class TestFaults:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
    def test_an_activation_that_is_not_read_is_found(self, family, autocast, monkeypatch):
        network = make_model(family)
        _tamper(monkeypatch)
        with pytest.raises(ExactnessError, match=r"response \d has reward .* here and .* in transformers"):
            for sample in _samples(network, _records(family)).values():
                check_network(network, sample, autocast=autocast)

    def test_a_fault_of_the_vision_tower_is_found_with_an_image(self, monkeypatch):
        network = make_model("qwen2_5_vl")
        samples = _samples(network, _records("qwen2_5_vl"))
        _tamper(monkeypatch, of=lambda mlp: mlp.down_proj.bias is not None)
        assert check_network(network, samples["text"])[0].difference <= 1e-5
        with pytest.raises(ExactnessError):
            check_network(network, samples["image"])

    def test_the_complaint_names_keys_and_kernels(self, monkeypatch):
        monkeypatch.setitem(FAMILIES, "llama", {**FAMILIES["llama"], "logit_scale": 2.0})
        network = make_model("llama")
        network.norm_and_gate = "Liger RMSNorm and SwiGLU"
        _tamper(monkeypatch)
        (sample,) = _samples(network, _records("llama")).values()
        with pytest.raises(ExactnessError) as caught:
            check_network(network, sample)
        assert "keys of config.json that fastrm does not know and stock may read: logit_scale" in str(caught.value)
        assert "try kernels: eager" in str(caught.value)
        assert caught.value.exit_code == 65

    def test_what_stock_cannot_read_is_one(self):
        network = make_model("qwen2_5_vl")
        samples = _samples(network, _records("qwen2_5_vl"))
        network.model.config.image_token_id = 5
        with pytest.raises(ExactnessError, match=r"not comparable: test:2: transformers .* fails on what was scored"):
            check_network(network, samples["image"])

    def test_rewards_that_stock_has_not_either_are_no_finding(self):
        network = make_model("llama")
        network.model.norm.weight.data[0] = torch.nan
        (sample,) = _samples(network, _records("llama")).values()
        assert check_network(network, sample) == []

    def test_a_reward_that_only_stock_has_is_one(self, monkeypatch):
        network = make_model("llama")
        monkeypatch.setattr(layers, "apply_mlp", lambda mlp, states, kernels: states * torch.nan)
        (sample,) = _samples(network, _records("llama")).values()
        with pytest.raises(ExactnessError, match="has reward nan here"):
            check_network(network, sample)


class TestTraining:
    def test_a_run_ends_with_65_before_its_first_step(self, tmp_path, monkeypatch, capfd):
        config = tiny_config(tmp_path, colour_rows(tmp_path, 8))
        _tamper(monkeypatch)
        code, told = fastrm_here(capfd, "train", config)
        assert code == 65
        assert "not exact:" in told and json.loads(told.splitlines()[-1])["error"] == "ExactnessError"
        assert not (tmp_path / "run" / "checkpoints").exists()
        assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
        code, told = fastrm_here(capfd, "train", config, "check_exactness=false")
        assert code == 0, told

    def test_the_check_changes_no_bit_of_a_run_and_costs_once(self, tmp_path, stock_models, capfd):
        rows = colour_rows(tmp_path, 12)
        losses = []
        for name in ("checked", "again", "unchecked"):
            (tmp_path / name).mkdir()
            config = tiny_config(tmp_path / name, rows, run={"max_steps": 3, "save_every": 1})
            train(load_config(config, [f"check_exactness={str(name != 'unchecked').lower()}"]))
            lines = (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()
            losses.append([(json.loads(line)["loss"], json.loads(line)["grad_norm"]) for line in lines])
            told = capfd.readouterr().err
            assert ("exact: 2 rewards agree with transformers to" in told) == (name != "unchecked")
            assert len(stock_models) == 1
        assert losses[0] == losses[1] == losses[2]
        resumed = load_config(tmp_path / "checked" / "config.yaml", ["run.max_steps=4"])
        train(resumed, "required")
        assert len(stock_models) == 1


class TestScoring:
    @pytest.fixture
    def folder(self, tmp_path):
        save_model(make_model("qwen2_5_vl"), tmp_path / "model")
        return tmp_path / "model"

    def test_score_and_eval_end_with_65(self, folder, tmp_path, monkeypatch, capfd):
        rows = write_rows(tmp_path / "rows.jsonl", text_rows(4))
        _tamper(monkeypatch)
        out = tmp_path / "out.jsonl"
        for command in (("score", folder, rows, "--out", out), ("eval", folder, rows)):
            code, told = fastrm_here(capfd, *command, "--num-workers", "0")
            assert code == 65
            assert "not exact:" in told
            assert not out.exists()
        assert (
            fastrm_here(capfd, "score", folder, rows, "--out", out, "--num-workers", "0", "--no-check-exactness")[0]
            == 0
        )
        assert len(out.read_text().splitlines()) == 4

    def test_a_folder_is_checked_once(self, folder, tmp_path, stock_models, capfd):
        rows = write_rows(tmp_path / "rows.jsonl", text_rows(4))
        told = [
            fastrm_here(capfd, "score", folder, rows, "--out", tmp_path / "out.jsonl", "--num-workers", "0")
            for _ in range(2)
        ]
        assert [code for code, _ in told] == [0, 0]
        assert all(text.count("exact: 2 rewards agree with transformers to") == 1 for _, text in told)
        assert len(stock_models) == 1

    def test_python_checks_images_when_the_first_one_comes(self, folder, monkeypatch):
        model = fastrm.RewardModel.from_pretrained(folder)
        text = {"prompt": "Is it?", "responses": ["yes", "no"]}
        rewards = model.score([text])
        _tamper(monkeypatch, of=lambda mlp: mlp.down_proj.bias is not None)
        assert model.score([text]) == rewards
        image = {**text, "images": [make_image(60, 60).data]}
        for _ in range(2):  # an error is no result that would be kept
            with pytest.raises(ExactnessError):
                model.score([image])
        fastrm.RewardModel.from_pretrained(folder, check_exactness=False).score([image])

    @pytest.mark.parametrize("change", ["weights", "config", "code"])
    def test_what_has_changed_is_checked_again(self, change, folder, stock_models, monkeypatch):
        group = {"prompt": "Is it?", "responses": ["yes", "no"]}
        fastrm.RewardModel.from_pretrained(folder).score([group])
        if change == "weights":
            save_model(make_model("qwen2_5_vl", seed=1), folder)
        if change == "config":
            tree = json.loads((folder / "config.json").read_text())
            tree["text_config"]["rms_norm_eps"] = 1e-5
            (folder / "config.json").write_text(json.dumps(tree))
        if change == "code":
            monkeypatch.setattr(first_use, "_code", lambda: "another")
        fastrm.RewardModel.from_pretrained(folder).score([group])
        assert len(stock_models) == 2

    def test_a_cache_that_cannot_be_used_is_no_error(self, folder, tmp_path, stock_models, monkeypatch):
        (tmp_path / "file").write_text("")
        group = {"prompt": "Is it?", "responses": ["yes", "no"]}
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        for _ in range(2):
            fastrm.RewardModel.from_pretrained(folder).score([group])
        assert len(stock_models) == 2
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        fastrm.RewardModel.from_pretrained(folder).score([group])
        (kept,) = first_use.cache_folder().iterdir()
        assert kept.is_relative_to(tmp_path / "cache" / "fastrm")
        kept.write_text("{")  # cut off
        fastrm.RewardModel.from_pretrained(folder).score([group])
        assert len(stock_models) == 4

    def test_relative_folders_of_the_cache_are_ignored(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HOME", str(tmp_path))
        for value in ("", "cache"):
            monkeypatch.setenv("XDG_CACHE_HOME", value)
            assert first_use.cache_folder() == tmp_path / ".cache" / "fastrm" / "exact"


def test_the_shortest_groups_that_can_be_read_are_taken():
    network = make_model("qwen2_5_vl")
    records = [
        make_record(1, prompt_words=40), make_record(2, prompt_words=5), make_record(3, images=[make_image(200, 200)]),
        make_record(4, images=[make_image(40, 40)]),
    ]  # fmt: skip
    groups = [encode_group(record, network.encoder) for record in records]

    def load(number):
        if number == 1:
            raise RecordError("IMAGE_MISSING", "gone")
        return groups[number]

    found = pick_samples([GroupSize.of(group) for group in groups], load, network.encoder)
    assert {kind: sample.group.id for kind, sample in found.items()} == {"text": "r1", "image": "r4"}
    assert FirstUse(network, "no weights")([], load) is None


def test_two_layers_stand_for_a_model_that_is_too_large(monkeypatch):
    for family in FAMILIES:
        network = make_model(family, dtype=torch.bfloat16)
        samples = _samples(network, _records(family)).values()
        monkeypatch.setattr(exactness, "CPU_OPERATIONS", 10**3)
        for sample in samples:
            (found,) = check_network(network, sample)
            assert not found.whole and found.dtype == "fp32"
            assert found.difference <= found.bound / 3
    with monkeypatch.context() as patch:
        _tamper(patch)
        with pytest.raises(ExactnessError):
            check_network(network, sample)


@pytest.mark.parametrize(
    ("found", "line"),
    [
        ([("fp32", True, 3e-7), ("fp32", True, 1e-8)], "exact: 4 rewards agree with transformers to 3e-7"),
        ([("fp32", True, 0.0)], "exact: 2 rewards agree with transformers to the bit"),
        (
            [("bf16", True, 0.002), ("fp32", False, 2e-12), ("bf16", True, 0.01), ("fp32", False, 1e-12)],
            "exact: 4 rewards agree with transformers to 1e-2 in bf16, those of the first 2 layers to 2e-12 in fp32",
        ),
        ([("fp32", False, 1e-7)], "exact: 2 rewards of the first 2 layers agree with transformers to 1e-7 in fp32"),
    ],
)
def test_the_line_says_how_many_rewards_and_how_far(found, line):
    parts = [Agreement(2, difference, 1.0, dtype, whole, "") for dtype, whole, difference in found]
    assert describe(parts) == line


def test_the_bench_measures_a_check(tmp_path, capsys):
    save_model(make_model("qwen2_5_vl"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["fastrm"]  # a backbone
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    parts = check_exactness.measure(str(tmp_path / "model"), "bf16")
    assert [(part.dtype, part.whole) for part in parts] == [("bf16", True), ("fp32", False)] * 2
    told = capsys.readouterr().out
    assert "text: all layers in bf16: difference" in told and "image: two layers in fp32: difference" in told
