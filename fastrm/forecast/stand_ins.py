"""Functions that keep and make in memory what Liger's do, for passes without data.

Liger launches Triton kernels by itself, which no tensor without data goes through. Here are its two functions without
the kernels; what each saves and makes was read in liger-kernel 0.8.5.
"""

import importlib.util
from collections.abc import Callable

import torch
from torch import nn

from fastrm.config import Config
from fastrm.model.families import gated_activations
from fastrm.model.layers import stock_gate, stock_norm
from fastrm.model.network import RewardNetwork
from fastrm.model.text import SILU


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


def describe_replaced(config: Config) -> list[str]:
    """Return sentences on what of a configuration a step without data does not run as it is."""
    lines = []
    if config.compile != "off":
        lines.append("compile: memory is that of layers without it, which keep more for the backward pass")
    elif config.kernels == "triton":
        lines.append("kernels: Liger's RMSNorm and SwiGLU are replaced by functions that keep and make the same")
    if config.kernels == "triton" and config.paradigm != "reward":
        lines.append(
            "kernels: the loss of what is written is PyTorch's, which has the LM head's gradient from the forward pass "
            "on; Liger's makes it in the backward pass"
        )
    if config.precision.fp8 != "off" and importlib.util.find_spec("torchao") is None:
        lines.append("FP8: torchao is not installed here; memory is that of bf16, which holds copies of weights")
    if config.precision.dtype == "bf16":
        lines.append(
            "bf16: a LayerNorm, as in Qwen2-VL's tower, is taken to keep bf16 for the backward pass, as on a CPU; on a "
            "GPU it keeps float32, so that such a tower needs more where it is trained"
        )
    if config.model.attention == "sdpa":
        lines.append("attention: sdpa is taken to run as on a CPU; the scores that it holds on a GPU are not counted")
    return lines
