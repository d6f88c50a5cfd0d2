"""precision.weights auto: frozen matrices keep the two bytes of their files, and not one bit of a result changes."""

import pytest
import torch

from fastrm.config import Config
from fastrm.data.batching import PackPlan
from fastrm.data.loader import PackBuilder
from fastrm.data.tokenizer import load_tokenizer
from fastrm.model.precision import token_multiple
from fastrm.train.engine import LocalEngine
from fastrm.train.optim import training_bytes
from fastrm.train.setup import make_network
from tests.helpers.stock import save_stock_checkpoint
from tests.helpers.support import make_image, make_model, make_record

IMAGES = [make_image(80, 60, 1)]
EVERYTHING = ["vision", "projector", "language"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints by family and dtype, made when asked for."""
    made = {}

    def folder(family, dtype=torch.bfloat16):
        if (family, dtype) not in made:
            made[family, dtype] = tmp_path_factory.mktemp("checkpoint")
            save_stock_checkpoint(made[family, dtype], make_model(family), dtype)
        return str(made[family, dtype])

    return folder


def make_engine(path: str, weights: str, freeze: list[str], **model) -> LocalEngine:
    fp8 = model.pop("fp8", "off")
    config = Config.model_validate(
        {
            "model": {"path": path, "freeze": freeze, **model},
            "precision": {"weights": weights, "fp8": fp8},
            "data": {"min_pixels": 784, "max_pixels": 784 * 40, "max_tiles": 4},
        }
    )
    return LocalEngine(make_network(config, load_tokenizer(path)), config)


def two_steps(engine: LocalEngine) -> list[torch.Tensor]:
    """Rewards of two steps, and the trained weights after them."""
    network = engine.network
    images = IMAGES if network.is_vision else ()
    records = [make_record(n, num_responses=2 + n, images=images) for n in range(2)]
    multiple = token_multiple(engine.config.precision.fp8)
    builder = PackBuilder(records, network.encoder, True, multiple=multiple, lay_out=network.lay_out)
    pack, found = builder[PackPlan((0, 1), 0, True)].pack, []
    for step in range(2):
        found.append(engine.accumulate(pack))
        assert engine.update(1e-2, step).finite
    return found + [parameter.detach() for parameter in network.parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    ("family", "freeze", "options"),
    [
        ("qwen2_5_vl", ["vision"], {}),
        ("qwen2_5_vl", ["language"], {"fuse_projections": True}),
        ("qwen2_5_vl", EVERYTHING, {}),
        ("qwen2_5_vl", ["language"], {"fuse_projections": True, "fp8": "rowwise"}),
        ("qwen2_5_vl", ["language"], {"fp8": "tensorwise"}),
        ("qwen2_5_vl", ["language"], {"activation_checkpointing": "selective"}),
        ("qwen2_vl", ["vision", "language"], {}),
        ("internvl", EVERYTHING, {}),
        ("internvl", ["vision"], {}),
        ("qwen3", ["language"], {}),
    ],
    ids=lambda value: "-".join(map(str, value)) if not isinstance(value, str) else value,
)
def test_training_beside_frozen_bf16_weights_is_that_beside_float32_copies(folders, family, freeze, options):
    auto, wide = (make_engine(folders(family), weights, freeze, **options) for weights in ("auto", "fp32"))
    kept = {name for name, p in auto.network.named_parameters() if p.dtype is torch.bfloat16}
    assert kept and not any(auto.network.get_parameter(name).requires_grad for name in kept)
    assert {p.dtype for p in wide.network.parameters()} == {torch.float32}
    assert all(map(torch.equal, two_steps(auto), two_steps(wide)))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl"])
def test_so_it_is_beside_frozen_float16_weights(folders, family):
    path = folders(family, torch.float16)
    auto, wide = (make_engine(path, weights, EVERYTHING) for weights in ("auto", "fp32"))
    assert torch.float16 in {p.dtype for p in auto.network.parameters()}
    assert all(map(torch.equal, two_steps(auto), two_steps(wide)))


@pytest.mark.parametrize(
    ("stored", "weights", "dtype", "wanted"),
    [
        (torch.bfloat16, "auto", "bf16", torch.bfloat16),
        (torch.float16, "auto", "bf16", torch.float16),
        (torch.float32, "auto", "bf16", torch.float32),
        (torch.bfloat16, "auto", "fp32", torch.float32),
        (torch.bfloat16, "fp32", "bf16", torch.float32),
    ],
    ids=str,
)
def test_frozen_matrices_have_the_dtype_that_changes_nothing(folders, stored, weights, dtype, wanted):
    path = folders("qwen2", stored)
    config = Config.model_validate(
        {"model": {"path": path, "freeze": ["language"]}, "precision": {"dtype": dtype, "weights": weights}}
    )
    network = make_network(config, load_tokenizer(path))
    assert network.model.layers[0].mlp.up_proj.weight.dtype is wanted
    assert network.model.layers[0].input_layernorm.weight.dtype is torch.float32
    assert network.model.embed_tokens.weight.dtype is torch.float32
    assert training_bytes(network, config).weights == sum(p.nbytes for p in network.parameters())
