"""What `fuse_reward_head` and a fused head refuse, and the words with which they do."""

import pytest
import torch
from torch import nn

from fastrm_kernels.preference_head.drop_in import FusedRewardHead, fuse_reward_head
from kernel_cases.drop_in_models import WIDTH, Backbone, ValueHead, make, sequential, tokens_of, value_head


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
        "drop_in_refusals.Wrapper) (adapters, quantisation and parametrisations change a layer: fuse before adding",
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


def test_hidden_of_another_width_is_refused():
    fused = FusedRewardHead(nn.Linear(WIDTH, 1), "eager")
    with pytest.raises(ValueError, match="got a weight"):
        fused(torch.randn(WIDTH, 2))


def test_explicit_triton_never_falls_back():
    model = fuse_reward_head(make("score-linear")[0].double(), "triton")
    with pytest.raises(ValueError, match=r"impl='triton': got torch\.float64"):
        model(tokens_of())
