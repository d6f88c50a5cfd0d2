"""Frozen linear layers in 4 bits: bitsandbytes' NF4, by layers that compute under autocast of any device.

Each 64 elements of a row share one float32 scale; an element is one of 16 numbers times it (Dettmers et al., arXiv
2305.14314, section 3), 4.5 bits in all. The scales are not quantised once more, as the paper does: that saves another
0.37 bits and makes every element depend on the whole matrix, which could then not be read in pieces (`Nf4Tensor`).

Imported only where it is asked for: bitsandbytes is not installed everywhere.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import bitsandbytes as bnb
import torch
from bitsandbytes import functional
from torch import nn

from fastrm.errors import ConfigError
from fastrm.model.weight_files import CHUNK_BYTES, StoredTensor

BLOCK = 64


class Nf4Linear(nn.Linear):
    """A frozen linear layer whose weight is in NF4.

    Attributes:
        weight: (N * K / 2, 1) uint8.
        quant_state: bitsandbytes' scales and shape.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        packed, self.quant_state = _quantize(linear.weight.detach())
        self.weight, self.bias = nn.Parameter(packed, requires_grad=False), linear.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Compute (..., K) -> (..., N) in the dtype of autocast, or of the input without it."""
        if torch.is_autocast_enabled(device := input.device.type):
            input = input.to(torch.get_autocast_dtype(device))
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return bnb.matmul_4bit(input, self.weight, bias=bias, quant_state=self.quant_state)

    def dequantize(self) -> torch.Tensor:
        """Return the weight (N, K) that the layer multiplies with, in the dtype that it was quantised from."""
        return functional.dequantize_4bit(self.weight, self.quant_state)


@dataclass(frozen=True)
class Nf4Tensor(StoredTensor):
    """A matrix in a file as it comes out of NF4: what a layer of a run with model.quantize multiplied with."""

    def read_into(self, out: torch.Tensor, first: int = 0) -> None:
        """Fill `out` as `StoredTensor.read_into`."""
        end, step = first + out.numel(), CHUNK_BYTES // 4
        for begin in range(first // BLOCK * BLOCK, end, step):
            part = torch.empty(min(step, -(-(end - begin) // BLOCK) * BLOCK))
            super().read_into(part, begin)
            part = functional.dequantize_4bit(*_quantize(part.view(-1, BLOCK))).view(-1)
            wanted = slice(max(first, begin), min(end, begin + part.numel()))
            out[wanted.start - first : wanted.stop - first].copy_(part[wanted.start - begin : wanted.stop - begin])


def quantize_when_placed(model: nn.Module, layers: Collection[str]) -> Callable[[str, nn.Parameter], None]:
    """Return a function for `Backbone.load` that quantises the weight of each of the layers when it has been read.

    Args:
        model: the backbone.
        layers: their names in it.

    Raises:
        ConfigError: if there are no layers.
    """
    if not layers:
        raise ConfigError(
            f"model.quantize nf4: no linear layer of {type(model).__name__} has inputs of a multiple of {BLOCK}; "
            "remove the key"
        )

    def placed(name: str, parameter: nn.Parameter) -> None:
        path, _, kind = name.rpartition(".")
        if kind == "weight" and path in layers:
            model.set_submodule(path, Nf4Linear(model.get_submodule(path)))

    return placed


def _quantize(weight: torch.Tensor):
    return functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
