"""Layers of experts: their weights in files and in memory, and what of them a token uses.

The stock modules compute them (Qwen2-MoE, Qwen3-MoE). In memory the experts of a layer are two tensors, (E, 2 I, D) of
gates and ups and (E, D, I) of downs; published files, which vLLM reads too, have a matrix for each expert and part.
transformers turns one into the other in both directions; so does this module, without a copy of a layer.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fastrm.model.weight_files import StoredTensor

# By the name in memory behind `experts.`, the names in files behind the expert's number, in the order of rows.
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_IN_FILE = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_IN_MEMORY = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")


def has_experts(mlp: nn.Module) -> bool:
    """Return whether an MLP is a stock layer of experts."""
    return hasattr(mlp, "experts")


def expert_matrices(text, number: int) -> int:
    """Return the elements of the matrices that a token goes through in a layer of experts.

    They are the router's, those of the token's own experts, and of the shared one; 0 for a layer without experts.

    Args:
        text: a text config; layers have experts as transformers' decoder layers decide it.
        number: of the layer.
    """
    count = getattr(text, "num_experts", 0)
    if not count or number in text.mlp_only_layers or (number + 1) % text.decoder_sparse_step:
        return 0
    shared = getattr(text, "shared_expert_intermediate_size", 0)
    width = text.num_experts_per_tok * text.moe_intermediate_size + shared
    return text.hidden_size * (count + 3 * width + bool(shared))


def expert_parts(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name in published files, matrix) for each expert of a tensor of experts; any other as it is."""
    found = _IN_MEMORY.fullmatch(name)
    if found is None:
        yield name, tensor
        return
    layer, kind = found.groups()
    for number, expert in enumerate(tensor):
        for part, matrix in zip(_PARTS[kind], expert.chunk(len(_PARTS[kind])), strict=True):
            yield f"{layer}.{number}.{part}.weight", matrix


def is_of_expert(name: str) -> bool:
    """Return whether a name in published files is that of an expert's matrix."""
    return _IN_FILE.fullmatch(name) is not None


@dataclass(frozen=True)
class StackedTensor(StoredTensor):
    """The tensor of a layer's experts, from the matrices of equal size that follow one another in it."""

    parts: tuple[StoredTensor, ...]

    def read_into(self, out: torch.Tensor, first: int = 0) -> None:
        """Fill `out` as `StoredTensor.read_into`."""
        size, end = self.parts[0].numel, first + out.numel()
        for number in range(first // size, -(-end // size)):
            begin, stop = max(first, number * size), min(end, (number + 1) * size)
            self.parts[number].read_into(out[begin - first : stop - first], begin - number * size)


def stack_experts(rest: dict[str, StoredTensor], find_name: Callable[[str], str | None]) -> dict[str, StoredTensor]:
    """Take the experts' matrices out of `rest`, by their names in files; return their tensors by names in the model.

    Those of a layer that lacks one, or whose shapes differ, stay in `rest`.

    Args:
        find_name: from a weight's name in files to that in the model; None: the model has no such weight.
    """
    layers: dict[tuple[str, str], dict[tuple[int, int], str]] = {}
    for name in rest:
        if (found := _IN_FILE.fullmatch(name)) is not None:
            layer, number, part = found.groups()
            kind = next(kind for kind, parts in _PARTS.items() if part in parts)
            layers.setdefault((layer, kind), {})[int(number), _PARTS[kind].index(part)] = name
    stacked = {}
    for (layer, kind), names in layers.items():
        places, target = sorted(names), find_name(f"{layer}.{kind}")
        parts = tuple(rest[names[place]] for place in places)
        count, (rows, columns) = len(_PARTS[kind]), parts[0].shape
        whole = places == [(number, part) for number in range(len(places) // count) for part in range(count)]
        if target is None or not whole or {part.shape for part in parts} != {(rows, columns)}:
            continue
        first = parts[0]
        shape = (len(places) // count, count * rows, columns)
        stacked[target] = StackedTensor(first.file, first.dtype, shape, first.start, parts)
        for name in names.values():
            del rest[name]
    return stacked
