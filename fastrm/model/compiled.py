"""torch.compile for layers, with a count of what it made: recompilation in silence is slow for ever."""

from collections.abc import Callable

import torch


class CompiledGraphs:
    """A torch.compile backend that counts the graphs it is handed and passes them on.

    A graph for training is split into a forward and a backward one by the backend behind; it counts once.

    Attributes:
        count: graphs made so far. Layers share one, whatever the number of layers and of tokens; training
            and evaluation each have their own, and so has a pack with a different kind of attention plan.
    """

    def __init__(self, backend: str | Callable):
        self._backend = backend
        self.count = 0

    def __call__(self, graph, example_inputs):
        """Compile one graph (the interface of torch.compile's backends)."""
        from torch._dynamo import lookup_backend

        self.count += 1
        backend = lookup_backend(self._backend) if isinstance(self._backend, str) else self._backend
        return backend(graph, example_inputs)


def mark_dynamic(*inputs) -> None:
    """Tell torch.compile that the rows of these tensors change from pack to pack; plans and None may be among them."""
    for value in inputs:
        if isinstance(value, torch.Tensor):
            if value.ndim and value.shape[0] > 1:  # a single row is compiled for by itself in any case
                torch._dynamo.maybe_mark_dynamic(value, 0)
        elif isinstance(value, tuple | list):
            mark_dynamic(*value)
