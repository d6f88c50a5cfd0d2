"""Frozen layers in NF4: they multiply with numbers of the code, and a run's model has the rewards of its training."""

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")
from fastrm.config import load_config
from fastrm.errors import ConfigError
from fastrm.model.export import load_model
from fastrm.model.nf4 import BLOCK, Nf4Linear
from fastrm.model.weight_files import read_header
from fastrm.train.encoder import make_tokenizer
from fastrm.train.export_checkpoint import export_checkpoint
from fastrm.train.setup import make_network
from fastrm.ui import Display
from tests.helpers.lora_runs import lora_config
from tests.helpers.runs import run
from tests.helpers.support import FAMILIES, make_image, make_record, pack_of

# Appendix E of arXiv 2305.14314.
CODE = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
IMAGE = make_image(80, 60, 1)
WIDE = {"hidden_size": 64, "intermediate_size": 128}


def rounded(weight):
    """The nearest number of the code times the largest of each 64 elements."""
    blocks = weight.float().reshape(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    return (CODE[((blocks / scale)[..., None] - CODE).abs().argmin(-1)] * scale).view_as(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_computes_with_the_rounded_weight_and_passes_its_gradient_on(dtype):
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 48, dtype=dtype)
    layer = Nf4Linear(linear)
    weight = rounded(linear.weight.detach())
    torch.testing.assert_close(layer.dequantize().float(), weight.to(dtype).float(), rtol=0, atol=1e-6)
    assert layer.weight.numel() == 128 * 48 // 2
    inputs = torch.randn(7, 128, dtype=dtype, requires_grad=True)
    found = layer(inputs)
    wanted = inputs.detach().float() @ weight.to(dtype).float().T + linear.bias.detach().float()
    # In bfloat16 the product, the sum with the bias and the gradient are each rounded once, by 2^-8 at most.
    close = {"rtol": 2**-7, "atol": 2**-8} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found.float(), wanted, **close)
    found.sum().backward()
    gradient = weight.to(dtype).float().sum(0).expand(7, -1)
    torch.testing.assert_close(inputs.grad.float(), gradient, **close)


@pytest.fixture(scope="module", params=["llama", "qwen2_5_vl"])
def finished(request, tmp_path_factory):
    """The family and the configuration of a finished run of a model that is wide enough."""
    family, folder = request.param, tmp_path_factory.mktemp("nf4")
    sizes = FAMILIES[family]
    text = {**sizes.get("text_config", sizes), **WIDE}
    if "vl" in family:
        rope = {**text["rope_parameters"], "mrope_section": [4, 2, 2]}
        vision = {**sizes["vision_config"], "out_hidden_size": 64}
        wide = {**sizes, "text_config": {**text, "rope_parameters": rope}, "vision_config": vision}
    else:
        wide = text
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, family, wide)
        path = lora_config(folder, family, {"quantize": "nf4"})
    run(path)
    return family, path


def test_a_runs_model_has_the_rewards_that_its_network_had(finished, tmp_path):
    family, path = finished
    records = [make_record(n, images=[IMAGE] if "vl" in family and n else ()) for n in range(3)]
    config, folder = load_config(path), path.parent / "run"
    trained = make_network(config, make_tokenizer(config)).eval()
    quantised = [name for name, module in trained.named_modules() if isinstance(module, Nf4Linear)]
    assert len(quantised) == 7 * 3 and not any("visual" in name for name in quantised)
    saved = load_file(folder / "checkpoints" / "step-00000006" / "model.safetensors")
    assert all("lora_" in name or "score." in name for name in saved)
    trained.load_state_dict(saved, strict=False)
    loaded = load_model(folder)
    with torch.no_grad():
        wanted, found = trained(pack_of(trained, records)), loaded(pack_of(loaded, records))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)
    display = Display(silent=True)
    export_checkpoint(folder, 6, tmp_path / "plain", "transformers", display, torch.float32, merge=True)
    plain = load_model(tmp_path / "plain")
    assert torch.equal(plain(pack_of(plain, records)), loaded(pack_of(loaded, records)))


def test_a_matrix_in_a_file_is_read_in_any_pieces_as_the_layer_has_it(tmp_path, monkeypatch):
    from fastrm.model import nf4

    weight = torch.randn(40, 128)
    save_file({"weight": weight}, tmp_path / "file")
    stored = read_header(tmp_path / "file")["weight"]
    tensor = nf4.Nf4Tensor(stored.file, stored.dtype, stored.shape, stored.start)
    wanted = rounded(weight)
    monkeypatch.setattr(nf4, "CHUNK_BYTES", 4 * 128)
    part = torch.empty(1000)
    tensor.read_into(part, 333)
    torch.testing.assert_close(part, wanted.flatten()[333:1333], rtol=0, atol=1e-6)


def test_a_model_without_a_layer_of_whole_blocks_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "llama", {**FAMILIES["llama"], "intermediate_size": 48})
    config = load_config(lora_config(tmp_path, "llama", {"quantize": "nf4"}))
    with pytest.raises(ConfigError, match=r"nf4: no linear layer of LlamaModel has inputs of a multiple of 64; remove"):
        make_network(config, make_tokenizer(config))


def test_without_the_package_the_key_is_refused(tmp_path, monkeypatch):
    config = load_config(lora_config(tmp_path, "llama", {"quantize": "nf4"}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'needs bitsandbytes, which is not .* pip install "fastrm\[qlora\]"'):
        make_network(config, make_tokenizer(config))


def test_compiled_layers_compute_the_same(tmp_path):
    torch._dynamo.reset()
    config = load_config(lora_config(tmp_path, "llama", {"quantize": "nf4"}))
    network, records = make_network(config, make_tokenizer(config)), [make_record(n) for n in range(3)]
    assert any(isinstance(module, Nf4Linear) for module in network.modules())

    def gradients():
        network.zero_grad()
        network(pack_of(network, records)).square().sum().backward()
        return [parameter.grad.clone() for parameter in network.parameters() if parameter.requires_grad]

    wanted = gradients()
    network.compile_layers("aot_eager")
    network.set_kernels(torch.float32, attention="sdpa")
    found = gradients()
    assert network.graphs.count
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
