"""CPU stand-ins for FlashAttention's operators and fastrm's Triton attention: dense, slow, and exact.

With them the GPU's paths run here under torch.compile, in bfloat16, with the operators' own conditions checked. For
rehearsals and tests: `register` puts them in the place of the operators, for the rest of a process.
"""

import math
from collections.abc import Iterator

import torch

from fastrm_kernels.tree_attention.autograd import tree_attention_backward, tree_attention_forward

LN2 = math.log(2.0)  # the Triton kernels' log-sum-exp is in base 2


def attend(query, key, value, scale: float, mask: torch.Tensor):
    """Compute one softmax under a mask (Tq, Tk): the output (Tq, H, K) float32 and log-sum-exp (H, Tq)."""
    probabilities, _, value, lse = _softmax(query, key, value, scale, mask)
    return torch.einsum("hqk,khd->qhd", probabilities, value), lse


def attend_backward(upstream, query, key, value, output, scale: float, mask: torch.Tensor):
    """Return the gradients of query, key and value, float32."""
    probabilities, all_keys, all_values, _ = _softmax(query, key, value, scale, mask)
    upstream, shared = upstream.float(), key.shape[1]
    delta = (upstream * output.float()).sum(-1).T[..., None]
    scores = probabilities * (torch.einsum("qhd,khd->hqk", upstream, all_values) - delta) * scale
    query_grad = torch.einsum("hqk,khd->qhd", scores, all_keys)
    key_grad = torch.einsum("hqk,qhd->khd", scores, query.float())
    value_grad = torch.einsum("hqk,qhd->khd", probabilities, upstream)
    return query_grad, *(x.unflatten(1, (shared, -1)).sum(2) for x in (key_grad, value_grad))


def _softmax(query, key, value, scale, mask):
    copies = query.shape[1] // key.shape[1]
    key, value = (x.float().repeat_interleave(copies, 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.float(), key) * scale
    scores = scores.masked_fill(~mask, -math.inf)
    lse = torch.logsumexp(scores, -1)
    return torch.exp(scores - lse[..., None]).nan_to_num(0), key, value, lse


# FlashAttention: sequences side by side, causal ones aligned at the bottom right


def _sequences(cu_q, cu_k, causal: bool) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    bounds = zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), cu_k[:-1].tolist(), cu_k[1:].tolist(), strict=True)
    for a, b, c, d in bounds:
        last = torch.arange(b - a)[:, None] + (d - c) - (b - a) if causal else torch.full((b - a, 1), d - c)
        yield slice(a, b), slice(c, d), torch.arange(d - c)[None] <= last


def flash_forward(query, key, value, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale=None,
                  window_size_left=None, window_size_right=None, **_):  # fmt: skip
    """Compute aten::_flash_attention_forward."""
    if query.dtype not in (torch.bfloat16, torch.float16) or cu_q.dtype != torch.int32 or query.shape[-1] % 8:
        raise RuntimeError(f"FlashAttention takes no {query.dtype}, {cu_q.dtype}, head dimension {query.shape[-1]}")
    if not all(x.is_contiguous() for x in (query, key, value)):
        raise RuntimeError("FlashAttention was handed rows that are not contiguous")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    output, lse = torch.empty_like(query), torch.empty(query.shape[1], query.shape[0])
    for rows, keys, mask in _sequences(cu_q, cu_k, causal or window_size_right == 0):
        assert mask.shape[0] <= max_q and mask.shape[1] <= max_k
        found, lse[:, rows] = attend(query[rows], key[keys], value[keys], scale, mask)
        output[rows] = found.to(output.dtype)
    seed = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
    return output, lse, *seed, torch.empty(0, dtype=query.dtype)


def flash_backward(upstream, query, key, value, output, lse, cu_q, cu_k, max_q, max_k, dropout, causal, seed, offset,
                   *, scale=None, window_size_left=None, window_size_right=None, **_):  # fmt: skip
    """Compute aten::_flash_attention_backward."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    grads = [torch.zeros_like(x, dtype=torch.float32) for x in (query, key, value)]
    for rows, keys, mask in _sequences(cu_q, cu_k, causal or window_size_right == 0):
        found = attend_backward(upstream[rows], query[rows], key[keys], value[keys], output[rows], scale, mask)
        for grad, part, value_of in zip(grads, (rows, keys, keys), found, strict=True):
            grad[part] += value_of
    return tuple(grad.to(x.dtype) for grad, x in zip(grads, (query, key, value), strict=True))


def register_flash() -> torch.library.Library:
    """Register FlashAttention for the CPU, as long as the returned library lives."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", flash_forward, "CPU")
    library.impl("_flash_attention_backward", flash_backward, "CPU")
    return library


# The Triton kernels: query row i sees the keys whose range [low, high) holds its rank


def _visible(lists: list[torch.Tensor]) -> torch.Tensor:
    rank, bounds = lists[:2]
    low, high = bounds.unbind(1)
    return (low[None] <= rank[:, None]) & (rank[:, None] < high[None])


def triton_forward(query, key, value, lists, single_rows, num_parts, scale):
    """Compute fastrm::tree_attention."""
    output, lse = attend(query, key, value, scale, _visible(lists))
    return output.to(query.dtype).contiguous(), (lse / LN2).contiguous()


def triton_backward(query, key, value, output, lse, upstream, lists, single_rows, num_parts, scale, need_key_value):
    """Compute fastrm::tree_attention_backward."""
    found = attend_backward(upstream, query, key, value, output, scale, _visible(lists))
    grads = tuple(g.to(x.dtype).contiguous() for g, x in zip(found, (query, key, value), strict=True))
    return grads if need_key_value else (grads[0], query.new_empty(0), query.new_empty(0))


def register() -> torch.library.Library:
    """Register all stand-ins for the CPU, as long as the returned library lives."""
    tree_attention_forward.register_kernel("cpu", triton_forward)
    tree_attention_backward.register_kernel("cpu", triton_backward)
    return register_flash()
