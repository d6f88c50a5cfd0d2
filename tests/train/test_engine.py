"""`LocalEngine`: the step is the batch, whatever its weights and its optimizer's states are stored in."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastrm.config import Config, HeadConfig, ModelConfig
from fastrm.data.media.format import FormatSettings
from fastrm.errors import StorageError
from fastrm.limits import MediaLimits
from fastrm.lora_config import LoraConfig
from fastrm.model.export import make_encoder
from fastrm.model.lora import add_lora
from fastrm.model.network import RewardNetwork, init_backbone
from fastrm.train.engine import LocalEngine
from fastrm.train.optim import backbone_matrices, training_bytes
from tests.helpers.support import MROPE, make_image, make_record, make_tokenizer, pack_of
from tests.helpers.writers import writer_network, writer_records

# Wide enough that most matrices have 4,096 elements, and 8-bit moments; k and v have 2,048.
SIZES = {
    "model_type": "qwen2_5_vl",
    "text_config": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "rope_parameters": {**MROPE, "mrope_section": [4, 2, 2]},
    },
    "vision_config": {
        "depth": 1, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 64,
        "fullatt_block_indexes": [0],
    },
}  # fmt: skip
STORAGES = [("fp32", "fp32"), ("fp32", "8bit"), ("bf16", "fp32"), ("bf16", "8bit")]  # weights, states
UP_PROJ = "model.language_model.layers.0.mlp.up_proj.weight"


def make_network(seed=0) -> RewardNetwork:
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    backbone = init_backbone(ModelConfig(init=SIZES, tokenizer="unused"), tokenizer)
    settings = FormatSettings(min_pixels=28 * 28, max_pixels=28 * 28 * 40)
    encoder = make_encoder(backbone.config, tokenizer, None, "last_token", MediaLimits(), settings)
    network = RewardNetwork(backbone, HeadConfig(), encoder)
    network.set_kernels(torch.bfloat16, attention="sdpa")
    return network


def make_config(weights="fp32", states="fp32", dtype="bf16", **optim) -> Config:
    return Config.model_validate(
        {
            "model": {"init": SIZES, "tokenizer": "unused"},
            "optim": {"lr": 1e-3, "weight_decay": 0.1, "states": states, **optim},
            "precision": {"dtype": dtype, "weights": weights},
        }
    )


# Eight groups, with and without images, of different sizes.
IMAGE = make_image(80, 60, 1)
RECORDS = [make_record(n, num_responses=2 + n % 3, images=[IMAGE] if n % 2 else (), prompt_words=8) for n in range(8)]


@pytest.fixture(scope="module")
def packs():
    """A pack of each record."""
    network = make_network()
    return [pack_of(network, [record]) for record in RECORDS]


def take_step(engine, packs, step):
    for pack in packs:
        engine.accumulate(pack)
    return engine.update(1e-3, step)


def weights_of(engine):
    return {name: tensor.clone() for name, tensor in engine.model_tensors()}


def states_of(engine):
    return {name: tensor.clone() for name, tensor in engine.optimizer_tensors()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


def reference_step(network, config, optimizer, packs, lr):
    """The step in its plainest form: losses read one by one, torch's AdamW over everything."""
    engine = LocalEngine(copy.deepcopy(network), config)  # for its loss alone, which holds no state
    loss_sum, weight_sum = 0.0, 0.0
    for pack in packs:
        weight = float(pack.weight.double().sum())
        total = engine.loss(network(pack), pack)
        total.backward()
        loss_sum, weight_sum = loss_sum + float(total.detach()), weight_sum + weight
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    scale = 1.0 / weight_sum
    norm = float(nn.utils.get_total_norm([p.grad for p in parameters])) * scale
    for parameter in parameters:
        parameter.grad.mul_(scale * min(1.0, 1.0 / (norm + 1e-6)))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return loss_sum * scale, norm


def test_float32_steps_are_those_of_torch_adamw_to_the_bit(packs):
    config = make_config(dtype="fp32")
    engine, network = LocalEngine(make_network(), config), make_network()
    embeddings = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
    decay = [p for p in network.parameters() if p.ndim >= 2 and id(p) not in embeddings]
    rest = [p for p in network.parameters() if p.ndim < 2 or id(p) in embeddings]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=True)
    for step in range(3):
        lr, some = 1e-3 / (step + 1), packs[step : step + 3]
        for pack in some:
            engine.accumulate(pack)
        done = engine.update(lr, step)
        loss, norm = reference_step(network, config, optimizer, some, lr)
        assert (done.loss, done.grad_norm, done.finite) == (loss, norm, True)
    assert_equal(dict(engine.model_tensors()), dict(network.state_dict()))


def test_rewards_come_back_on_the_cpu_and_no_pack_adds_nothing(packs):
    engine = LocalEngine(make_network(), make_config())
    assert engine.accumulate(None) is None
    assert engine.update(1e-3, 0) == type(engine.update(1e-3, 0))(0.0, 0.0, True)
    rewards = engine.accumulate(packs[1])
    assert rewards.device.type == "cpu" and not rewards.requires_grad
    assert torch.equal(rewards, engine.rewards(packs[1]).detach())


class ScalarReads(TorchDispatchMode):
    """Counts reads of single numbers, each of which would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_pack_reads_nothing_back_but_its_own_weight_on_the_host(packs, monkeypatch):
    engine = LocalEngine(make_network(), make_config())

    def without_the_backbone(pack):
        rewards = engine.network.score[2].bias * pack.anchors
        return engine.loss(rewards, pack), rewards

    monkeypatch.setattr(engine, "loss_and_rewards", without_the_backbone)
    with ScalarReads() as reads:
        for pack in packs[:3]:
            engine.accumulate(pack)
    assert reads.count == 3


def test_bf16_weights_give_the_gradients_of_float32_weights_with_those_values(packs):
    """Autocast reads matrices in bfloat16 in any case; the residual stream and all sums stay float32."""
    rounded = make_network()
    for parameter in backbone_matrices(rounded).values():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    engines = [LocalEngine(make_network(), make_config("bf16")), LocalEngine(rounded, make_config())]
    for pack in packs[:4]:
        assert torch.equal(*[engine.accumulate(pack) for engine in engines])
    one, other = [{n: p.grad for n, p in engine.network.named_parameters()} for engine in engines]
    assert_equal(one, other)
    assert all(gradient.dtype is torch.float32 for gradient in one.values())


def test_only_the_backbones_matrices_are_stored_in_bf16():
    engine = LocalEngine(make_network(), make_config("bf16"))
    kept = {name for name, p in engine.network.named_parameters() if p.dtype is torch.float32}
    assert kept == {
        name
        for name, p in engine.network.named_parameters()
        if p.ndim == 1 or name.startswith("score.") or "embed_tokens" in name
    }
    assert {p.dtype for p in engine.network.parameters()} == {torch.float32, torch.bfloat16}
    assert all(b.dtype is torch.float32 for b in engine.network.buffers())


def matrix_gradient(packs, sum_dtype, products="bf16"):
    """Gradient of the backbone's bfloat16 matrices, summed over packs in a dtype, as one float64 vector.

    With products "fp32" the same matrices, widened, are multiplied in float32.
    """
    engine = LocalEngine(make_network(), make_config("bf16"))
    matrices = list(backbone_matrices(engine.network).values())
    if products == "fp32":
        engine.config = make_config(dtype="fp32")
        engine.network.float()  # in place: the parameters stay the same objects
    for matrix in matrices:
        matrix.grad_dtype = sum_dtype
    for pack in packs:
        engine.accumulate(pack)
    zeros = torch.zeros(1)
    found = [(zeros.expand(matrix.shape) if matrix.grad is None else matrix.grad) for matrix in matrices]
    return torch.cat([gradient.double().flatten() for gradient in found])


def test_with_bf16_weights_the_sum_over_packs_is_exact_to_float32(packs):
    """What a sum in bfloat16 would add to the error of bfloat16 products depends on how the step is cut."""
    truth = sum(matrix_gradient([pack], torch.float32) for pack in packs)
    all_in_one = [pack_of(make_network(), RECORDS)]
    whole, exact = (matrix_gradient(all_in_one, torch.float32, products) for products in ("bf16", "fp32"))
    sums = {dtype: matrix_gradient(packs, dtype) for dtype in (torch.float32, torch.bfloat16)}

    def difference(one, other):
        return float((one - other).norm() / other.norm())

    for dtype, found in sums.items():
        print(f"{dtype}: 8 packs against their exact sum {difference(found, truth):.1e}, against 1 pack "
              f"{difference(found, whole):.1e}, against float32 products {difference(found, exact):.1e}")  # fmt: skip
    assert difference(sums[torch.float32], truth) < 1e-6
    assert difference(sums[torch.bfloat16], truth) > 1e-3
    # Trees that share an image are one tree in one pack, so products round anew: at most like independent errors.
    products = max(difference(found, exact) for found in (sums[torch.float32], whole))
    assert difference(sums[torch.float32], whole) < 2**0.5 * products < 0.03


@pytest.mark.parametrize("weights, states", STORAGES)
def test_resumed_is_uninterrupted_to_the_bit(packs, tmp_path, weights, states):
    unbroken = LocalEngine(make_network(), make_config(weights, states))
    take_step(unbroken, packs[:2], 0)
    take_step(unbroken, packs[2:4], 1)
    save_file({n: t.contiguous() for n, t in unbroken.model_tensors()}, tmp_path / "model")
    save_file({n: t.contiguous() for n, t in unbroken.optimizer_tensors()}, tmp_path / "optimizer")
    resumed = LocalEngine(make_network(seed=1), make_config(weights, states))
    take_step(resumed, packs[:2], 0)  # what it held before must not shine through
    resumed.load_tensors(load_file(tmp_path / "model"), {})
    assert not states_of(resumed)
    resumed.load_tensors(load_file(tmp_path / "model"), load_file(tmp_path / "optimizer"))
    assert_equal(states_of(resumed), states_of(unbroken))
    for step in (2, 3):
        assert take_step(unbroken, packs[2 * step :], step) == take_step(resumed, packs[2 * step :], step)
    assert_equal(weights_of(resumed), weights_of(unbroken))
    assert_equal(states_of(resumed), states_of(unbroken))


@pytest.mark.parametrize("weights, states", STORAGES)
def test_a_non_finite_step_changes_nothing(packs, weights, states):
    engine = LocalEngine(make_network(), make_config(weights, states))
    take_step(engine, packs[:2], 0)
    before, moments = weights_of(engine), states_of(engine)
    engine.accumulate(packs[2])
    engine.network.get_parameter(UP_PROJ).grad[0] = math.inf
    done = engine.update(1e-3, 1)
    assert not done.finite and math.isfinite(done.loss) and not math.isfinite(done.grad_norm)
    assert_equal(weights_of(engine), before)
    assert_equal(states_of(engine), moments)
    assert take_step(engine, packs[:2], 2).finite
    assert any(not torch.equal(tensor, before[name]) for name, tensor in engine.model_tensors())


# Bytes of an element of a large matrix: weight, gradient, states.
PER_ELEMENT = {
    ("fp32", "fp32"): (4, 4, 8),
    ("fp32", "8bit"): (4, 4, 2 + 8 / 256),
    ("bf16", "fp32"): (2, 4, 8),
    ("bf16", "8bit"): (2, 4, 2 + 8 / 256),
}


@pytest.mark.parametrize("weights, states", STORAGES)
def test_bytes_of_real_tensors_are_those_predicted(packs, weights, states):
    config = make_config(weights, states)
    network = make_network()
    network.freeze(["vision"])
    predicted = training_bytes(network, config)
    engine = LocalEngine(network, config)
    take_step(engine, packs[:2], 0)
    engine.accumulate(packs[1])
    gradients = {name: p.grad for name, p in engine.network.named_parameters() if p.grad is not None}
    assert sum(t.nbytes for t in engine.network.parameters()) == predicted.weights
    assert sum(t.nbytes for t in gradients.values()) == predicted.gradients
    assert sum(t.nbytes for t in states_of(engine).values()) == predicted.states
    matrix = engine.network.get_parameter(UP_PROJ)
    moments = sum(t.nbytes for full, t in engine.optimizer_tensors() if full.endswith(UP_PROJ) and t.ndim)
    found = [size / matrix.numel() for size in (matrix.nbytes, gradients[UP_PROJ].nbytes, moments)]
    assert found == list(PER_ELEMENT[weights, states])


def loss_curve(weights, states):
    engine = LocalEngine(make_network(), make_config(weights, states))
    pack = pack_of(engine.network, RECORDS)
    losses = []
    for step in range(24):
        engine.accumulate(pack)
        losses.append(engine.update(1.5e-4, step).loss)
    return torch.tensor(losses)


@pytest.fixture(scope="module")
def float32_curve():
    return loss_curve("fp32", "fp32")


@pytest.mark.parametrize("weights, states", STORAGES[1:])
def test_compact_storage_follows_float32_adamw(float32_curve, weights, states):
    curve = loss_curve(weights, states)
    largest = float((curve - float32_curve).abs().max())
    print(f"{weights} weights, {states} states: loss {curve[0]:.4f} -> {curve[-1]:.4f}, in float32 "
          f"{float32_curve[-1]:.4f}; largest difference {largest:.4f}")  # fmt: skip
    assert float32_curve[-1] < 0.6 * float32_curve[0]
    assert largest < 0.0015


def test_tensors_of_another_model_or_other_settings_are_refused(packs):
    engine = LocalEngine(make_network(), make_config("fp32", "8bit"))
    take_step(engine, packs[:2], 0)
    model, states = weights_of(engine), states_of(engine)
    plain = LocalEngine(make_network(), make_config())
    with pytest.raises(StorageError, match=r"got exp_avg_codes, exp_avg_scale, .* wanted exp_avg, exp_avg_sq, step"):
        plain.load_tensors(model, states)
    with pytest.raises(StorageError, match=r"not a checkpoint of this model: .*score\.0\.weight"):
        plain.load_tensors({name: t for name, t in model.items() if name != "score.0.weight"}, {})
    name = "exp_avg.score.0.weight"
    with pytest.raises(StorageError, match=r"exp_avg\.score\.0\.weight: got shape \(1,\), wanted \(64, 64\)"):
        engine.load_tensors(model, states | {name: torch.zeros(1)})
    with pytest.raises(StorageError, match=r"optimizer state of score\.9\.weight: no such parameter"):
        engine.load_tensors(model, states | {"exp_avg.score.9.weight": torch.zeros(1)})


@pytest.mark.parametrize("weights, states", STORAGES)
def test_a_step_of_texts_counts_for_the_vision_tower_as_well(packs, weights, states):
    # On several ranks one of them may have seen an image; the update must not depend on that.
    engine = LocalEngine(make_network(), make_config(weights, states))
    assert take_step(engine, packs, 0).finite
    before = states_of(engine)
    assert take_step(engine, packs[::2], 1).finite
    after = states_of(engine)
    name = "model.visual.blocks.0.norm1.weight"
    assert float(after[f"step.{name}"]) == 2
    assert before[f"exp_avg.{name}"].abs().max() > 0
    torch.testing.assert_close(after[f"exp_avg.{name}"], 0.9 * before[f"exp_avg.{name}"])


@pytest.mark.parametrize("adapters", [False, True], ids=["frozen", "lora"])
def test_a_judge_whose_tower_alone_is_trained_takes_steps_of_texts_as_on_several_ranks(adapters):
    """On several ranks packs without an image send a blank one through the tower, whose gradients are zero."""
    config = Config.model_validate(
        {
            "paradigm": "judge", "model": {"path": "unused"}, "precision": {"dtype": "fp32"},
            "optim": {"lr": 1e-3, "weight_decay": 0.1},
        }
    )  # fmt: skip
    found = []
    for blank in (False, True):
        network = writer_network("qwen2_5_vl", "judge")
        if adapters:
            torch.manual_seed(0)
            add_lora(network, LoraConfig(targets=["qkv"], vision=True))
        else:
            network.freeze(["language"])
        network.always_run_tower = blank
        *texts, image = [pack_of(network, [record]) for record in writer_records("qwen2_5_vl", "judge")]
        engine = LocalEngine(network, config)
        updates = [take_step(engine, [*texts, image], 0), take_step(engine, texts, 1)]
        assert updates[0].grad_norm > 0 == updates[1].grad_norm and all(one.loss > 0 for one in updates)
        found.append((updates, weights_of(engine), states_of(engine)))
    assert found[0][0] == found[1][0]
    assert_equal(found[0][1], found[1][1])
    assert_equal(found[0][2], found[1][2])
