"""The use of torch.compile for layers, with a count of its graphs: silent recompilation makes every step slow."""

import itertools
import types
from collections.abc import Callable

import torch
from torch._functorch import config as functorch_config


class CompiledGraphs:
    """A torch.compile backend that counts the graphs it is handed and passes them on.

    A graph for training is split into a forward and a backward one by the backend behind; it counts once.

    Attributes:
        count: graphs made so far. Layers share one, whatever the number of layers and of tokens; training
            and evaluation each have their own. Numbers that change with the pack travel as sizes
            (fastrm_kernels/tree_attention/traced.py), so that they cost no further graph.
        recompute: let backward passes compute all but matrix products and attention again (selective
            activation checkpointing); else the compiler keeps what it finds faster to keep.
    """

    def __init__(self, backend: str | Callable):
        self._backend = backend
        self.count = 0
        self.recompute = False

    def __call__(self, graph, example_inputs):
        """Compile one graph (the interface of torch.compile's backends)."""
        from torch._dynamo import lookup_backend

        self.count += 1
        backend = lookup_backend(self._backend) if isinstance(self._backend, str) else self._backend
        # aggressive_recomputation keeps only aten's products and SDPA; attention here is a custom operator.
        options = {"aggressive_recomputation": self.recompute, "is_non_builtin_to_include": self.recompute}
        with functorch_config.patch(options):
            return backend(graph, example_inputs)


_numbers = itertools.count()


def own_copy(function: Callable) -> Callable:
    """Return the same function with a code object and a code name of its own.

    torch.compile counts graphs by the code object, and refuses more than a few. It remembers by file, line and name
    which sizes have changed, and makes them inputs of the next graph. Two networks of one process would use up each
    other's graphs, and the second would be compiled for the sizes of both.
    """
    code = function.__code__
    code = code.replace(co_name=f"{code.co_name}_{next(_numbers)}")
    return types.FunctionType(code, function.__globals__, function.__name__)


def mark_dynamic(*inputs) -> None:
    """Tell torch.compile that the rows of these tensors and tuples change from pack to pack; None is skipped."""
    for value in inputs:
        if isinstance(value, torch.Tensor):
            if value.ndim and value.shape[0] > 1:  # a single row has a graph of its own in any case
                torch._dynamo.maybe_mark_dynamic(value, 0)
        elif isinstance(value, tuple | list):
            mark_dynamic(*value)
