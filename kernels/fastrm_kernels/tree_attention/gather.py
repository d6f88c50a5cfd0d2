"""Row gathers whose gradients are summed in one order, in eager mode and inside torch.compile.

The backward passes of PyTorch's own gathers become atomic additions when inductor compiles them for a GPU, in
an order that changes from run to run. An operator is opaque to the compiler.
"""

import torch
import torch.nn.functional as F


def take_rows(rows: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """Return rows[index] over the first axis of (T, ...); None means all rows as they are.

    The gradient of a row is the sum over its places in `index`, in their order: bitwise repeatable.

    Args:
        index: int64, on the device of the rows.
    """
    return rows if index is None else gather_rows(rows, index)


@torch.library.custom_op("fastrm::gather_rows", mutates_args=())
def gather_rows(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return rows[index]: (T, ...) -> (M, ...)."""
    return rows.index_select(0, index)


@gather_rows.register_fake
def _(rows, index):
    return torch.empty((index.shape[0], *rows.shape[1:]), dtype=rows.dtype, device=rows.device)


@torch.library.custom_op("fastrm::sum_rows", mutates_args=())
def sum_rows(values: torch.Tensor, index: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Sum (M, ...) to (num_rows, ...): row r is the sum of the values whose index is r, in their order."""
    order = index.argsort(stable=True)
    bounds = torch.searchsorted(index[order], torch.arange(num_rows + 1, device=index.device))
    # Each bag is summed by itself, from its first value to its last.
    sums = F.embedding_bag(order, values.reshape(len(values), -1), bounds, mode="sum", include_last_offset=True)
    return sums.view(num_rows, *values.shape[1:])


@sum_rows.register_fake
def _(values, index, num_rows):
    return torch.empty((num_rows, *values.shape[1:]), dtype=values.dtype, device=values.device)


def _setup(ctx, inputs, output):
    rows, index = inputs
    ctx.num_rows = rows.shape[0]
    ctx.save_for_backward(index)


def _backward(ctx, upstream):
    return sum_rows(upstream, *ctx.saved_tensors, ctx.num_rows), None


gather_rows.register_autograd(_backward, setup_context=_setup)
