"""`fuse_reward_head` on a tiny model of every supported kind, and inside TRL's RewardTrainer."""

import contextlib
import copy
import pickle
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fastrm_kernels.preference_head.drop_in import FusedRewardHead, fuse_reward_head
from support import make_tokenizer, words

WIDTH = 16


class ValueHead(nn.Module):
    """The structure of TRL's trl/models/modeling_value_head.py, which TRL 1.16 no longer ships."""

    def __init__(self, config):
        super().__init__()
        self.dropout = nn.Dropout(config.summary_dropout_prob) if config.summary_dropout_prob else nn.Identity()
        self.summary = nn.Linear(config.hidden_size, 1)
        self.flatten = nn.Flatten()

    def forward(self, hidden_states):
        output = self.dropout(hidden_states)
        if output.dtype != self.summary.weight.dtype:
            output = output.to(self.summary.weight.dtype)
        return self.summary(output)


def value_head(dropout, kind=ValueHead):
    """`kind`, or TRL's own class where it exists."""
    if kind is ValueHead:
        with contextlib.suppress(ImportError):
            from trl.models.modeling_value_head import ValueHead as kind
    return kind(SimpleNamespace(hidden_size=WIDTH, summary_dropout_prob=dropout))


class Backbone(nn.Module):
    """Embedding, one layer and a head under any name; rewards of all positions."""

    def __init__(self, **heads):
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        for name, head in heads.items():
            setattr(self, name, head)
        self.head_name = next(iter(heads), None)

    def forward(self, tokens):
        return getattr(self, self.head_name)(torch.tanh(self.mix(self.embed(tokens))))


def sequential(activation, layers=2, bias=True):
    modules = []
    for number in range(layers - 1):
        modules += [nn.Linear(WIDTH if number == 0 else 12, 12, bias=bias), activation()]
    return nn.Sequential(*modules, nn.Linear(WIDTH if layers == 1 else 12, 1, bias=bias))


KINDS = {
    "score-linear": lambda: ("score", nn.Linear(WIDTH, 1, bias=False)),
    "score-linear-bias": lambda: ("score", nn.Linear(WIDTH, 1)),
    "score-identity": lambda: ("score", sequential(nn.Identity)),
    "score-tanh": lambda: ("score", sequential(nn.Tanh)),
    "reward-head-relu": lambda: ("reward_head", sequential(nn.ReLU)),
    "rm-head-silu-5": lambda: ("rm_head", sequential(nn.SiLU, layers=5)),
    "v-head-one-layer": lambda: ("v_head", sequential(nn.SiLU, layers=1, bias=False)),
    "trl-value-head": lambda: ("v_head", value_head(0.3)),
    "trl-value-head-no-dropout": lambda: ("v_head", value_head(0.0)),
    "value-head": lambda: ("value_head", nn.Linear(WIDTH, 1)),
}
kinds = pytest.mark.parametrize("kind", KINDS)
impls = pytest.mark.parametrize("impl", ["eager", "triton"])


def make(kind):
    torch.manual_seed(0)
    name, head = KINDS[kind]()
    model = Backbone(**{name: head})
    # Default biases are small; a dropped one must show.
    for parameter in head.parameters():
        parameter.data.mul_(2.0)
    return model, name


def head_of(model):
    return getattr(model, model.head_name)


def tokens_of(seed=1, shape=(3, 5)):
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(seed))


def run(model, tokens, seed=2):
    """Outputs and all gradients for a random upstream gradient; the seed fixes the dropout."""
    torch.manual_seed(seed)
    model.zero_grad()
    rewards = model(tokens)
    upstream = torch.randn(rewards.shape, generator=torch.Generator().manual_seed(3))
    rewards.backward(upstream.to(rewards.dtype))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    # The names that DistributedDataParallel and torch.compile put in front.
    return rewards.detach(), {re.sub(r"^(module|_orig_mod)\.", "", name): grad for name, grad in gradients.items()}


def assert_near(got, wanted, tolerance=2e-6):
    assert got.shape == wanted.shape and torch.isfinite(got).all()
    worst = (got.double() - wanted.double()).abs().max().item()
    assert worst <= tolerance * max(1.0, wanted.abs().max().item()), f"off by {worst}"


def assert_same_run(got, wanted, tolerance=2e-6):
    assert_near(got[0], wanted[0], tolerance)
    assert got[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert_near(got[1][name], gradient, tolerance)


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


def test_hidden_of_another_width_is_refused():
    fused = FusedRewardHead(nn.Linear(WIDTH, 1), "eager")
    with pytest.raises(ValueError, match="got a weight"):
        fused(torch.randn(WIDTH, 2))


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


def test_attributes_that_trainers_read_stay():
    model = fuse_reward_head(make("score-linear-bias")[0].half())
    assert model.score.weight.dtype == model.score.bias.dtype == torch.float16
    assert (model.score.in_features, model.score.out_features) == (WIDTH, 1)
    model = fuse_reward_head(make("score-linear")[0])
    assert model.score.bias is None
    model = fuse_reward_head(make("score-tanh")[0])
    assert model.score[0].weight is dict(model.named_parameters())["score.0.weight"]
    assert model.score[-1].out_features == 1 and model.score.in_features == WIDTH
    model = fuse_reward_head(make("trl-value-head")[0])
    assert model.v_head.summary.weight.device.type == "cpu"
    assert "in_features=16, activation=none, impl=auto" in repr(model.v_head)


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


def test_explicit_triton_never_falls_back():
    model = fuse_reward_head(make("score-linear")[0].double(), "triton")
    with pytest.raises(ValueError, match=r"impl='triton': got torch\.float64"):
        model(tokens_of())


def test_ddp_takes_a_fused_model_and_a_wrapped_one_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        stock, _ = make("score-tanh")
        ddp = nn.parallel.DistributedDataParallel(fuse_reward_head(copy.deepcopy(stock)))
        assert_same_run(run(ddp, tokens_of()), run(stock, tokens_of()))
        found = r"DistributedDataParallel has no reward head, found module \(.*Backbone\)"
        with pytest.raises(ValueError, match=found + "; model.module has one: call fuse_reward_head on that, before"):
            fuse_reward_head(nn.parallel.DistributedDataParallel(stock))
    finally:
        torch.distributed.destroy_process_group()


class Wrapper(nn.Module):
    """What PEFT's LoRA layers and ModulesToSaveWrapper look like from outside."""

    def __init__(self, name, child):
        super().__init__()
        setattr(self, name, child)


class QuantizedLinear(nn.Linear):
    pass


class OwnSequential(nn.Sequential):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


class WideValueHead(ValueHead):
    def __init__(self, config):
        super().__init__(config)
        self.summary = nn.Linear(config.hidden_size, 2)


class ScaledValueHead(ValueHead):
    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(1))


class TanhValueHead(ValueHead):
    def forward(self, hidden_states):
        return torch.tanh(super().forward(hidden_states))


class LateDropoutValueHead(ValueHead):
    def forward(self, hidden_states):
        return self.dropout(self.summary(hidden_states))


class FunctionalDropoutValueHead(ValueHead):
    def forward(self, hidden_states):
        return super().forward(nn.functional.dropout(hidden_states, 0.5, self.training))


class EvalClampValueHead(ValueHead):
    def forward(self, hidden_states):
        return super().forward(hidden_states).clamp(*((-9e9, 9e9) if self.training else (0, 1)))


class SqueezingValueHead(ValueHead):
    def forward(self, hidden_states):
        return super().forward(hidden_states).squeeze(-1)


class MaskedValueHead(ValueHead):
    def forward(self, hidden_states, mask):
        return super().forward(hidden_states) * mask


def parametrized(head):
    nn.utils.parametrizations.weight_norm(head)
    return head


def integers():
    head = nn.Linear(WIDTH, 1)
    head.weight = nn.Parameter(torch.ones(1, WIDTH, dtype=torch.int8), requires_grad=False)
    return head


def buffered(head):
    head.register_buffer("scale", torch.ones(1))
    return head


def steps(*modules):
    return lambda: nn.Sequential(*modules)


def linear(inputs=WIDTH, outputs=12):
    return nn.Linear(inputs, outputs)


# What is refused -> the head, and words that the message must hold besides the list of kinds.
UNKNOWN = {
    "another module": (lambda: nn.Bilinear(4, 4, 1), "found nn.Bilinear, wanted a supported head"),
    "outputs": (lambda: nn.Linear(WIDTH, 3), "found nn.Linear(16, 3) with 3 outputs, wanted 1"),
    "outputs of a sequential": (
        steps(linear(), nn.Tanh(), linear(12, 3)),
        "found nn.Linear(12, 3) at '2' with 3 outputs, wanted 1",
    ),
    "outputs of a value head": (
        lambda: value_head(0.1, WideValueHead),
        "found nn.Linear(16, 2) at 'summary' with 2 outputs, wanted 1",
    ),
    "gelu": (steps(linear(), nn.GELU(), linear(12, 1)), "found nn.GELU at '1', wanted a supported activation there"),
    "mixed": (
        steps(linear(), nn.Tanh(), linear(12, 12), nn.ReLU(), linear(12, 1)),
        "found nn.Sequential with different activations, nn.Tanh and nn.ReLU, wanted the same throughout",
    ),
    "dropout first": (steps(nn.Dropout(0.1), linear(WIDTH, 1)), "found nn.Dropout at '0', wanted nn.Linear there"),
    "dropout inside": (
        steps(linear(), nn.ReLU(), nn.Dropout(0.1), linear(12, 1)),
        "found nn.Dropout at '2', wanted nn.Linear there",
    ),
    "no activation": (
        steps(linear(), linear(12, 1)),
        "found nn.Linear(12, 1) at '1', wanted a supported activation there",
    ),
    "activation last": (
        steps(linear(WIDTH, 1), nn.Tanh()),
        "found nn.Sequential ending in nn.Tanh at '1', wanted nn.Linear(F, 1)",
    ),
    "empty": (steps(), "found nn.Sequential without layers, wanted nn.Linear(F, 1) as the last"),
    "six layers": (lambda: sequential(nn.SiLU, 6), "found nn.Sequential of 6 nn.Linear, wanted at most 5"),
    "quantized": (lambda: QuantizedLinear(WIDTH, 1), "QuantizedLinear, wanted a supported head (adapters, quant"),
    "quantized inside": (
        steps(linear(), nn.Tanh(), QuantizedLinear(12, 1)),
        "QuantizedLinear at '2', wanted nn.Linear there (adapters",
    ),
    "parametrized": (lambda: parametrized(linear(WIDTH, 1)), "ParametrizedLinear, wanted a supported head (adapters"),
    "lora": (
        steps(Wrapper("base_layer", linear()), nn.Tanh(), linear(12, 1)),
        "Wrapper at '0', wanted nn.Linear there (adapters",
    ),
    "modules to save": (
        lambda: Wrapper("original_module", linear(WIDTH, 1)),
        "Wrapper, wanted a supported head (adapters",
    ),
    "integers": (integers, "found nn.Linear(16, 1) whose weight is Parameter of torch.int8, wanted a plain floating"),
    "buffer": (
        lambda: buffered(linear(WIDTH, 1)),
        "found nn.Linear(16, 1) holding weight, bias, scale, wanted weight and bias alone",
    ),
    "buffer of a sequential": (
        lambda: buffered(sequential(nn.Tanh)),
        "found nn.Sequential holding scale, wanted layers alone",
    ),
    "subclass of sequential": (lambda: OwnSequential(linear(WIDTH, 1)), "OwnSequential, wanted a supported head."),
    "tanh in a value head": (
        lambda: value_head(0.1, TanhValueHead),
        "TanhValueHead, whose forward is not summary(dropout(hidden))",
    ),
    "squeezing value head": (
        lambda: value_head(0.1, SqueezingValueHead),
        "SqueezingValueHead, whose forward is not summary(dropout(hidden))",
    ),
    "late dropout in a value head": (
        lambda: value_head(0.1, LateDropoutValueHead),
        "LateDropoutValueHead, whose forward is not summary(dropout(hidden))",
    ),
    "functional dropout in a value head": (
        lambda: value_head(0.1, FunctionalDropoutValueHead),
        "FunctionalDropoutValueHead, whose forward is not summary(dropout(hidden))",
    ),
    "value head of another kind in eval mode": (
        lambda: value_head(0.1, EvalClampValueHead),
        "EvalClampValueHead, whose forward is not summary(dropout(hidden))",
    ),
    "value head with a mask": (lambda: value_head(0.1, MaskedValueHead), "MaskedValueHead, whose forward fails: "),
    "parameter in a value head": (
        lambda: value_head(0.1, ScaledValueHead),
        "ScaledValueHead with scale, wanted `dropout` and `summary` alone",
    ),
    "lora in a value head": (
        lambda: Wrapper("summary", Wrapper("base_layer", linear(WIDTH, 1))),
        "test_drop_in.Wrapper) (adapters, quantisation and parametrisations change a layer: fuse before adding",
    ),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_unknown_head_is_named_and_the_kinds_are_listed(case):
    make_head, words = UNKNOWN[case]
    model = Backbone(score=make_head())
    before = dict(model.named_modules())
    with pytest.raises(ValueError) as caught:
        fuse_reward_head(model)
    message = str(caught.value)
    assert message.startswith("Backbone.score: ") and words in message
    for kind in ("nn.Linear(D, 1)", "nn.Identity, nn.Tanh, nn.ReLU, nn.SiLU", "TRL's ValueHead", "at most 5 nn.Linear"):
        assert kind in message
    assert dict(model.named_modules()) == before


HOOKS = {
    "forward_hooks": lambda m: m.register_forward_hook(lambda *_: None),
    "forward_pre_hooks": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "backward_hooks": lambda m: m.register_full_backward_hook(lambda *_: None),
    "backward_pre_hooks": lambda m: m.register_full_backward_pre_hook(lambda *_: None),
    "state_dict_hooks": lambda m: m.register_state_dict_post_hook(lambda *_: None),
    "state_dict_pre_hooks": lambda m: m.register_state_dict_pre_hook(lambda *_: None),
    "load_state_dict_pre_hooks": lambda m: m.register_load_state_dict_pre_hook(lambda *_: None),
    "load_state_dict_post_hooks": lambda m: m.register_load_state_dict_post_hook(lambda *_: None),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_are_refused(hook):
    model, _ = make("score-linear")
    HOOKS[hook](model.score)
    with pytest.raises(ValueError, match=rf"^Backbone.score: nn.Linear\(16, 1\) has {hook}, which fusing would drop"):
        fuse_reward_head(model)
    model, _ = make("score-tanh")
    HOOKS[hook](model.score[1])
    with pytest.raises(ValueError, match=rf"^Backbone.score: nn.Tanh at '1' has {hook}, which fusing would drop"):
        fuse_reward_head(model)


def test_a_forward_set_on_the_instance_is_refused():
    model, _ = make("score-linear-bias")
    model.score.forward = model.score.forward
    with pytest.raises(ValueError, match=r"nn.Linear\(16, 1\) has a forward set on the instance"):
        fuse_reward_head(model)


def test_a_layer_replaced_after_fusing_raises():
    model = fuse_reward_head(make("score-tanh")[0])
    model.score.add_module("0", QuantizedLinear(WIDTH, 12))
    with pytest.raises(RuntimeError, match=r"layer '0' was replaced by .*QuantizedLinear after fusing, which would be"):
        model(tokens_of())


def test_models_without_one_head_are_refused():
    with pytest.raises(ValueError, match=r"Backbone has no reward head, found embed \(nn.Embedding\), mix \(nn.Linear"):
        fuse_reward_head(Backbone(classifier=nn.Linear(WIDTH, 1)))
    with pytest.raises(ValueError, match=r"Linear has no reward head, found no submodules\. Supported"):
        fuse_reward_head(nn.Linear(WIDTH, 1))
    empty = Backbone(score=None)
    with pytest.raises(ValueError, match=r"found embed \(nn.Embedding\), mix \(nn.Linear\(16, 16\)\)\. Supported"):
        fuse_reward_head(empty)
    two = Backbone(score=nn.Linear(WIDTH, 1), v_head=value_head(0.1))
    with pytest.raises(
        ValueError, match=r"several heads, score \(nn.Linear\(16, 1\)\), v_head \(.*ValueHead\); choose"
    ):
        fuse_reward_head(two)
    two.score = FusedRewardHead(two.score)
    assert two(tokens_of()).shape == (3, 5, 1)


def test_unknown_implementation_is_refused_at_once():
    model, _ = make("score-linear")
    words = "impl: got 'cuda', wanted one of auto, triton, eager"
    with pytest.raises(ValueError, match=words):
        fuse_reward_head(model, "cuda")
    with pytest.raises(ValueError, match=words):
        FusedRewardHead(model.score, "cuda")
    assert type(model.score) is nn.Linear
    with pytest.raises(ValueError, match=words):
        fuse_reward_head(fuse_reward_head(model), "cuda")
    assert model.score.impl == "auto"


SIZES = {
    "Qwen2": {"intermediate_size": 48, "num_key_value_heads": 1},
    "GPT2": {},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 24},
    "Bert": {"intermediate_size": 48},
}


def tiny_classifier(kind, tokenizer, **settings):
    """A random stock *ForSequenceClassification for CPU, seeded."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id, **{"num_labels": 1, **SIZES[kind], **settings},
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3.0)
    return model


@impls
@pytest.mark.parametrize("kind", ["Qwen2", "GPT2", "OPT"])
def test_transformers_classes_pool_and_save_as_before(kind, impl, tmp_path):
    tokenizer = make_tokenizer()
    stock = tiny_classifier(kind, tokenizer)
    fused = fuse_reward_head(copy.deepcopy(stock), impl)
    texts = ["the cat sits", "no", "is this a red dog on the blue cat yes so"]
    alone = [stock(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        logits = fused(**batch).logits
        assert_near(logits, stock(**batch).logits, 1e-5)
        # OPT and GPT2 number positions from the left edge: only Qwen2 is exact there.
        if side == "right" or kind == "Qwen2":
            assert_near(logits, torch.stack(alone), 1e-5)
    assert fused.dtype == torch.float32 and fused.score.weight is fused.get_parameter("score.weight")
    fused.save_pretrained(tmp_path)
    loaded, info = type(stock).from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded.score) is nn.Linear and not any(info.values()), info
    assert_near(loaded(**batch).logits, logits, 1e-5)
    assert_near(fuse_reward_head(loaded, impl)(**batch).logits, logits, 0.0)


def test_transformers_classes_with_another_head_are_refused():
    tokenizer = make_tokenizer()
    words = r"^Qwen2ForSequenceClassification.score: found nn.Linear\(32, 2\) with 2 outputs, wanted 1. Supported heads"
    with pytest.raises(ValueError, match=words):
        fuse_reward_head(tiny_classifier("Qwen2", tokenizer, num_labels=2))
    words = r"^BertForSequenceClassification has no reward head, found bert .*, classifier \(nn.Linear\(32, 1\)\)"
    with pytest.raises(ValueError, match=words):
        fuse_reward_head(tiny_classifier("Bert", tokenizer))


def train_with_trl(model, tokenizer, folder, steps=4, **settings):
    """RewardTrainer on raw messages, nothing of it changed; returns its log entry of every step."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    rng = np.random.default_rng(0)

    def messages():
        answer = {"role": "assistant", "content": words(rng, int(rng.integers(1, 9)))}
        return [{"role": "user", "content": words(rng, 4)}, answer]

    arguments = RewardConfig(
        str(folder), per_device_train_batch_size=2, max_steps=steps, save_steps=steps, logging_steps=1,
        learning_rate=1e-2, use_cpu=True, report_to="none", disable_tqdm=True, **settings,
    )  # fmt: skip
    rows = Dataset.from_list([{"chosen": messages(), "rejected": messages()} for _ in range(2 * steps)])
    trainer = RewardTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("impl", "settings"),
    [
        ("eager", {"bf16": False}),
        ("triton", {"bf16": False}),
        # TRL's default is bf16 autocast, in which Triton's interpreter cannot multiply.
        ("eager", {}),
    ],
    ids=["eager", "triton", "eager-autocast"],
)
def test_trl_reward_trainer_takes_the_same_steps(impl, settings, tmp_path):
    pytest.importorskip("trl")
    tokenizer = make_tokenizer()
    stock = tiny_classifier("Qwen2", tokenizer)
    fused = fuse_reward_head(copy.deepcopy(stock), impl)
    before = stock.score.weight.detach().clone()
    wanted = train_with_trl(stock, tokenizer, tmp_path / "stock", **settings)
    got = train_with_trl(fused, tokenizer, tmp_path / "fused", **settings)
    assert isinstance(fused.score, FusedRewardHead) and len(got) == len(wanted) == 4
    for name in ("loss", "grad_norm", "mean_reward", "margin"):
        assert_near(*(torch.tensor([entry[name] for entry in log]) for log in (got, wanted)), 2e-5)
    assert_near(fused.score.weight, stock.score.weight, 2e-5)
    assert (stock.score.weight - before).abs().max() > 0.01
    loaded = type(stock).from_pretrained(tmp_path / "fused" / "checkpoint-4")
    assert type(loaded.score) is nn.Linear
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, fused.state_dict()[name]), name
