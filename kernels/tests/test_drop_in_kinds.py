"""`fuse_reward_head` on a tiny model of every supported kind: as the stock head in all that it does."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastrm_kernels.preference_head.drop_in import FusedRewardHead, fuse_reward_head
from kernel_cases.drop_in_models import (
    WIDTH,
    assert_near,
    assert_same_run,
    head_of,
    impls,
    kinds,
    make,
    run,
    sequential,
    tokens_of,
    value_head,
)


@impls
@kinds
def test_fused_head_agrees_with_stock_head(kind, impl):
    stock, name = make(kind)
    fused = fuse_reward_head(copy.deepcopy(stock), impl)
    assert isinstance(getattr(fused, name), FusedRewardHead)
    for training in (True, False):
        wanted = run(stock.train(training), tokens_of())
        assert all(gradient.abs().max() > 0 for gradient in wanted[1].values())
        assert_same_run(run(fused.train(training), tokens_of()), wanted)


@kinds
def test_parameters_keys_and_mode_stay(kind):
    model, _ = make(kind)
    head_of(model).eval()
    before, modes = dict(model.named_parameters()), {path: m.training for path, m in model.named_modules()}
    keys = list(model.state_dict())
    assert fuse_reward_head(model) is model
    assert list(model.state_dict()) == keys
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[key] is before[key] for key in before)
    assert {path: m.training for path, m in model.named_modules()} == modes


@kinds
def test_copies_state_dicts_and_casts_survive(kind):
    stock, _ = make(kind)
    stock.eval()
    wanted = run(stock, tokens_of())
    fused = fuse_reward_head(copy.deepcopy(stock))
    other = fuse_reward_head(make(kind)[0].eval())
    nn.init.zeros_(next(head_of(other).parameters()))
    other.load_state_dict(fused.state_dict())
    stock_again = make(kind)[0].eval()
    stock_again.load_state_dict(fused.state_dict())
    for model in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), other, stock_again):
        assert_same_run(run(model, tokens_of()), wanted)
        assert head_of(model) is not head_of(fused)
    wide = run(copy.deepcopy(fused).double(), tokens_of())
    assert wide[0].dtype == torch.float64
    assert_same_run(wide, run(copy.deepcopy(stock).double(), tokens_of()), 1e-14)


@kinds
@pytest.mark.parametrize("order", ["optimizer first", "fused first"])
def test_training_takes_the_stock_path(kind, order):
    models = make(kind)[0], make(kind)[0]
    initial = copy.deepcopy(models[0].state_dict())
    if order == "fused first":
        fuse_reward_head(models[1])
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in models]
    fuse_reward_head(models[1])
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            run(model, tokens_of(step), seed=step)
            optimizer.step()
    for name, wanted in models[0].state_dict().items():
        assert_near(models[1].state_dict()[name], wanted)
        assert not torch.equal(wanted, initial[name])


@impls
@kinds
def test_frozen_parts_get_no_gradient(kind, impl):
    for frozen in ("head", "backbone"):
        stock, _ = make(kind)
        head = list(head_of(stock).parameters())
        for parameter in stock.parameters():
            parameter.requires_grad_(any(parameter is p for p in head) != (frozen == "head"))
        fused = fuse_reward_head(copy.deepcopy(stock), impl)
        assert_same_run(run(fused, tokens_of()), run(stock, tokens_of()))


@impls
@pytest.mark.parametrize("kind", ["score-linear", "score-tanh", "trl-value-head"])
@pytest.mark.parametrize("shape", [(WIDTH,), (4, WIDTH), (2, 3, 2, WIDTH), (2, 0, WIDTH)])
def test_any_leading_shape(kind, impl, shape):
    stock = head_of(make(kind)[0]).eval()
    fused = FusedRewardHead(stock, impl)
    hidden = torch.randn(shape)
    assert_near(
        torch.cat([fused(hidden).flatten(), torch.ones(1)]), torch.cat([stock(hidden).flatten(), torch.ones(1)])
    )
    assert fused(hidden).shape == stock(hidden).shape
    strided = torch.randn(4, WIDTH, 3).transpose(1, 2)[:, ::2]
    assert_near(fused(strided), stock(strided))


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rewards_are_float32_and_round_to_the_stock_ones(kind, dtype):
    stock = make(kind)[0].to(dtype).eval()
    fused = fuse_reward_head(copy.deepcopy(stock), "eager")
    got, wanted = run(fused, tokens_of()), run(stock, tokens_of())
    assert got[0].dtype == torch.float32 and wanted[0].dtype == dtype
    assert torch.equal(got[0].to(dtype), wanted[0])
    assert all(gradient.dtype == dtype for gradient in got[1].values())
    assert_same_run(got, wanted, 2 * torch.finfo(dtype).eps)


@kinds
def test_half_precision_in_triton_is_at_least_as_accurate_as_stock(kind):
    exact = make(kind)[0].half().double().eval()
    stock = copy.deepcopy(exact).half()
    fused = fuse_reward_head(copy.deepcopy(stock), "triton")
    hidden = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(5)).half()
    truth = head_of(exact)(hidden.double())
    errors = [(head_of(model)(hidden).double() - truth).abs().max().item() for model in (fused, stock)]
    assert head_of(fused)(hidden).dtype == torch.float32
    assert errors[0] <= errors[1], errors


@impls
@kinds
def test_autocast_computes_as_the_stock_head_does(kind, impl):
    # Triton's interpreter cannot multiply bfloat16.
    dtype = torch.bfloat16 if impl == "eager" else torch.float16
    stock = make(kind)[0].eval()
    fused = fuse_reward_head(copy.deepcopy(stock), impl)
    with torch.autocast("cpu", dtype=dtype):
        got, wanted = run(fused, tokens_of()), run(stock, tokens_of())
        # A norm in front of the head may leave its input in float32.
        wide = torch.randn(4, WIDTH)
        narrow = head_of(fused)(wide)
        assert_near(narrow, head_of(stock)(wide), 2 * torch.finfo(dtype).eps)
    assert (narrow - head_of(stock)(wide)).abs().max() > 2e-5, "autocast changed nothing"
    assert got[0].dtype == torch.float32 and wanted[0].dtype == dtype
    assert all(gradient.dtype == torch.float32 for gradient in got[1].values())
    assert_same_run(got, wanted, 2 * torch.finfo(dtype).eps)
    if impl == "eager":
        assert torch.equal(got[0].to(dtype), wanted[0])


def test_autocast_leaves_float64_alone_as_stock_does():
    hidden, stock = torch.randn(4, WIDTH).double(), sequential(nn.Tanh).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_near(FusedRewardHead(stock)(hidden), stock(hidden), 1e-14)


def test_value_head_takes_half_precision_hidden_states():
    stock = value_head(0.0)
    hidden = torch.randn(4, WIDTH).bfloat16()
    assert_near(FusedRewardHead(stock, "eager")(hidden), stock(hidden))


def test_dropout_of_a_value_head_stays_under_control():
    model = fuse_reward_head(make("trl-value-head")[0])
    hidden = torch.ones(64, WIDTH)
    assert len(set(model.v_head(hidden).flatten().tolist())) > 1
    model.v_head.dropout.p = 0.0
    assert len(set(model.v_head(hidden).flatten().tolist())) == 1


def test_hooks_registered_on_the_fused_head_run():
    model, seen = fuse_reward_head(make("score-tanh")[0]), []
    model.score.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    model(tokens_of())
    assert seen == [(3, 5, 1)]


@impls
@pytest.mark.parametrize("kind", ["score-linear", "score-tanh", "trl-value-head"])
def test_fused_head_compiles_into_one_graph(kind, impl):
    stock = make(kind)[0].eval()
    compiled = torch.compile(fuse_reward_head(copy.deepcopy(stock), impl), fullgraph=True, backend="aot_eager")
    assert_same_run(run(compiled, tokens_of()), run(stock, tokens_of()))


def test_fusing_again_only_sets_the_implementation():
    model = fuse_reward_head(make("score-tanh")[0], "eager")
    head = model.score
    assert fuse_reward_head(model, "triton").score is head and head.impl == "triton"
