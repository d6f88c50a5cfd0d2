"""AdamW with bfloat16 weights and 8-bit moments, against torch's and torchao's; stochastic rounding."""

import importlib.util
import math
import shutil

import pytest
import torch

from fastrm.config import load_config
from fastrm.errors import ConfigError
from fastrm.model.architectures import find_architecture, meta_network
from fastrm.train import compact_adamw
from fastrm.train.compact_adamw import CompactAdamW, is_quantizable
from fastrm.train.optim import backbone_matrices, training_bytes
from fastrm_kernels.compact_adamw import BLOCK, round_stochastically
from tests.helpers.project import PROJECT

LR, BETAS, EPS, DECAY = 1e-2, [0.9, 0.99], 1e-8, 0.1


def compact(parameters, states, seed=0):
    groups = [{"params": list(parameters.items()), "weight_decay": DECAY}]
    return CompactAdamW(groups, lr=LR, betas=BETAS, eps=EPS, states=states, seed=seed)


def random_parameter(*shape, dtype=torch.float32, seed=0, scale=1.0):
    parameter = torch.nn.Parameter(scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype))
    parameter.grad_dtype = torch.float32
    return parameter


def random_gradient(parameter, seed, scale=1.0):
    return scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1000 + seed))


def steps(optimizer, parameter, count, scale=1.0):
    for number in range(count):
        parameter.grad = random_gradient(parameter, number, scale)
        optimizer.param_groups[0]["step"] = number
        optimizer.step()


def test_the_update_is_adamw():
    """float32 moments against torch's AdamW in float64, over several chunks and an odd size."""
    parameter = random_parameter(3, 50_001)
    truth = torch.nn.Parameter(parameter.detach().double())
    ours = compact({"w": parameter}, "fp32")
    theirs = torch.optim.AdamW([truth], lr=LR, betas=tuple(BETAS), eps=EPS, weight_decay=DECAY)
    assert parameter.numel() > 2 * compact_adamw.CHUNK["cpu"]
    for number in range(10):
        parameter.grad = random_gradient(parameter, number)
        truth.grad = parameter.grad.double()
        ours.step()
        theirs.step()
    assert (parameter - truth).abs().max() < 2e-6


def torchao_reference(parameter, count, scale):
    """torchao's own step on its own 8-bit states, uncompiled."""
    pytest.importorskip("torchao")
    from torchao.optim.adam import single_param_adam
    from torchao.optim.subclass_8bit import OptimState8bit

    weight = parameter.detach().clone()
    first, second = (OptimState8bit.zeros(weight.shape, signed, BLOCK) for signed in (True, False))
    for number in range(count):
        single_param_adam(
            weight, random_gradient(weight, number, scale), torch.tensor(number + 1.0), first, second, None,
            torch.tensor(LR), *BETAS, DECAY, EPS, True, False,
        )  # fmt: skip
    return weight, first, second


def test_8bit_states_are_those_of_torchao():
    parameter = random_parameter(300, 512)
    weight, first, second = torchao_reference(parameter, 5, 1.0)
    optimizer = compact({"w": parameter}, "8bit")
    steps(optimizer, parameter, 5)
    state = optimizer.state[parameter]
    for moment, theirs in (("exp_avg", first), ("exp_avg_sq", second)):
        assert torch.equal(state[f"{moment}_codes"], theirs.codes)
        assert torch.equal(state[f"{moment}_scale"], theirs.scale)
    assert (parameter - weight).abs().max() < 2e-6


def test_8bit_states_work_for_gradients_of_any_size():
    """Second moments of 1e-18 are below the smallest scale of torchao's code."""
    results = []
    for scale in (1.0, 1e-9):
        parameter = random_parameter(64, 256)
        optimizer = compact({"w": parameter}, "8bit")
        optimizer.param_groups[0]["eps"] = 1e-8 * scale
        steps(optimizer, parameter, 5, scale)
        results.append(parameter.detach())
    assert (results[0] - results[1]).abs().max() < 1e-3 * LR * 5


def test_small_or_ragged_parameters_keep_float32_moments():
    assert is_quantizable(torch.empty(16, 256))
    assert not is_quantizable(torch.empty(15, 256)) and not is_quantizable(torch.empty(4097))
    parameter = random_parameter(4097, dtype=torch.bfloat16)
    optimizer = compact({"w": parameter}, "8bit")
    steps(optimizer, parameter, 1)
    assert {key: value.dtype for key, value in optimizer.state[parameter].items()} == dict.fromkeys(
        ("step", "exp_avg", "exp_avg_sq"), torch.float32
    )


def test_stochastic_rounding_is_unbiased_and_takes_a_neighbour():
    """All 65,536 noises at once: the mean over them is the value, exactly but for float64 rounding."""
    noise = torch.arange(-(2**15), 2**15).to(torch.int16)
    for value in (1.0, 1.001, -1.001, 0.0, -0.0, 3e-3, -7.77e-12, 1e30, 1e-39, -65504.1):
        exact = torch.tensor(value, dtype=torch.float32)
        rounded = round_stochastically(exact.expand(noise.shape).contiguous(), noise)
        assert rounded.dtype is torch.bfloat16
        found = rounded.double().unique()
        near = exact.to(torch.bfloat16).double()
        if near == exact:
            assert found.tolist() == [exact]
        else:
            assert len(found) == 2 and near in found and found[0] < exact < found[1]
        assert rounded.double().mean().item() == pytest.approx(float(exact), rel=1e-12, abs=0.0)


@pytest.mark.parametrize("states", ["fp32", "8bit"])
def test_tiny_updates_arrive_in_bf16_weights(states):
    """300 updates of -1e-4 each on weights of 1, whose lower neighbour is 3.9e-3 away: plain rounding
    would leave 1.0. The mean of 65,536 weights is a sum of independent roundings."""
    count, rate = 300, 1e-4
    parameter = torch.nn.Parameter(torch.ones(256, 256, dtype=torch.bfloat16))
    parameter.grad_dtype = torch.float32
    optimizer = compact({"w": parameter}, states)
    optimizer.param_groups[0].update(lr=rate, weight_decay=0.0)
    for number in range(count):
        parameter.grad = torch.ones(256, 256)
        optimizer.param_groups[0]["step"] = number
        optimizer.step()
    weights = parameter.detach().double()
    # AdamW on a constant gradient moves by the rate at each step.
    deviation = math.sqrt(count * rate * 2**-8) / 256  # standard deviation of the mean, at most
    assert abs(weights.mean().item() - (1.0 - count * rate)) < 5 * deviation < 0.01 * count * rate
    assert weights.std() > 1e-3  # each weight went its own way: noise is not shared
    assert torch.tensor(1.0 - rate).to(torch.bfloat16) == 1.0


def test_rounding_is_a_pure_function_of_seed_step_and_name():
    def updated(seed=0, step=3, name="a.weight", global_seed=0):
        torch.manual_seed(global_seed)
        parameter = random_parameter(64, 256, dtype=torch.bfloat16, scale=0.02)
        optimizer = compact({name: parameter}, "fp32", seed)
        optimizer.param_groups[0].update(lr=1e-5, step=step)
        parameter.grad = random_gradient(parameter, 0)
        before = torch.get_rng_state()
        optimizer.step()
        assert torch.equal(torch.get_rng_state(), before)
        return parameter.detach()

    first = updated()
    assert torch.equal(first, updated(global_seed=1))
    for other in (updated(seed=1), updated(step=4), updated(name="b.weight")):
        assert 0.01 < (other != first).double().mean() < 0.5


def test_noise_is_uniform_and_independent_from_step_to_step():
    """Chi-square over 256 cells of the high and of the low byte, and correlation between steps."""
    draws = []
    for step in range(2):
        parameter = random_parameter(512, 512, dtype=torch.bfloat16)
        parameter.grad = torch.zeros(512, 512)
        optimizer = compact({"w": parameter}, "fp32")
        chunks = list(optimizer._chunks(parameter, optimizer.new_state(parameter), f"0/{step}/w"))
        draws.append(torch.cat([chunk[4].flatten() for chunk in chunks]).int() & 0xFFFF)
    for cells in (draws[0] >> 8, draws[0] & 0xFF):
        expected = len(cells) / 256
        chi_square = ((torch.bincount(cells, minlength=256) - expected) ** 2 / expected).sum()
        assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)
    correlation = torch.corrcoef(torch.stack(draws).double())[0, 1]
    assert abs(correlation) < 5 / math.sqrt(512 * 512)
    assert len(draws[0].unique()) > 60_000


@pytest.mark.parametrize("states", ["fp32", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_factor_of_a_gradient_is_multiplied_as_it_is_read(dtype, states):
    """To the bit as if the gradient had been multiplied before, which the update leaves as it is."""
    scale, results = 0.37 / 3, []
    for folded in (False, True):
        parameter = random_parameter(100_000, 2, dtype=dtype)
        optimizer = compact({"w": parameter}, states)
        parameter.grad = random_gradient(parameter, 0)
        if folded:
            optimizer.param_groups[0]["gradient_scale"] = scale
        else:
            torch._foreach_mul_([parameter.grad], scale)
        before = parameter.grad.clone()
        optimizer.step()
        assert torch.equal(parameter.grad, before)
        results.append([parameter.detach(), *optimizer.state[parameter].values()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert results[0][1].max() > 0


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'not installed; pip install "fastrm\[torchao\]", or set optim.states: fp32'):
        compact({"w": random_parameter(16, 256)}, "8bit")
    compact({"w": random_parameter(16, 256, dtype=torch.bfloat16)}, "fp32")  # needs nothing
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"found neither \$CC nor gcc nor clang; install gcc"):
        compact_adamw.require_c_compiler()
    monkeypatch.setenv("CC", "tcc")
    compact_adamw.require_c_compiler()


def test_bf16_weights_need_bf16_products():
    with pytest.raises(ConfigError, match=r"precision.weights bf16 with precision.dtype fp32: .* set precision.dtype"):
        load_config(PROJECT / "configs/quickstart.yaml", ["precision.weights=bf16"])


def test_the_memory_table_is_current():
    """docs/memory.md for Qwen2.5-VL-7B, from exact shapes."""
    document = (PROJECT / "docs/memory.md").read_text()
    for weights in ("fp32", "bf16"):
        for states in ("fp32", "8bit"):
            overrides = [f"precision.weights={weights}", f"optim.states={states}"]
            config = load_config(PROJECT / "configs/full.yaml", overrides)
            network = meta_network(find_architecture(config.model)[0], config.model)
            size = training_bytes(network, config)
            trained = sum(p.numel() for p in backbone_matrices(network).values() if p.requires_grad)
            copies = 2 * trained if weights == "fp32" else 0
            total = size.total + copies
            left = [f"{gpu - total / 1e9:.1f}" if total < gpu * 1e9 else "-" for gpu in (141, 80)]
            figures = [f"{part / 1e9:.1f}" for part in (size.weights, size.gradients, size.states, copies, total)]
            assert " | ".join(["", weights, states, *figures, *left, ""]).strip() in document
