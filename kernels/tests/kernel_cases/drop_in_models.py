"""Tiny models with a head of every kind that `fuse_reward_head` knows, and how two runs are compared."""

import contextlib
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

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
