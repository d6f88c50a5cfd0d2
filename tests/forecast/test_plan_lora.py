"""Adapters in a forecast: what is trained, stored and written is what a run trains, stores and writes."""

import pytest
import torch
import yaml

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")
from fastrm.config import load_config
from fastrm.forecast.fake_step import FakeSteps
from fastrm.forecast.full_pack import PackShape
from fastrm.forecast.hardware import find_gpu
from fastrm.forecast.memory import peak_of
from fastrm.forecast.needs import disk_of
from fastrm.forecast.parameters import count_parameters, sum_parameters
from fastrm.forecast.plan import Assumptions
from fastrm.forecast.workload import typical_workload
from fastrm.model.architectures import find_architecture, meta_network
from fastrm.model.lora import num_elements, quantised_modules
from fastrm.train.encoder import make_tokenizer
from fastrm.train.engine import LocalEngine
from fastrm.train.optim import training_bytes
from fastrm.train.setup import make_network
from fastrm.ui import gib
from tests.helpers.lora_runs import lora_config
from tests.helpers.project import PROJECT
from tests.helpers.runs import run
from tests.helpers.stock import save_stock_checkpoint
from tests.helpers.support import make_model

SETTINGS = {
    "adapters": {},
    "8-bit states": {"model": {"lora": {"rank": 64}}, "optim": {"states": "8bit"}},
    "nf4": {"model": {"quantize": "nf4"}, "precision": {"dtype": "bf16"}},
}


def planned(config):
    return meta_network(find_architecture(config.model)[0], config.model)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_parameters_training_state_and_files_are_those_of_a_run(settings, tmp_path):
    path = lora_config(tmp_path, **settings)
    config = load_config(path)
    network, real = planned(config), make_network(config, make_tokenizer(config))
    count = sum_parameters(count_parameters(network))
    assert count.total == sum(map(num_elements, real.parameters()))
    assert count.trainable == sum(p.numel() for p in real.parameters() if p.requires_grad)
    engine = LocalEngine(real, config)
    state = training_bytes(network, config)
    scales = sum(module.quant_state.absmax.nbytes for module in quantised_modules(real).values())
    assert state.weights == sum(p.nbytes for p in engine.network.parameters()) + scales
    assert (scales > 0) == ("quantize" in settings.get("model", {}))
    assert state.gradients == 4 * count.trainable
    run(path)
    disk, folder = disk_of(config, network), tmp_path / "run"
    weights = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
    saved = sum(file.stat().st_size for file in (folder / "checkpoints" / "step-00000006").glob("*.safetensors"))
    # Headers, of some 150 bytes a tensor, are not counted.
    assert disk.export == pytest.approx(weights, rel=0.3) and weights > disk.export
    assert disk.checkpoint == pytest.approx(saved, rel=0.4) and saved > disk.checkpoint


def test_a_step_with_adapters_holds_less_than_one_of_the_whole_model_and_nf4_less_than_that(tmp_path):
    config = load_config(lora_config(tmp_path, model={"activation_checkpointing": "full"}))
    plain = config.model_copy(update={"model": config.model.model_copy(update={"lora": None})})
    nf4 = config.model_copy(update={"model": config.model.model_copy(update={"quantize": "nf4"})})
    totals = []
    for one in (plain, config, nf4):
        network = planned(one)
        totals.append(peak_of(FakeSteps(network), one, 1, typical_workload(one, network)))
    assert totals[0].gradients > 4 * totals[1].gradients and totals[0].states > 4 * totals[1].states
    assert totals[1].weights > totals[2].weights
    assert all(isinstance(peak.activations, int) and peak.activations > 0 for peak in totals)


def test_a_frozen_lm_head_is_kept_in_the_dtype_of_its_files(tmp_path):
    """One in float32 would be copied in bf16 by every pass."""
    save_stock_checkpoint(tmp_path / "base", make_model("llama"), torch.bfloat16)
    path = lora_config(tmp_path, precision={"dtype": "bf16"})
    config = load_config({"paradigm": "judge"} | yaml.safe_load(path.read_text()))
    network = meta_network(find_architecture(config.model)[0], config.model, config.paradigm)
    shape = PackShape.of_groups([(32, (24,))], None, 1, share=True)
    lives, _ = FakeSteps(network).lives(config, shape, "eager", alone=True)
    assert 2 * network.lm_head.weight.numel() not in [life.num_bytes for life in lives]
    precision = config.precision.model_copy(update={"weights": "fp32"})
    wide = config.model_copy(update={"precision": precision})
    lives, _ = FakeSteps(network).lives(wide, shape, "eager", alone=True)
    assert 2 * network.lm_head.weight.numel() in [life.num_bytes for life in lives]


SMALL = ["model.quantize=nf4", "optim.tokens_per_pack=8192", "data.max_tokens_per_group=8192"]
ROWS = [("80 GB (h100)", "h100", []), ("80 GB (h100)", "h100", SMALL[:1]), ("24 GB (rtx4090)", "rtx4090", SMALL)]


def test_the_table_of_the_page_is_that_of_the_plan():
    rows = []
    for name, gpu, overrides in ROWS:
        config = load_config(PROJECT / "configs" / "lora.yaml", overrides)
        network = planned(config)
        peak = peak_of(FakeSteps(network), config, 1, typical_workload(config, network))
        usable = Assumptions(1, find_gpu(gpu), 1, "").usable_bytes
        assert peak.total < usable
        pack = peak.total - peak.weights - peak.gradients - peak.states
        cells = [
            name, f"{config.optim.tokens_per_pack:,}", config.model.quantize or "bf16",
            *map(gib, (peak.weights, peak.gradients + peak.states, pack, peak.total, usable)),
        ]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    assert "\n".join(rows) in (PROJECT / "docs" / "lora.md").read_text(), "\n".join(rows)
