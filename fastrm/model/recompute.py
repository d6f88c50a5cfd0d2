"""Activation checkpointing: the parts of a layer that its backward pass computes again instead of keeping.

none keeps all; full keeps a layer's input and runs the layer again; selective keeps the results of
matrix products and attention, which are dear to compute, and runs norms, activations, rotary
embeddings and casts again, which are dear to keep: about half of a layer's activations for a few
per cent of its time.
"""

import functools
import importlib
from collections.abc import Callable

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

MODES = ("none", "selective", "full")


def call_checkpointed(mode: str, compiled: bool, layer: Callable, *arguments):
    """Return layer(*arguments), recomputed in the backward pass as `mode` says.

    Args:
        compiled: the layer is a torch.compile graph, which itself decides what selective recomputes
            (`CompiledGraphs.recompute`).
    """
    if mode == "none" or (mode == "selective" and compiled) or not torch.is_grad_enabled():
        return layer(*arguments)
    # No module here draws random numbers; saving the generator's state would read it back from a GPU.
    options = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_products)
    return checkpoint(layer, *arguments, **options)


def _keep_products(context, operator, *_, **__) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _products() else CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def _products() -> frozenset:
    """Return the overloads of matrix products and of every implementation of attention that is loaded."""
    packets = [
        getattr(torch.ops.aten, name, None)
        for name in (
            "mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_attention_math",
        )
    ]  # fmt: skip
    packets += [torch.ops.fastrm.tree_attention, torch.ops.fastrm.tree_attention_eager, torch.ops.fastrm.flash_attn]
    importlib.import_module("torch.nn.attention.varlen")  # registers its operator
    packets.append(torch.ops.torch_attn._varlen_attn)
    return frozenset(
        getattr(packet, overload) for packet in packets if packet is not None for overload in packet.overloads()
    )
