"""The choice of the implementations of attention, reward head and loss: made once, at start, and printed."""

from collections.abc import Iterable

import torch

from fastrm.errors import ConfigError
from fastrm.model.families import FAMILIES
from fastrm.model.layers import BACKENDS, AttentionShape
from fastrm_kernels.dispatch import Choice, obstacle_to_triton, pick_auto
from fastrm_kernels.preference_head.autograd import FUSED_EDGES, FUSED_REWARDS
from fastrm_kernels.tree_attention.api import pick_attention, triton_attention_obstacle
from fastrm_kernels.tree_attention.flash_attn import flash_attn_name, flash_attn_obstacle
from fastrm_kernels.tree_attention.varlen import varlen_obstacle

CHOICES = ("auto", "triton", "eager")
_MODEST = ("triton", "flash_attn", "varlen", "eager")  # each runs wherever the earlier ones run


def pick_backend(
    requested: str, kernels: str, device: torch.device, dtype: torch.dtype, head_dims: Iterable[int]
) -> Choice:
    """Return the backend for model.attention and why; decided once, at start.

    Args:
        requested: auto, or a key of BACKENDS.
        kernels: auto, triton or eager; what auto follows.
        head_dims: of all attention layers, the vision tower's included.

    Raises:
        ConfigError: if an explicit choice cannot run on this device and precision.
    """
    what = f"{dtype} on {device.type}".replace("torch.", "")
    probes = [torch.empty(0, 1, head_dim, dtype=dtype, device=device) for head_dim in head_dims]
    if requested == "triton" or (requested == "auto" and kernels == "triton"):
        key = "model.attention" if requested == "triton" else "kernels"
        obstacle = next(filter(None, map(triton_attention_obstacle, probes)), None)
        if obstacle is not None:
            raise ConfigError(f"{key}: triton cannot run {what}: {obstacle}; use auto")
        return Choice("triton", f"set by {key} in the configuration")
    varlen = varlen_obstacle(probes[0]) is None
    if requested == "flash" and not varlen:
        raise ConfigError(
            f"model.attention: flash cannot run {what}; it needs cuda and precision.dtype bf16; use sdpa or auto"
        )
    if requested == "flash_attn":
        obstacle = next(filter(None, map(flash_attn_obstacle, probes)), None)
        if obstacle is not None:
            raise ConfigError(f"model.attention: flash_attn cannot run {what}: {obstacle}; use flash or auto")
        return Choice(requested, f"{flash_attn_name(device)}; set by model.attention in the configuration")
    if requested != "auto":
        return Choice(requested, "set by model.attention in the configuration")
    if kernels == "eager":
        return Choice("flash" if varlen else "sdpa", f"kernels: eager, {what}")
    choices = [pick_attention(probe) for probe in probes]
    # One backend serves the whole model: the layer decides whose choice comes last in _MODEST.
    implementation, why = max(choices, key=lambda choice: _MODEST.index(choice.name))
    backend = next(name for name, value in BACKENDS.items() if value == implementation)
    return Choice(backend, f"auto: {what}; {why}")


def pick_head_kernels(kernels: str, device: torch.device, num_layers: int = 2) -> Choice:
    """Return the implementation of the reward head and the loss, which compute in float32, and why.

    With Triton the reason also says how far the two are one operation.

    Args:
        num_layers: of the head.

    Raises:
        ConfigError: if an explicit choice cannot run on this device.
    """
    probe = torch.empty(0, device=device)
    if kernels == "auto":
        implementation, why = pick_auto("preference_head", probe)
        why = f"auto: float32 on {device.type}; {why}"
        return Choice(implementation, f"{why}; {_fusion(num_layers)}" if implementation == "triton" else why)
    obstacle = obstacle_to_triton(probe)
    if kernels == "triton" and obstacle is not None:
        raise ConfigError(f"kernels: triton cannot run the head on {device.type}: {obstacle}; use auto")
    why = "set by kernels in the configuration"
    return Choice(kernels, f"{why}; {_fusion(num_layers)}" if kernels == "triton" else why)


def _fusion(num_layers: int) -> str:
    """Return in words which parts of head and loss the training step computes in the same launches."""
    if num_layers == 1:
        return "not fused: a head of one layer leaves the loss to a launch of its own"
    what = "head" if num_layers == 2 else f"last two of {num_layers} layers"
    return f"{what} and loss fused in packs of up to {FUSED_REWARDS} responses and {FUSED_EDGES:,} preferences"


def head_dims_of(config) -> set[int]:
    """Return the head dimensions of a transformers model's attention layers."""
    found = {AttentionShape.of_language(config.get_text_config()).head_dim}
    if config.model_type in FAMILIES:
        found.add(FAMILIES[config.model_type].tower.heads(config.vision_config).head_dim)
    return found
