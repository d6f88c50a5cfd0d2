"""Projections of one input as one matrix product: q, k, v -> `qkv_proj`, gate, up -> `gate_up_proj`.

One large product keeps a GPU busier than three, and makes the narrow k and v wide enough for FP8.
The names outside stay those of transformers: a module's state dict splits its fused matrices, and
loading joins them, so checkpoints and exports are the same whether a network is fused or not.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from fastrm.model.experts import has_experts

QKV, GATE_UP = "qkv_proj", "gate_up_proj"
# Fused projection -> stock ones, in the order of their rows.
PARTS = {QKV: ("q_proj", "k_proj", "v_proj"), GATE_UP: ("gate_proj", "up_proj")}


class FusedLinear(nn.Linear):
    """Several linear layers of one input in one; `parts` is ((stock name, rows), ...)."""

    def __init__(self, linears: dict[str, nn.Linear]):
        first = next(iter(linears.values()))
        rows = tuple((name, linear.out_features) for name, linear in linears.items())
        super().__init__(
            first.in_features, sum(count for _, count in rows), first.bias is not None, first.weight.device,
            first.weight.dtype,
        )  # fmt: skip
        self.parts = rows
        with torch.no_grad():
            self.weight.copy_(torch.cat([linear.weight for linear in linears.values()]))
            if self.bias is not None:
                self.bias.copy_(torch.cat([linear.bias for linear in linears.values()]))
        self.requires_grad_(first.weight.requires_grad)

    def split(self, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (stock name, its rows) of a tensor with this layer's rows."""
        pieces = tensor.split([count for _, count in self.parts])
        return zip((name for name, _ in self.parts), pieces, strict=True)


def fuse_projections(layers: Iterable[nn.Module]) -> int:
    """Fuse q, k, v and gate, up of stock decoder layers, in place; return the number of fused matrices.

    The last layer keeps q, k and v: its queries are computed for the anchors alone.

    Args:
        layers: of the whole model, in order.
    """
    layers, before = list(layers), 0
    for number, layer in enumerate(layers):
        if number < len(layers) - 1:
            before += _fuse(layer.self_attn, QKV)
        if not has_experts(layer.mlp):  # whose gate and up are one tensor in the stock module
            before += _fuse(layer.mlp, GATE_UP)
    return before


def _fuse(module: nn.Module, name: str) -> int:
    if hasattr(module, name):
        return 0
    linears = {part: getattr(module, part) for part in PARTS[name]}
    setattr(module, name, FusedLinear(linears))
    for part in linears:
        delattr(module, part)
    module.register_state_dict_post_hook(_write_stock_names)
    module.register_load_state_dict_pre_hook(_read_stock_names)
    return 1


def _write_stock_names(module: nn.Module, state: dict, prefix: str, _) -> None:
    for name in PARTS:
        for kind in ("weight", "bias"):
            tensor = state.pop(f"{prefix}{name}.{kind}", None)
            if tensor is not None:
                pieces = getattr(module, name).split(tensor)
                state |= {f"{prefix}{part}.{kind}": piece for part, piece in pieces}


def _read_stock_names(module: nn.Module, state: dict, prefix: str, *_) -> None:
    for name, parts in PARTS.items():
        for kind in ("weight", "bias"):
            keys = [f"{prefix}{part}.{kind}" for part in parts]
            # If some parts are missing, loading names the fused key as missing and the other parts as unexpected.
            if all(key in state for key in keys):
                state[f"{prefix}{name}.{kind}"] = torch.cat([state.pop(key) for key in keys])


def split_fused(network: nn.Module, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (stock name, tensor) of a parameter by its name in the network: its parts, or itself.

    For a tensor with the parameter's rows that does not come from `state_dict`, such as one that was
    gathered over ranks.
    """
    path, _, kind = name.rpartition(".")
    owner = network.get_submodule(path)
    if not isinstance(owner, FusedLinear):
        yield name, tensor
        return
    parent = path.rpartition(".")[0]
    for part, piece in owner.split(tensor):
        yield f"{parent}.{part}.{kind}", piece


def join_parts(network: nn.Module, name: str, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Join the tensor of a parameter, by its name in the network, from a mapping with stock names.

    Raises:
        KeyError: for a stock name that the mapping lacks.
    """
    names = stock_names(network, name)
    return state[name] if names == [name] else torch.cat([state[part] for part in names])


def stock_names(network: nn.Module, name: str) -> list[str]:
    """Return the stock names of a parameter by its name in the network: its parts', row after row, or its own."""
    path, _, kind = name.rpartition(".")
    owner = network.get_submodule(path)
    if not isinstance(owner, FusedLinear):
        return [name]
    parent = path.rpartition(".")[0]
    return [f"{parent}.{part}.{kind}" for part, _ in owner.parts]


def stock_entries(network: nn.Module) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """Yield (stock name, shape, dtype) of the network's whole state dict, also where it is divided over ranks."""
    for name, parameter in network.named_parameters():
        for part, piece in split_fused(network, name, torch.empty(whole_shape(parameter), device="meta")):
            yield part, tuple(piece.shape), parameter.dtype
    for name, buffer in stored_buffers(network):
        yield name, tuple(buffer.shape), buffer.dtype


def stored_buffers(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the buffers that a state dict holds, by name."""
    for path, module in network.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}", buffer


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of a parameter, also where ZeRO-3 has left a part of it here."""
    return getattr(parameter, "ds_shape", parameter.shape)
