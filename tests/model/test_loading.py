"""Weights from files: the right ones, in the right dtype, in no more memory than they need, or a named error."""

import json
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fastrm import RewardModel
from fastrm.config import load_config
from fastrm.errors import ConfigError, StorageError
from fastrm.evaluate.models import open_models
from fastrm.evaluate.options import ModelChoice, ScoringOptions
from fastrm.limits import MediaLimits
from fastrm.model import weight_files
from fastrm.model.export import load_model, save_model
from fastrm.model.fusion import fuse_projections
from fastrm.model.loading import load_backbone, open_backbone
from fastrm.model.weight_files import WeightFiles
from fastrm.train.loop import train
from tests.helpers.own_process import environment
from tests.helpers.runs import text_rows, tiny_config, write_rows
from tests.helpers.stock import save_stock_checkpoint
from tests.helpers.support import make_model


@pytest.fixture(scope="module")
def network():
    return make_model("qwen2_5_vl")


@pytest.fixture
def sharded(network, tmp_path):
    """A bf16 checkpoint in several shards, and the names of these."""
    save_stock_checkpoint(tmp_path, network, shard="60KB")
    names = sorted(set(json.loads((tmp_path / weight_files.INDEX).read_text())["weight_map"].values()))
    assert len(names) > 2
    return tmp_path, names


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl", "internvl", "qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_weights_and_buffers_are_those_of_transformers_own_loading(family, dtype, tmp_path):
    from transformers import AutoModel

    save_stock_checkpoint(tmp_path, make_model(family), torch.bfloat16, "60KB")
    stock = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    generator = torch.get_rng_state()
    mine = load_backbone(str(tmp_path), dtype)
    assert torch.equal(torch.get_rng_state(), generator), "loading draws random numbers"
    assert {p.dtype for p in mine.parameters()} == {dtype} and not mine.training
    for kind in ("named_parameters", "named_buffers"):
        found, wanted = dict(getattr(mine, kind)()), dict(getattr(stock, kind)())
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert all(found[name].dtype is wanted[name].dtype for name in wanted)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
def test_published_names_are_known(family, tmp_path):
    network = make_model(family)
    save_stock_checkpoint(tmp_path, network)
    # The hub's checkpoints were written before transformers moved the parts under `model.`.
    state = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tensor
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    assert any(name.startswith("visual.") for name in state) and any(name.startswith("model.layers") for name in state)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load_backbone(str(tmp_path)).state_dict()
    assert all(torch.equal(t.bfloat16().float(), loaded[name]) for name, t in network.model.state_dict().items())


def test_any_run_of_elements_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "CHUNK_BYTES", 64)
    values = torch.randn(7, 31)
    save_file({"before": torch.zeros(3), "it": values}, tmp_path / "model.safetensors")
    stored = WeightFiles.open(tmp_path)["it"]
    for dtype in (torch.float32, torch.bfloat16):
        for first, count in ((0, 217), (5, 100), (216, 1), (3, 0)):
            out = torch.full((count,), float("nan"), dtype=dtype)
            stored.read_into(out, first)
            assert torch.equal(out, values.flatten()[first : first + count].to(dtype))


class TestRefusals:
    """Each is found from the headers: `open_backbone` reads no weight."""

    def test_a_missing_shard(self, sharded):
        folder, names = sharded
        (folder / names[1]).unlink()
        with pytest.raises(StorageError, match=rf"{names[1]}: is missing, and holds \d+ of the \d+ weights"):
            open_backbone(str(folder))

    @pytest.mark.parametrize("keep", [-1, 100, 3, 0], ids=["one byte less", "in the header", "in the length", "empty"])
    def test_a_truncated_shard(self, sharded, keep):
        folder, names = sharded
        whole = (folder / names[1]).read_bytes()
        (folder / names[1]).write_bytes(whole[:keep])
        with pytest.raises(StorageError, match=rf"{names[1]}: .*download or copy it again"):
            open_backbone(str(folder))

    def test_a_file_that_ends_while_it_is_read(self, sharded):
        folder, names = sharded
        opened = open_backbone(str(folder))
        (folder / names[1]).write_bytes((folder / names[1]).read_bytes()[:-2])
        with pytest.raises(StorageError, match=f"{names[1]}: cannot be read: it has become shorter"):
            opened.load(lambda *_: torch.float32, torch.device("cpu"))

    def test_a_shard_of_another_dtype_than_its_index(self, sharded):
        folder, names = sharded
        wide = {name: tensor.float() for name, tensor in load_file(folder / names[1]).items()}
        save_file(wide, folder / names[1], metadata={"format": "pt"})
        with pytest.raises(StorageError, match=f"{names[1]}: holds float32 where most shards hold bfloat16"):
            open_backbone(str(folder))

    def test_a_shard_of_several_dtypes_that_its_index_knows_is_none(self, sharded):
        folder, names = sharded
        wide = {name: tensor.float() for name, tensor in load_file(folder / names[1]).items()}
        save_file(wide, folder / names[1], metadata={"format": "pt"})
        index = json.loads((folder / weight_files.INDEX).read_text())
        index["metadata"]["total_size"] += sum(tensor.nbytes // 2 for tensor in wide.values())
        (folder / weight_files.INDEX).write_text(json.dumps(index))
        assert open_backbone(str(folder)).dtype is torch.bfloat16

    def test_a_shard_of_another_save(self, sharded):
        folder, names = sharded
        state = load_file(folder / names[1])
        lost = sorted(state)[0]
        del state[lost]
        save_file(state, folder / names[1])
        with pytest.raises(StorageError, match=f"{names[1]}: lacks {lost}"):
            open_backbone(str(folder))

    def test_what_a_shard_holds_and_its_index_does_not_name_is_read(self, sharded):
        folder, names = sharded
        extra = {"score.weight": torch.ones(1, 32), "model.position_ids": torch.arange(4)}
        save_file(load_file(folder / names[1]) | extra, folder / names[1], {"format": "pt"})
        assert list(open_backbone(str(folder)).rest) == ["score.weight"], "buffers of whole numbers are of no use"

    def test_a_pointer_of_git_lfs(self, sharded):
        folder, names = sharded
        (folder / names[1]).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
        with pytest.raises(StorageError, match=f"{names[1]}: .*run git lfs pull"):
            open_backbone(str(folder))

    def test_a_link_to_nothing(self, network, tmp_path):
        save_stock_checkpoint(tmp_path, network)
        (tmp_path / weight_files.SINGLE).unlink()
        (tmp_path / weight_files.SINGLE).symlink_to("../../blobs/0a")
        with pytest.raises(StorageError, match=r"model.safetensors: is a link to ../../blobs/0a, which is not there"):
            open_backbone(str(tmp_path))

    def test_quantised_weights(self, sharded):
        folder, names = sharded
        state = {name: tensor.to(torch.int8) for name, tensor in load_file(folder / names[0]).items()}
        save_file(state, folder / names[0])
        with pytest.raises(StorageError, match="has dtype I8, wanted one of BF16, F16, F32, F64; quantised"):
            open_backbone(str(folder))

    def test_an_index_that_is_none(self, sharded):
        folder, _ = sharded
        (folder / weight_files.INDEX).write_text('{"weight_map": 3}')
        with pytest.raises(StorageError, match="not a readable index of shards"):
            open_backbone(str(folder))

    @pytest.mark.parametrize("header", [b"[]", b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', b"{"])
    def test_a_header_that_is_none(self, sharded, header):
        folder, names = sharded
        (folder / names[0]).write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
        with pytest.raises(StorageError, match=f"{names[0]}: damaged safetensors header"):
            open_backbone(str(folder))

    def test_weights_of_another_architecture(self, sharded):
        folder, _ = sharded
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["intermediate_size"] *= 2
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(StorageError, match=r"9 of \d+ weights are missing or have another shape, first: .*mlp"):
            open_backbone(str(folder))

    @pytest.mark.parametrize("is_file", [True, False], ids=["file", "folder"])
    def test_a_gguf(self, tmp_path, is_file):
        (tmp_path / "model-q8.gguf").write_bytes(b"GGUF" + bytes(100))
        path = tmp_path / "model-q8.gguf" if is_file else tmp_path
        for use in (lambda: open_backbone(str(path)), lambda: RewardModel.from_pretrained(path)):
            with pytest.raises(ConfigError, match=r"model-q8.gguf: is a GGUF file.*gguf_file=NAME.*save_pretrained"):
                use()

    def test_pickles(self, sharded):
        folder, names = sharded
        for name in (*names, weight_files.INDEX):
            (folder / name).unlink()
        (folder / "pytorch_model.bin").touch()
        with pytest.raises(StorageError, match=r"there is only pytorch_model.bin.* can run code"):
            open_backbone(str(folder))


def test_a_run_stops_at_a_missing_shard_before_it_reads_its_data(sharded, tmp_path_factory):
    folder, names = sharded
    (folder / names[-1]).unlink()
    scratch = tmp_path_factory.mktemp("run")
    rows = write_rows(scratch / "train.jsonl", text_rows(8))
    path = tiny_config(scratch, rows)
    tree = yaml.safe_load(path.read_text())
    tree["model"] = {"path": str(folder)}
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(StorageError, match=f"{names[-1]}: is missing"):
        train(load_config(path))
    assert not any((scratch / "run" / name).exists() for name in ("prepared", "checkpoints", "model", "metrics.jsonl"))


class TestScoring:
    """The dtype of a reward model that scores."""

    @pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
    def folder(self, request, network, tmp_path):
        save_model(network, tmp_path / "model")
        file = tmp_path / "model" / "model.safetensors"
        state = {n: t if n.startswith("score.") else t.to(request.param) for n, t in load_file(file).items()}
        save_file(state, file, metadata={"format": "pt"})
        return tmp_path / "model", request.param

    def test_is_that_of_the_files_and_said(self, folder):
        path, dtype = folder
        model = RewardModel.from_pretrained(path, device="cpu")
        assert {p.dtype for p in model.network.model.parameters()} == {dtype}
        assert {p.dtype for p in model.network.score.parameters()} == {torch.float32}
        assert all(b.dtype is torch.float32 for _, b in model.network.model.named_buffers())
        name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
        assert model.weights == f"{name}, as in the files"

    def test_is_a_line_of_the_commands(self, folder):
        said = []
        options = ScoringOptions(
            tokens_per_pack=1, num_workers=0, device="cpu", dtype="auto",
            limits=MediaLimits(1, 1),
        )  # fmt: skip
        models = ModelChoice((folder[0], folder[0]))
        ensemble = open_models(models, options, SimpleNamespace(say=said.append))
        assert said == [f"weights: {ensemble.members[0].weights}"] and "as in the files" in said[0]

    def test_is_float32_when_asked(self, folder):
        path, dtype = folder
        model = RewardModel.from_pretrained(path, device="cpu", dtype="fp32")
        assert {p.dtype for p in model.network.parameters()} == {torch.float32}
        groups = [{"prompt": "the red cat", "responses": ["yes", "no dog"]}]
        exact = torch.tensor(model.score(groups)[0])
        rounded = torch.tensor(RewardModel.from_pretrained(path, device="cpu").score(groups)[0])
        assert torch.equal(exact, rounded) == (dtype is torch.float32)
        assert torch.allclose(exact, rounded, atol=5e-3)  # bf16 rounds by 1e-3 here
        said = {torch.float32: "fp32, as in the files", torch.bfloat16: "fp32 as asked for; the files have bf16"}
        assert model.weights == said.get(dtype, "fp32 as asked for; the files have fp16")


MEASURE = """
import sys, torch
from fastrm.model.loading import load_backbone
from bench.harness.memory import reset_peak, status_bytes
load_backbone(sys.argv[1])  # imports and first calls
torch.set_num_threads(1)
before = status_bytes("VmRSS")
reset_peak()
model = load_backbone(sys.argv[2], getattr(torch, sys.argv[3]))
weights = sum(p.nbytes for p in model.parameters())
print((status_bytes("VmHWM") - before) / weights, weights)
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_takes_no_more_memory_than_the_weights(dtype, tmp_path):
    """Peak resident memory of a process, mapped files and all, over what it has before; 330 MB of bf16 files."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 8}
    config = AutoConfig.for_model("qwen2", **sizes, num_key_value_heads=2, vocab_size=20_000)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path, max_shard_size="100MB")
    save_stock_checkpoint(tmp_path / "tiny", make_model("qwen2"))
    command = [sys.executable, "-c", MEASURE, tmp_path / "tiny", tmp_path, dtype]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment())
    ratio, weights = done.stdout.split()[-2:]
    assert int(weights) > 2e8
    assert float(ratio) < 1.15  # the chunk that changes its dtype is 16 MiB


def test_a_fused_network_reads_the_same_weights(network, tmp_path):
    save_model(network, tmp_path)
    opened = open_backbone(str(tmp_path))
    assert fuse_projections(opened.model.language_model.layers)
    opened.load(lambda *_: torch.float32, torch.device("cpu"))
    state = opened.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.model.state_dict().items())
    assert load_model(tmp_path).model.state_dict().keys() == state.keys()
