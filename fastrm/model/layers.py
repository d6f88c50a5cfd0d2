"""Stock decoder layers, evaluated by functions of our own, and their attention; blocks of vision towers are made alike.

Each function calls the modules of a stock layer in the order of its own forward; the weights and
their names stay transformers'. What differs is what a packed reward model needs: attention over the
prefix tree, fused projections (fusion.py), a choice of norm and SwiGLU, and a last layer that is
evaluated at the anchors alone. Every function takes tensors, a module and a `LayerKernels`, so that
torch.compile makes one graph of it for all layers and all packs.
"""

import importlib.util
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fastrm.errors import ConfigError
from fastrm.model.fusion import GATE_UP, QKV
from fastrm.model.text import SILU
from fastrm_kernels import TreeLayout, tree_attention
from fastrm_kernels.tree_attention.traced import Arguments, attention_arguments, tree_attention_traced

# config value -> implementation of tree_attention
BACKENDS = {"sdpa": "eager", "flash": "varlen", "flash_attn": "flash_attn", "triton": "triton"}

Norm = Callable[[nn.Module, torch.Tensor], torch.Tensor]
Gate = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class AttentionShape:
    """The heads of all attention layers of one kind: of the language model, or of the vision tower."""

    heads: int
    key_heads: int
    head_dim: int

    @staticmethod
    def of_language(config) -> "AttentionShape":
        """Return the shape for a transformers text config."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return AttentionShape(config.num_attention_heads, config.num_key_value_heads, head_dim)


@dataclass(frozen=True)
class Attention:
    """The attention of one kind of layers.

    Attributes:
        impl: of `tree_attention`.
        shape: of the layers.
        causal: False in the vision tower.
        traced: attention is called with tensors and numbers instead of a layout, as inside torch.compile, and without
            asking whether it can run on this device.
    """

    impl: str
    shape: AttentionShape
    causal: bool
    traced: bool = False

    def arguments(self, layout: TreeLayout, dtype: torch.dtype) -> TreeLayout | Arguments:
        """Return the arguments of `attend` for a layout: itself, or in a compiled layer its traceable form."""
        if not self.traced:
            return layout
        shape = self.shape
        return attention_arguments(
            layout, self.impl, dtype, shape.heads, shape.key_heads, shape.head_dim, causal=self.causal
        )

    def attend(self, query, key, value, arguments: TreeLayout | Arguments, scale: float) -> torch.Tensor:
        """Compute attention (Tq, H, K), (T, Hkv, K), (T, Hkv, K) -> (Tq, H, K), in the products' dtype."""
        if torch.is_autocast_enabled(query.device.type):
            # Rotary embedding computes in float32; SDPA would cast back by itself, the other backends not.
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if isinstance(arguments, TreeLayout):
            return tree_attention(query, key, value, arguments, scale=scale, causal=self.causal, impl=self.impl)
        return tree_attention_traced(query, key, value, arguments, scale)


class LayerKernels(NamedTuple):
    """The functions by which layers of one kind compute.

    Attributes:
        attention: of the tree, or of the vision tower.
        rotate: the stock rotary embedding (query, key, cos, sin) -> (query, key); None where layers have none.
        norm: (module, states) -> states, for RMSNorm modules.
        gate: (activation, gate, up) -> activation(gate) * up, with the stock MLP's own activation module.
    """

    attention: Attention
    rotate: Callable | None
    norm: Norm
    gate: Gate


def decoder_layer(layer: nn.Module, hidden, cos, sin, arguments, kernels: LayerKernels) -> torch.Tensor:
    """Run a decoder layer of the Llama/Qwen kind: (T, D) -> (T, D).

    Args:
        cos, sin: (T, K) of the rotary embedding.
        arguments: the attention's, of the tree.
    """
    attention = layer.self_attn
    states = apply_norm(layer.input_layernorm, hidden, kernels)
    query, key, value = _project(attention, states)
    query, key = kernels.rotate(query, key, cos, sin)
    mixed = kernels.attention.attend(query, key, value, arguments, attention.scaling)
    hidden = hidden + attention.o_proj(mixed.flatten(1))
    return hidden + apply_mlp(layer.mlp, apply_norm(layer.post_attention_layernorm, hidden, kernels), kernels)


def last_decoder_layer(layer: nn.Module, hidden, cos, sin, anchors, arguments, kernels: LayerKernels) -> torch.Tensor:
    """Run the last decoder layer where only the anchors are read: (T, D) -> (R, D).

    Keys and values need every token; queries, output projection and MLP only the anchors.

    Args:
        anchors: (R,) rows.
        arguments: the attention's, for queries at the anchors.
    """
    attention = layer.self_attn
    states = apply_norm(layer.input_layernorm, hidden, kernels)
    at = states.index_select(0, anchors)
    query = _head_norm(attention, "q_norm", split_heads(attention, attention.q_proj(at)))
    key = _head_norm(attention, "k_norm", split_heads(attention, attention.k_proj(states)))
    value = split_heads(attention, attention.v_proj(states))
    _, key = kernels.rotate(key, key, cos, sin)
    query, _ = kernels.rotate(query, query, cos.index_select(0, anchors), sin.index_select(0, anchors))
    mixed = kernels.attention.attend(query, key, value, arguments, attention.scaling)
    hidden = hidden.index_select(0, anchors) + attention.o_proj(mixed.flatten(1))
    return hidden + apply_mlp(layer.mlp, apply_norm(layer.post_attention_layernorm, hidden, kernels), kernels)


def _project(attention: nn.Module, states: torch.Tensor):
    """Return queries (T, H, K), keys and values (T, Hkv, K)."""
    if hasattr(attention, QKV):
        fused = attention.qkv_proj
        parts = fused(states).split([rows for _, rows in fused.parts], dim=-1)
    else:
        parts = attention.q_proj(states), attention.k_proj(states), attention.v_proj(states)
    query, key, value = (split_heads(attention, part) for part in parts)
    return _head_norm(attention, "q_norm", query), _head_norm(attention, "k_norm", key), value


def split_heads(attention: nn.Module, projected: torch.Tensor) -> torch.Tensor:
    """Return the states (T, H, K) of each head, from (T, H * K)."""
    return projected.unflatten(-1, (-1, attention.head_dim))


def _head_norm(attention: nn.Module, name: str, heads: torch.Tensor) -> torch.Tensor:
    """Normalise each head where the family does (Qwen3)."""
    return getattr(attention, name)(heads) if hasattr(attention, name) else heads


def apply_norm(module: nn.Module, states: torch.Tensor, kernels: LayerKernels) -> torch.Tensor:
    """Apply a stock norm: an RMSNorm by the kernels, a LayerNorm as it is."""
    return module(states) if isinstance(module, nn.LayerNorm) else kernels.norm(module, states)


def apply_mlp(mlp: nn.Module, states: torch.Tensor, kernels: LayerKernels) -> torch.Tensor:
    """Apply a stock MLP: a gated one by the kernels, with its matrices fused or not; any other as it is.

    A layer's experts are the stock module: which of them a token goes through depends on that token alone.
    """
    if hasattr(mlp, "experts"):
        return mlp(states[None])[0]
    if hasattr(mlp, GATE_UP):
        gate, up = mlp.gate_up_proj(states).chunk(2, dim=-1)
    elif hasattr(mlp, "gate_proj"):
        gate, up = mlp.gate_proj(states), mlp.up_proj(states)
    else:
        return mlp(states)  # in vision towers: two layers without a gate
    return mlp.down_proj(kernels.gate(mlp.act_fn, gate, up))


def rotation(attention: nn.Module) -> Callable:
    """Return the stock function that rotates queries and keys of this attention module."""
    module = sys.modules[type(attention).__module__]
    return module.apply_rotary_pos_emb_vision if hasattr(attention, "qkv") else module.apply_rotary_pos_emb


def stock_norm(module: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """Apply the stock RMSNorm."""
    return module(states)


def stock_gate(activation: nn.Module, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Compute activation(gate) * up with PyTorch's operations; `hidden_act` names the activation."""
    return activation(gate) * up


def liger_norm(module: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """Apply RMSNorm in one kernel of Liger's, with the rounding of the stock one."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # Not in place: the incoming gradient may be read by others (the residual stream).
    return LigerRMSNormFunction.apply(states, module.weight, module.variance_epsilon, 0.0, "llama", False)


def liger_gate(activation: nn.Module, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Compute silu(gate) * up in one kernel of Liger's, which keeps no intermediate for the backward pass.

    Only for MLPs whose activation is SiLU: the module is not looked at.
    """
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def pick_norm_and_gate(
    kernels: str, compiled: bool, fused: bool, device: torch.device, activations: Collection[str] = ("silu",)
) -> tuple[Norm, Gate, str]:
    """Pick RMSNorm and SwiGLU of the layers; return them, and their names with the reason.

    A call on the device proves them.

    Args:
        kernels: auto, triton or eager. triton means Liger's Triton kernels here.
        compiled: layers go through torch.compile, which makes kernels of the stock operations itself.
        fused: gate and up come from one matrix; Liger's SwiGLU would copy both out of it first.
        activations: of the model's gated MLPs, as its config names them; Liger's SwiGLU knows SiLU alone.

    Raises:
        ConfigError: if Liger is asked for and not installed, or does not run.
    """
    if compiled:
        return stock_norm, stock_gate, "stock operations, made into kernels by torch.compile"
    if kernels != "triton" or device.type != "cuda":
        why = f"kernels: {kernels}" if kernels != "triton" else f"Liger needs CUDA, this is {device.type}"
        return stock_norm, stock_gate, f"stock operations ({why})"
    if importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError('kernels: triton needs Liger for RMSNorm and SwiGLU; pip install "fastrm[liger]"')
    others = sorted(set(activations) - SILU)
    gate = stock_gate if fused or others else liger_gate
    _prove_liger(gate is liger_gate, device)
    if others:
        return liger_norm, gate, f"Liger RMSNorm, stock operations for {' and '.join(others)}"
    return liger_norm, gate, "Liger RMSNorm" + (", stock SwiGLU on the fused matrix" if fused else " and SwiGLU")


def _prove_liger(with_gate: bool, device: torch.device) -> None:
    """Run Liger's functions once, to prove that the results come from them."""
    states = torch.randn(4, 64, device=device, requires_grad=True)
    norm = nn.RMSNorm(64, device=device)
    norm.variance_epsilon = 1e-6
    outputs = {"LigerRMSNorm": liger_norm(norm, states)}
    wanted = {"LigerRMSNorm": states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6)}
    if with_gate:
        outputs["LigerSiLUMul"], wanted["LigerSiLUMul"] = liger_gate(nn.SiLU(), states, states), F.silu(states) * states
    for name, output in outputs.items():
        node = type(output.grad_fn).__name__
        if not node.startswith(name) or not torch.allclose(output, wanted[name], rtol=1e-4, atol=1e-5):
            raise ConfigError(f"kernels: triton: {name} did not run, or ran wrongly (got {node}); use kernels: eager")


class _KeepAlive(torch.autograd.Function):
    """Identity whose backward node holds the layouts, which compiled attention knows by number only."""

    @staticmethod
    def forward(ctx, states, layouts):
        ctx.layouts = layouts
        return states.view_as(states)

    @staticmethod
    def backward(ctx, upstream):
        return upstream, None


def keep_alive(states: torch.Tensor, layouts: Sequence[TreeLayout]) -> torch.Tensor:
    """Return `states`, with the layouts alive as long as its autograd graph."""
    return _KeepAlive.apply(states, layouts)
