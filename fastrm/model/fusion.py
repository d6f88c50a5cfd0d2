"""Projections of one input as one matrix product: q, k, v -> `qkv_proj`, gate, up -> `gate_up_proj`.

One large product keeps a GPU busier than three, and makes the narrow k and v wide enough for FP8.
The names outside stay those of transformers: a module's state dict splits its fused matrices, and
loading joins them, so checkpoints and exports are the same whether a network is fused or not.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

QKV, GATE_UP = "qkv_proj", "gate_up_proj"
# Fused projection -> stock ones, in the order of their rows.
PARTS = {QKV: ("q_proj", "k_proj", "v_proj"), GATE_UP: ("gate_proj", "up_proj")}


class FusedLinear(nn.Linear):
    """Several linear layers of one input; `parts` is ((stock name, rows), ...)."""

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
        """(stock name, its rows) of a tensor with this layer's rows."""
        pieces = tensor.split([count for _, count in self.parts])
        return zip((name for name, _ in self.parts), pieces, strict=True)


def fuse_projections(layers: Iterable[nn.Module]) -> int:
    """Fuse q, k, v and gate, up of stock decoder layers, in place; returns the number of fused matrices.

    The last layer keeps q, k and v: its queries are computed for the anchors alone.

    Args:
        layers: of the whole model, in order.
    """
    layers, before = list(layers), 0
    for number, layer in enumerate(layers):
        if number < len(layers) - 1:
            before += _fuse(layer.self_attn, QKV)
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
            # Where some are missing, loading names the fused key as missing and the others as unexpected.
            if all(key in state for key in keys):
                state[f"{prefix}{name}.{kind}"] = torch.cat([state.pop(key) for key in keys])


def split_fused(network: nn.Module, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """(stock name, tensor) of a parameter by its name in the network: its parts, or itself.

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
    """The tensor of a parameter, by its name in the network, from a mapping with stock names.

    Raises:
        KeyError: for a stock name that the mapping lacks.
    """
    path, _, kind = name.rpartition(".")
    owner = network.get_submodule(path)
    if not isinstance(owner, FusedLinear):
        return state[name]
    parent = path.rpartition(".")[0]
    return torch.cat([state[f"{parent}.{part}.{kind}"] for part, _ in owner.parts])
