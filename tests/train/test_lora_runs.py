"""Runs with adapters: what they save, who can load it, and that a resumed run is the run."""

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fastrm import RewardModel, cli
from fastrm.errors import ConfigError
from fastrm.model.export import load_model
from fastrm.train.export_checkpoint import export_checkpoint
from fastrm.ui import Display
from tests.helpers.foreign_models import GROUPS, assert_same, tokens_of
from tests.helpers.lora_runs import lora_config, peft_rewards
from tests.helpers.runs import run
from tests.helpers.support import make_image, make_record, pack_of

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
IMAGE = make_image(80, 60, 1)


def adapter_of(folder):
    return {
        **load_file(folder / "run" / "model" / "adapter_model.safetensors"),
        **load_file(folder / "run" / "model" / "value_head.safetensors"),
    }


@pytest.mark.parametrize(
    ("family", "lora"),
    [("llama", {}), ("qwen2_5_vl", {"vision": True}), ("llama", {"dora": True, "rslora": True, "targets": ["v_proj"]})],
    ids=["text", "images", "dora"],
)
def test_what_a_run_saves_is_the_same_model_in_peft_and_merged_in_fastrm(family, lora, tmp_path):
    run(lora_config(tmp_path, family, {"lora": {"rank": 4, **lora}}))
    records = [make_record(n, images=[IMAGE] if "vl" in family and n else ()) for n in range(3)]
    merged = load_model(tmp_path / "run")
    assert merged.lora is None, "loading merges"
    rewards = merged(pack_of(merged, records)).detach()
    torch.testing.assert_close(rewards, peft_rewards(tmp_path / "run", records), rtol=1e-5, atol=2e-6)
    assert rewards.max() - rewards.min() > 0.02
    trained = [name for name in adapter_of(tmp_path) if ".lora_B." in name]
    assert all(adapter_of(tmp_path)[name].abs().max() > 0 for name in trained) and trained


def test_a_head_that_stock_classes_read_is_in_the_adapter_and_peft_gives_the_rewards(tmp_path):
    head = {"layers": 1, "bias": False}
    run(lora_config(tmp_path, model={"head": head}))
    model = tmp_path / "run" / "model"
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1, dtype=torch.float32)
    stock = peft.PeftModel.from_pretrained(stock, model).eval()
    stock.config.pad_token_id = None
    with torch.no_grad():
        wanted = [[float(stock(input_ids=ids).logits) for ids in group] for group in tokens_of(model)]
    found = RewardModel.from_pretrained(tmp_path / "run", device="cpu", dtype="fp32").score(GROUPS)
    assert_same(found, wanted)


def test_checkpoints_and_export_hold_no_weight_of_the_base(tmp_path):
    run(lora_config(tmp_path))
    names = []
    for file in (tmp_path / "run").rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names += tensors.keys()
    assert names and all("lora_" in name or "score." in name for name in names)


def test_a_merge_in_float32_keeps_changes_that_two_byte_weights_would_round_away(tmp_path):
    config = lora_config(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    run(config)
    export_checkpoint(
        tmp_path / "run", 6, tmp_path / "plain", "transformers", Display(silent=True), torch.float32, merge=True
    )
    found, wanted = (load_model(tmp_path / name).state_dict() for name in ("plain", "run"))
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    rounded = {name for name, tensor in wanted.items() if not torch.equal(tensor.bfloat16().float(), tensor)}
    assert any("q_proj" in name for name in rounded)


def test_a_checkpoint_is_exported_as_a_plain_model_with_the_rewards_of_the_run(tmp_path):
    run(lora_config(tmp_path))
    export_checkpoint(tmp_path / "run", 6, tmp_path / "plain", "transformers", Display(silent=True), merge=True)
    assert not (tmp_path / "plain" / "adapter_config.json").exists()
    wanted = RewardModel.from_pretrained(tmp_path / "run", device="cpu", dtype="fp32").score(GROUPS)
    found = RewardModel.from_pretrained(tmp_path / "plain", device="cpu", dtype="fp32").score(GROUPS)
    assert_same(found, wanted)


@pytest.mark.parametrize("head", [{}, {"layers": 1, "bias": False}], ids=["two layers", "one"])
def test_a_checkpoint_is_exported_as_the_adapters_that_the_run_leaves(head, tmp_path):
    settings = {"save_every": 3, "eval_every": 3, "export": "best", "keep_checkpoints": 9}
    path = lora_config(tmp_path, model={"head": head}, run=settings)
    rows = str(tmp_path / "rows.jsonl")
    summary = run(path, "data.eval=[{path: " + rows + ", cap: 8}]", "run.early_stopping={metric: eval/margin}")
    for name, step in (("six", 6), ("three", 3), ("best", None)):
        export_checkpoint(tmp_path / "run", step, tmp_path / name, "transformers", Display(silent=True))
    six, three, best, left = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        for name in ("six", "three", "best", "run/model")
    )
    assert left == best == (six if summary["exported_step"] == 6 else three) and six != three


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--step", "6", "--for", "vllm"], "--for vllm is for whole models"),
        (["--step", "6", "--dtype", "bf16"], "--dtype is for whole models"),
    ],
)
def test_what_adapters_cannot_be_exported_as_is_refused(words, message, tmp_path, monkeypatch, capsys):
    run(lora_config(tmp_path))
    monkeypatch.setattr("sys.argv", ["fastrm", "export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), *words])
    with pytest.raises(SystemExit) as leave:
        cli.main()
    assert leave.value.code == 64 and message in capsys.readouterr().err and not (tmp_path / "out").exists()


SETTINGS = {
    "plain": {},
    "dropout": {"model": {"lora": {"rank": 4, "dropout": 0.3}, "activation_checkpointing": "full"}},
    "bf16 weights, 8-bit states": {
        "model": {"lora": {"rank": 64}}, "precision": {"dtype": "bf16", "weights": "bf16"}, "optim": {"states": "8bit"},
    },
    "nf4": {"model": {"quantize": "nf4"}, "precision": {"dtype": "bf16"}},
    "fp8": {"precision": {"dtype": "bf16", "fp8": "rowwise"}},
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_resumed_run_is_the_run_to_the_bit(settings, tmp_path):
    path = lora_config(tmp_path, **settings)
    run(path)
    wanted = adapter_of(tmp_path)
    assert {tensor.dtype for tensor in wanted.values()} == {torch.float32}
    shutil.rmtree(tmp_path / "run" / "model")
    run(path, resume=str(tmp_path / "run" / "checkpoints" / "step-00000003"))
    found = adapter_of(tmp_path)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_adapters_of_another_base_are_refused_when_they_are_loaded_and_when_a_run_goes_on(tmp_path):
    path = lora_config(tmp_path)
    run(path)
    export_checkpoint(tmp_path / "run", 3, tmp_path / "step-3", "transformers", Display(silent=True))
    weights = load_file(tmp_path / "base" / "model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in weights.items()}, tmp_path / "base" / "model.safetensors")
    for folder in ("run", "step-3"):
        with pytest.raises(ConfigError, match=r"is an adapter of another base: the weights in .* are not those that"):
            load_model(tmp_path / folder)
    with pytest.raises(ConfigError, match=r"holds adapters of other weights than .*base has now; restore them"):
        run(path, resume=str(tmp_path / "run" / "checkpoints" / "step-00000003"))


def test_an_adapter_is_not_put_on_an_adapter(tmp_path):
    run(lora_config(tmp_path))
    other = tmp_path / "other"
    other.mkdir()
    path = lora_config(other, model={"path": str(tmp_path / "run" / "model")})
    with pytest.raises(ConfigError, match=r"is an adapter, and model.lora would put another one on it; merge it first"):
        run(path)


def test_dropout_changes_a_run_and_not_its_evaluation(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, rate in ((one, 0.0), (other, 0.3)):
        folder.mkdir()
        run(lora_config(folder, model={"lora": {"rank": 4, "dropout": rate}}))
    assert not torch.equal(*(next(iter(adapter_of(folder).values())) for folder in (one, other)))
    network = load_model(other / "run")
    records = [make_record(n) for n in range(2)]
    torch.testing.assert_close(
        network(pack_of(network, records)).detach(), peft_rewards(other / "run", records), rtol=1e-5, atol=2e-6
    )
