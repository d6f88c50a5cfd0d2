"""The loss of the tokens that critics and judges learn to write, without logits of all tokens in memory.

With hidden state h_n before token t_n, LM head W (V, D) and weight w_n,

    loss = sum_n w_n (log sum_v exp(W h_n)_v - (W h_n)_{t_n})

Logits are computed in chunks of rows, and the gradients of each chunk in the same pass, as in Liger's fused linear
cross entropy (Hsu et al., arXiv 2410.10989): the weights are known, and nothing of size (N, V) is kept for the backward
pass.
"""

import torch
from torch import nn

from fastrm.data.packing import Pack

# The most logits of a chunk: 256 MiB in float32.
CHUNK_LOGITS = 2**26


def turn_losses(
    states: torch.Tensor, norm: nn.Module, head: torch.Tensor, pack: Pack, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute (sum of the weighted losses of a pack's turns, mean log probability (R,) of each turn's tokens), float32.

    The sum alone is differentiable, of `eager` once: its backward pass does not keep what it needs. A turn without
    tokens in `pack.turn_rows` has mean 0.

    Args:
        states: (T, D) after the last layer, before the final norm.
        norm: the model's final RMSNorm.
        head: (V, D) the weight of its LM head.
        pack: on the device of the states, with what its model writes.
        impl: eager: PyTorch's operations; triton: Liger's kernel.
    """
    rows = norm(states.index_select(0, pack.turn_rows))
    device = states.device.type
    rows = rows.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype)
    if not torch.is_grad_enabled():  # autograd functions see that parameters want gradients all the same
        rows, head = rows.detach(), head.detach()
    with torch.autocast(device, enabled=False):
        compute = _liger if impl == "triton" else _LinearCrossEntropy.apply
        total, losses = compute(rows, head, pack.turn_targets, pack.turn_weights)
    zeros = losses.new_zeros(len(pack.response_lengths))
    counts = zeros.index_add(0, pack.turn_owners, torch.ones_like(losses))
    return total, -zeros.index_add(0, pack.turn_owners, losses) / counts.clamp(min=1.0)


class _LinearCrossEntropy(torch.autograd.Function):
    """The operation (rows (N, D), head (V, D), targets (N,), weights (N,)) -> (sum, losses (N,) without gradient)."""

    @staticmethod
    def forward(ctx, rows, head, targets, weights):
        needs_rows, needs_head, *_ = ctx.needs_input_grad
        grad_rows = torch.zeros_like(rows) if needs_rows else None
        # Summed over the chunks in float32: in bfloat16 the gradient would depend on how rows are cut into chunks.
        grad_head = torch.zeros_like(head, dtype=torch.float32) if needs_head else None
        losses, matrix = torch.zeros_like(weights), head.to(rows.dtype)
        size = max(1, CHUNK_LOGITS // head.shape[0])
        for start in range(0, len(rows), size):
            chunk = slice(start, start + size)
            logits = (rows[chunk] @ matrix.T).float()  # (n, V)
            total = torch.logsumexp(logits, 1, keepdim=True)
            wanted = targets[chunk, None]
            losses[chunk] = (total - logits.gather(1, wanted))[:, 0]
            if not (needs_rows or needs_head):
                continue
            logits.sub_(total).exp_()
            logits.scatter_add_(1, wanted, -torch.ones_like(total))
            slope = logits.mul_(weights[chunk, None]).to(rows.dtype)
            if needs_rows:
                grad_rows[chunk] = slope @ matrix
            if needs_head:
                grad_head += slope.T @ rows[chunk]
        # Not among the saved tensors: these may be read again, and `backward` writes over the gradients.
        ctx.gradients = grad_rows, grad_head
        ctx.mark_non_differentiable(losses)
        return (weights * losses).sum(), losses

    @staticmethod
    def backward(ctx, grad, _):
        if ctx.gradients is None:
            raise RuntimeError("turn_losses: a second backward pass; the first one has given its gradients away")
        gradients, ctx.gradients = ctx.gradients, None
        # In place: a second (V, D) in float32 is two gigabytes of a vocabulary of 152,000.
        return *(None if one is None else one.mul_(grad.to(one.dtype)) for one in gradients), None, None


def _liger(rows, head, targets, weights):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    if not len(rows):  # Liger divides by the number of rows
        return _LinearCrossEntropy.apply(rows, head, targets, weights)
    losses = LigerFusedLinearCrossEntropyLoss(reduction="none", accum_dtype=torch.float32)
    losses = losses(head.to(rows.dtype), rows, targets)
    return (weights * losses).sum(), losses.detach()
