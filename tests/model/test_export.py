"""Exports: in shards, in another dtype, with a tensor of memory, complete or not at all."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoModelForSequenceClassification

from fastrm.config import Config, HeadConfig
from fastrm.errors import StorageError
from fastrm.model import weight_writer
from fastrm.model.export import export_dtype, load_model, save_model
from fastrm.model.stock_classes import GUARD, read_by_stock
from fastrm.model.weight_files import INDEX, WeightFiles
from fastrm.model.weight_writer import WeightWriter
from fastrm.train.setup import export_model
from tests.helpers.own_process import environment
from tests.helpers.support import make_model


@pytest.fixture
def network():
    return make_model("qwen2_5_vl")


def test_shards_with_the_stock_index_load_here_and_in_transformers(network, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_writer, "SHARD_BYTES", 160_000)
    save_model(network, tmp_path / "model")
    index = json.loads((tmp_path / "model" / INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    assert (
        names == [f"model-{n:05}-of-{len(names):05}.safetensors" for n in range(1, len(names) + 1)] and len(names) > 2
    )
    shards = {name: load_file(tmp_path / "model" / name) for name in names}
    sizes = [sum(tensor.nbytes for tensor in shard.values()) for shard in shards.values()]
    assert max(sizes) <= 160_000 and sum(sizes) == index["metadata"]["total_size"]
    state = network.state_dict()
    found = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    names = {name: read_by_stock(network).file_name(name, "qwen2_5_vl") for name in state}
    assert found.keys() == {*names.values(), GUARD} == index["weight_map"].keys()
    assert all(torch.equal(found[names[name]], tensor) for name, tensor in state.items())
    again = load_model(tmp_path / "model").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    stock, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert set(report["missing_keys"]) <= {"lm_head.weight"}
    assert all(torch.equal(state[f"model.{name}"], tensor) for name, tensor in stock.model.state_dict().items())


def test_bf16_rounds_the_backbone_and_not_the_head(network, tmp_path):
    save_model(network, tmp_path / "model", dtype=torch.bfloat16)
    state = load_file(tmp_path / "model" / "model.safetensors")
    for name, tensor in network.state_dict().items():
        stored = state[read_by_stock(network).file_name(name, "qwen2_5_vl")]
        assert torch.equal(stored, tensor if name.startswith("score.") else tensor.bfloat16()), name
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    assert WeightFiles.open(tmp_path / "model").dtype is torch.bfloat16
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert stock.model.dtype is torch.bfloat16


def test_a_bf16_export_loads_as_a_stock_classifier(tmp_path):
    network = make_model("qwen2", head=HeadConfig(layers=1, bias=False))
    save_model(network, tmp_path / "model", dtype=torch.bfloat16)
    stock, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(stock.score.weight, network.score.weight)
    assert torch.equal(stock.model.norm.weight, network.model.norm.weight.bfloat16().float())


@pytest.mark.parametrize(
    ("precision", "wanted", "dtype"),
    [("bf16", "auto", torch.bfloat16), ("fp32", "auto", torch.float32), ("bf16", "fp32", torch.float32),
     ("fp32", "bf16", torch.bfloat16)],
)  # fmt: skip
def test_the_dtype_is_that_of_the_runs_matrix_products_or_the_one_asked_for(precision, wanted, dtype):
    model = {"path": "anything", "export_dtype": wanted}
    assert export_dtype(Config.model_validate({"model": model, "precision": {"dtype": precision}})) is dtype


def test_odd_sizes_lie_where_every_reader_finds_them(tmp_path):
    tensors = {
        "a": torch.randn(3).bfloat16(),
        "b": torch.randn(5, 1),
        "c": torch.randn(()).half(),
        "d": torch.randn(0, 4),
    }
    writer = WeightWriter(tmp_path, [(name, tuple(t.shape), t.dtype) for name, t in tensors.items()])
    for name in reversed(tensors):
        writer.write(name, tensors[name])
    writer.close()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
    files = WeightFiles.open(tmp_path)
    assert all(torch.equal(files[name].read(), tensor) for name, tensor in tensors.items())
    assert all(files[name].start % tensor.element_size() == 0 for name, tensor in tensors.items())


def test_a_weight_that_never_came_is_an_error(tmp_path):
    writer = WeightWriter(tmp_path, [("a", (2,), torch.float32), ("b", (2,), torch.float32)])
    writer.write("a", torch.zeros(2))
    with pytest.raises(ValueError, match="1 weights were never written, one of them b"):
        writer.close()


class TestFailures:
    """What was there stays, and nothing half written is left."""

    @pytest.fixture
    def folder(self, network, tmp_path):
        save_model(network, tmp_path / "model")
        return tmp_path

    @staticmethod
    def contents(folder):
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def test_a_disk_without_room_is_named_before_anything_is_written(self, network, folder, monkeypatch):
        before = self.contents(folder)
        monkeypatch.setattr(weight_writer, "free_disk", lambda path: 1000)
        monkeypatch.setattr(os, "pwrite", lambda *_: pytest.fail("something was written"))
        with pytest.raises(StorageError, match=r"the weights have [\d,]+ bytes, the disk has room for 1,000"):
            save_model(network, folder / "model")
        assert self.contents(folder) == before

    @pytest.mark.parametrize("num_writes", [0, 10])  # the header is the first
    def test_a_disk_that_fills_up(self, network, folder, monkeypatch, num_writes):
        before, pwrite, calls = self.contents(folder), os.pwrite, []

        def full_after_some(*arguments):
            calls.append(arguments)
            if len(calls) > num_writes:
                raise OSError(errno.ENOSPC, "No space left on device")
            return pwrite(*arguments)

        monkeypatch.setattr(os, "pwrite", full_after_some)
        num_open = len(os.listdir("/proc/self/fd"))
        with pytest.raises(StorageError, match="could not be written: No space left on device; free some space"):
            save_model(network, folder / "model")
        assert self.contents(folder) == before
        # An open file would keep the room of one that is deleted.
        assert len(os.listdir("/proc/self/fd")) == num_open

    def test_the_first_rank_goes_on_taking_tensors_since_others_wait_for_it(self, network, folder, monkeypatch):
        taken = []

        def tensors():
            for name, tensor in network.state_dict().items():
                taken.append(name)
                yield name, tensor

        def fail(*_):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "pwrite", fail)
        config = Config.model_validate({"model": {"path": "anything"}})
        engine = type("Engine", (), {"network": network, "config": config, "model_tensors": staticmethod(tensors)})()
        with pytest.raises(StorageError, match="Input/output error; check the folder"):
            export_model(engine, folder / "model")
        assert taken == list(network.state_dict())


MEASURE = """
import sys, torch
from pathlib import Path
from fastrm.model.export import save_model
from bench.harness.memory import reset_peak, status_bytes
from tests.helpers.support import make_model
save_model(make_model("qwen2"), Path(sys.argv[1]) / "tiny")
from transformers import AutoConfig, AutoModel
sizes = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=8)
network = make_model("qwen2")
network.model = AutoModel.from_config(AutoConfig.for_model("qwen2", **sizes, num_key_value_heads=2, vocab_size=20_000))
before = status_bytes("VmRSS")
reset_peak()
save_model(network, Path(sys.argv[1]) / "model", dtype=torch.bfloat16)
print(status_bytes("VmHWM") - before, max(p.numel() * 2 for p in network.parameters()))
"""


def test_an_export_takes_one_tensor_of_memory(tmp_path):
    """Peak resident memory of a process over what the model itself takes, while 210 MB of bf16 are written."""
    command = [sys.executable, "-c", MEASURE, tmp_path]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment())
    peak, largest = map(int, done.stdout.split()[-2:])
    assert (tmp_path / "model" / "model.safetensors").stat().st_size > 2e8
    assert peak < 1.2 * largest + 10e6
