"""Linear layers that compute in FP8: torchao's Float8Linear, and the same for fused projections.

Imported only where FP8 is asked for, because importing torchao takes seconds.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchao.float8.float8_linear import Float8Linear

from fastrm.model.fusion import FusedLinear


class Fp8Linear(Float8Linear):
    """A Float8Linear under autocast of any device and under ZeRO-3 that can be switched off.

    The parameters, their names and their dtype are those of the nn.Linear that it is made from.

    Attributes:
        enabled: compute in FP8; else as nn.Linear does.
    """

    enabled = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Compute (..., K) -> (..., N) in the dtype of autocast, or of the input without it."""
        if not self.enabled:
            return F.linear(input, self.weight, self.bias)
        # Float8Linear looks only for CUDA's autocast, and would compute in float32 on a CPU.
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        if not hasattr(self.weight, "ds_id") or torch.compiler.is_compiling():
            return super().forward(input)
        # ZeRO-3 frees a gathered weight after the forward pass and gathers it again for the backward one.
        # The transposed view that Float8Linear saves would keep all of them.
        with torch.autograd.graph.saved_tensors_hooks(self._save, self._restore):
            return super().forward(input)

    def _save(self, tensor: torch.Tensor) -> torch.Tensor | None:
        return None if tensor.data_ptr() == self.weight.data_ptr() else tensor

    def _restore(self, saved: torch.Tensor | None) -> torch.Tensor:
        return self.weight.detach().t() if saved is None else saved


class Fp8FusedLinear(Fp8Linear, FusedLinear):
    """An Fp8Linear that is also a FusedLinear: its state dict is split into the stock names."""

    @classmethod
    def from_float(cls, mod: FusedLinear, config) -> "Fp8FusedLinear":
        """Make an FP8 layer with the parameters of `mod` (not copies)."""
        # __init__ makes weights of its own; on the meta device they take no memory.
        shells = {name: nn.Linear(mod.in_features, rows, bias=False, device="meta") for name, rows in mod.parts}
        made = cls(shells, config=config)
        made.weight, made.bias = mod.weight, mod.bias
        return made


def to_fp8(linear: nn.Linear, config) -> Fp8Linear:
    """Return the FP8 layer for a linear layer; both have the same parameters.

    Args:
        config: a torchao Float8LinearConfig.
    """
    kind = Fp8FusedLinear if isinstance(linear, FusedLinear) else Fp8Linear
    return kind.from_float(linear, config).train(linear.training)
