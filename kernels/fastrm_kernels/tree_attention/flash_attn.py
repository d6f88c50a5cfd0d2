"""Tree attention by the flash-attn package, CUDA only: the runs of `varlen.py` with other kernels.

The two functions of the package become one operator of torch with its gradient. A compiled layer then holds attention
as one node whichever version is installed, and selective checkpointing knows what it must not run twice.
"""

import functools

import torch

from fastrm_kernels.tree_attention import varlen
from fastrm_kernels.tree_attention.flash_attn_versions import FlashAttention, find_version
from fastrm_kernels.tree_attention.gather import take_rows


def tree_attention_flash_attn(query, key, value, layout, *, scale=None, causal=True):
    """Compute `tree_attention` with the flash-attn package; float16 or bfloat16 on CUDA.

    Bitwise repeatable under torch.use_deterministic_algorithms only: else the gradient of the queries is summed by
    atomic additions.

    Raises:
        ValueError: for inputs that the package cannot take (see `flash_attn_obstacle`), or that overflow 32-bit
            offsets of FlashAttention-2's backward pass.
    """
    obstacle = flash_attn_obstacle(query)
    if obstacle is not None:
        raise ValueError(f"tree_attention with impl='flash_attn': {obstacle}")
    num_queries, heads, width = query.shape
    if num_queries == 0:
        return query + 0 * (key.sum() + value.sum())  # zero, but autograd sees all three inputs
    varlen.check_offsets(layout, heads, width)
    key, value = (take_rows(rows, layout.key_index) for rows in (key, value))
    scale = width**-0.5 if scale is None else float(scale)
    return flash_attn_forward(*varlen.varlen_arguments(query, key, value, layout), scale, causal)[0]


def flash_attn_obstacle(query) -> str | None:
    """Return why the flash-attn package cannot run queries (.., H, K) like these, or None."""
    obstacle = varlen.varlen_obstacle(query)
    if obstacle is not None:
        return obstacle
    version = find_version(_major(query.device))
    if isinstance(version, str):
        return version
    width = query.shape[-1]
    if width % 8 or width > version.widest:
        return f"got head dimension {width}, wanted a multiple of 8 up to {version.widest} ({version.name})"
    return None


def flash_attn_name(device: torch.device) -> str:
    """Return the name of the version that runs on a GPU for which `flash_attn_obstacle` finds none."""
    return _version(device).name


def _version(device: torch.device) -> FlashAttention:
    found = find_version(_major(device))
    if isinstance(found, str):
        raise ValueError(found)
    return found


@functools.cache
def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


@torch.library.custom_op("fastrm::flash_attn", mutates_args=())
def flash_attn_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output (Tq, H, K) in query's dtype and each row's natural log-sum-exp, (H, Tq) float32."""
    output, lse = _version(query.device).forward(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, causal
    )
    return output.contiguous(), lse.contiguous()


@flash_attn_forward.register_fake
def _(query, key, value, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, causal):
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return output, query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)


@torch.library.custom_op("fastrm::flash_attn_backward", mutates_args=())
def flash_attn_backward(
    upstream: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, in their dtypes."""
    gradients = _version(query.device).backward(
        upstream.contiguous(), query, key, value, output, lse, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return tuple(gradient.contiguous() for gradient in gradients)


@flash_attn_backward.register_fake
def _(upstream, query, key, value, output, lse, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, causal):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))


def _setup(ctx, inputs, output):
    *tensors, max_q, max_k, scale, causal = inputs
    ctx.numbers = (max_q, max_k, scale, causal)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, upstream, _):
    if upstream is None:
        return (None,) * 9
    query, key, value, cu_seqlens_q, cu_seqlens_k, output, lse = ctx.saved_tensors
    gradients = flash_attn_backward(upstream, query, key, value, output, lse, cu_seqlens_q, cu_seqlens_k, *ctx.numbers)
    return (*gradients, *(None,) * 6)


flash_attn_forward.register_autograd(_backward, setup_context=_setup)
