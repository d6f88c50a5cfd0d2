"""The choice of the implementation that runs an operation. An explicit choice never falls back to another."""

from types import SimpleNamespace
from typing import NamedTuple

import torch

from fastrm_kernels.launch import triton_obstacle

# (operation, device name, dtype) -> the implementation that was faster there. Entries come from bench/results
# only: a figure measured on that very device, with the correctness gate green. None was measured yet.
MEASURED: dict[tuple[str, str, torch.dtype], str] = {}


class Choice(NamedTuple):
    """An implementation by name, and in words the reason why it is the one."""

    name: str
    why: str


def constant(function):
    """Mark a function's result as constant for torch.compile, as torch.compiler.assume_constant_result does.

    It spares the import of torch._dynamo, and with it of Triton, that this function costs.
    """
    function._dynamo_marked_constant = True
    return function


def pick_auto(op: str, tensor: torch.Tensor) -> Choice:
    """Return the implementation that `auto` means for these inputs."""
    obstacle = obstacle_to_triton(tensor)
    if obstacle is not None:
        on_cpu = tensor.device.type == "cpu"
        return Choice("eager", "Triton needs CUDA" if on_cpu else f"Triton cannot run {op} here: {obstacle}")
    device = _device_name(tensor.device)
    if (op, device, tensor.dtype) not in MEASURED:
        what = f"{tensor.dtype} on {device}".replace("torch.", "")
        return Choice("eager", f"{op} was not measured for {what}; ask for triton by name to use it")
    return Choice(MEASURED[op, device, tensor.dtype], f"the faster one for {op} in bench/results of {device}")


def pick(op: str, impl: str, tensor: torch.Tensor) -> str:
    """Return "triton" or "eager" for an `impl` of auto, triton or eager.

    Raises:
        ValueError: for another name, or for triton where it cannot run.
    """
    if impl == "auto":
        return pick_auto(op, tensor).name
    if impl not in ("triton", "eager"):
        raise ValueError(f"impl: got {impl!r}, wanted one of auto, triton, eager")
    obstacle = obstacle_to_triton(tensor) if impl == "triton" else None
    if obstacle is not None:
        raise ValueError(f"{op} with impl='triton': {obstacle}; pass impl='eager', which runs everywhere")
    return impl


def obstacle_to_triton(tensor: torch.Tensor) -> str | None:
    """Return why Triton cannot run on this tensor, or None; torch.compile takes the answer as a constant."""
    return _obstacle(tensor.dtype, tensor.device)


@constant
def _obstacle(dtype: torch.dtype, device: torch.device) -> str | None:
    return triton_obstacle(SimpleNamespace(dtype=dtype, device=device))


@constant
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
