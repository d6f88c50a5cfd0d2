"""Functions that keep and make in memory what Liger's do, for passes without data.

Liger launches Triton kernels by itself, which no tensor without data goes through. Here are its two functions without
the kernels; what each saves and makes was read in liger-kernel 0.8.5.
"""

from collections.abc import Callable

import torch
from torch import nn

from fastrm.config import Config
from fastrm.model.families import SILU, gated_activations
from fastrm.model.layers import stock_gate, stock_norm
from fastrm.model.network import RewardNetwork


def norm_and_gate(config: Config, network: RewardNetwork) -> tuple[Callable, Callable]:
    """Return RMSNorm and SwiGLU of a run on a GPU, by the rules of `pick_norm_and_gate`."""
    if config.kernels != "triton" or config.compile != "off":
        return stock_norm, stock_gate
    has_stock_gate = config.model.fuse_projections or gated_activations(network.model.config) - SILU
    return _norm, stock_gate if has_stock_gate else _gate


def _norm(module: nn.Module, states: torch.Tensor) -> torch.Tensor:
    return _Norm.apply(states, module.weight)


def _gate(activation: nn.Module, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return _Gate.apply(gate, up)


class _Norm(torch.autograd.Function):
    """An RMSNorm that keeps its input and a float32 number for each row."""

    @staticmethod
    def forward(ctx, states, weight):
        ctx.save_for_backward(states, weight, states.new_empty(states.shape[:-1], dtype=torch.float32))
        return torch.empty_like(states)

    @staticmethod
    def backward(ctx, upstream):
        weight = ctx.saved_tensors[1]
        return torch.empty_like(upstream), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


class _Gate(torch.autograd.Function):
    """A SwiGLU that keeps its inputs and writes their gradients over them."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx, upstream):
        return ctx.saved_tensors
