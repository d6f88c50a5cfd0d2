"""The one place where Triton kernels are launched, so that launches can also be recorded and compiled ahead of time.

Triton compiles a kernel once for every combination of its integers being 1, a multiple of 16, or neither.
Kernels therefore name the counts that change with every pack (rows, tokens, edges) in `do_not_specialize`: a
new pack must not stop training for a compilation.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

_recorded: "list[Launch] | None" = None


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid and everything that decides its machine code.

    Attributes:
        kernel: the triton.jit function.
        grid: programs along each axis.
        arguments: all parameters of the kernel by name, constexpr ones included.
        num_warps, num_stages: as Triton understands them.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


def launch(kernel, grid, *, num_warps: int, num_stages: int, **arguments) -> None:
    """Run a kernel on its tensors' device, or note it down inside `record_launches`."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, tuple(grid), arguments, num_warps, num_stages))
    elif min(grid) > 0:
        with _device_of(arguments):
            kernel[tuple(grid)](**arguments, num_warps=num_warps, num_stages=num_stages)


def _device_of(arguments):
    """Return a context that makes the tensors' device the current one: Triton launches on that."""
    tensor = next(value for value in arguments.values() if isinstance(value, torch.Tensor))
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collect the launches made inside instead of running them; their tensors may be on the meta device."""
    global _recorded
    if _recorded is not None:
        raise RuntimeError("record_launches cannot be nested")
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


def triton_obstacle(tensor: torch.Tensor) -> str | None:
    """Return why Triton kernels cannot run on this tensor; None if they can.

    They run on CUDA, and with TRITON_INTERPRET=1 (set before Triton is imported) slowly on the CPU.
    """
    try:
        import triton
    except ImportError:
        return "triton is not installed; pip install 'triton>=3.6'"
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"got {tensor.dtype}, wanted float16, bfloat16 or float32"
    interpreted = triton.knobs.runtime.interpret
    if interpreted and triton.__version__.startswith("3.6.") and not _old_numpy():
        return f"the interpreter of Triton {triton.__version__} needs numpy < 2.4; pip install 'numpy<2.4'"
    if tensor.device.type == "cuda" and not interpreted:
        return None
    if interpreted:
        # The interpreter of Triton 3.9 multiplies the raw bits of bfloat16 operands.
        return "Triton's interpreter cannot multiply bfloat16" if tensor.dtype == torch.bfloat16 else None
    if tensor.device.type == "meta" and _recorded is not None:
        return None
    return f"got a tensor on {tensor.device.type}, wanted cuda (or TRITON_INTERPRET=1, for tests)"


def _old_numpy() -> bool:
    """Return whether int() still takes arrays of one element, as the interpreter of Triton 3.6 needs."""
    import numpy

    return tuple(int(part) for part in numpy.__version__.split(".")[:2]) < (2, 4)
