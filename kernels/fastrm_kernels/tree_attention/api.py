"""Checks and dispatch of `tree_attention`. An explicit `impl` never falls back to another."""

import torch

from fastrm_kernels.dispatch import Choice, constant, obstacle_to_triton, pick_auto
from fastrm_kernels.tree_attention import varlen
from fastrm_kernels.tree_attention.autograd import tree_attention_triton
from fastrm_kernels.tree_attention.eager import tree_attention_eager
from fastrm_kernels.tree_attention.flash_attn import flash_attn_obstacle, tree_attention_flash_attn

IMPLEMENTATIONS = {
    "triton": tree_attention_triton,
    "eager": tree_attention_eager,
    "varlen": varlen.tree_attention_varlen,
    "flash_attn": tree_attention_flash_attn,
}
HEAD_DIMENSIONS = (16, 32, 64, 80, 96, 128)  # head dimensions of the Triton kernels
# Tiles are placed by 64-bit offsets; within one, of at most 128 rows, offsets have 32 bits.
FARTHEST_ROWS = 2**31 // 128
SHARED_BYTES = 165_888  # 162 KB: the most that a kernel takes (kernels/README.md), at head dimension 128


def tree_attention(query, key, value, layout, *, scale=None, causal=True, impl="auto"):
    """Compute attention of packed query tokens to their paths in a prefix tree.

    Args:
        query: (Tq, H, K), with Tq = layout.num_queries.
        key, value: (T, Hkv, K) with H a multiple of Hkv and T = layout.num_keys.
        layout: a `TreeLayout` on the same device.
        scale: of the scores; default K ** -0.5.
        causal: every token sees its path up to itself. False, for a layout of independent sequences
            only: every token sees its whole sequence.
        impl: auto (see `pick_attention`), triton, eager, varlen (FlashAttention in torch), or flash_attn
            (the flash-attn package).

    Returns:
        (Tq, H, K), like `query`. Bitwise repeatable, forward and backward, with triton and eager; with varlen
        the gradient of the queries is not, nor with flash_attn unless torch.use_deterministic_algorithms is on:
        FlashAttention-2 adds it up with atomics.

    Raises:
        ValueError: for shapes that do not fit the layout, causal=False on a tree, an unknown impl, or
            an impl that cannot run these inputs.
    """
    _check_inputs(query, key, value, layout)
    if not causal and not layout.is_flat:
        raise ValueError("causal=False: got a tree, wanted independent sequences (all parents -1)")
    if impl == "auto":
        impl = pick_attention(query, key, value).name
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: got {impl!r}, wanted auto or one of {', '.join(IMPLEMENTATIONS)}")
    obstacle = triton_attention_obstacle(query, key, value) if impl == "triton" else None
    if obstacle is not None:
        raise ValueError(f"tree_attention with impl='triton': {obstacle}; pass impl='eager', which runs everywhere")
    return IMPLEMENTATIONS[impl](query, key, value, layout, scale=scale, causal=causal)


def pick_attention(query, *others) -> Choice:
    """Return the implementation that `auto` means for inputs (.., heads, K), and the reason in words.

    The measured winner on their device, where it can run them; else torch's varlen FlashAttention on
    CUDA in half precision, and eager elsewhere.
    """
    impl, why = pick_auto("tree_attention", query)
    if impl in ("triton", "flash_attn"):
        obstacle = triton_attention_obstacle(query, *others) if impl == "triton" else flash_attn_obstacle(query)
        if obstacle is None:
            return Choice(impl, why)
        name = "Triton" if impl == "triton" else "flash-attn"
        why = f"{name}, the faster one in bench/results, cannot run tree_attention here: {obstacle}"
    if varlen.varlen_obstacle(query) is None:
        return Choice("varlen", why if impl == "varlen" else f"torch's varlen FlashAttention; {why}")
    return Choice("eager", why)


def triton_attention_obstacle(query, *others) -> str | None:
    """Return why the Triton kernels cannot run these inputs, or None."""
    obstacle = obstacle_to_triton(query)
    if obstacle is not None:
        return obstacle
    if query.shape[-1] not in HEAD_DIMENSIONS:
        return f"got head dimension {query.shape[-1]}, wanted one of {', '.join(map(str, HEAD_DIMENSIONS))}"
    if query.device.type == "cuda" and query.dtype != torch.float32:
        shared_bytes = _shared_bytes(query.device)
        if shared_bytes < SHARED_BYTES:
            return f"got a GPU with {shared_bytes:,} bytes of shared memory a program, wanted {SHARED_BYTES:,}"
    farthest = max(x.stride(0) for x in (query, *others))
    if farthest >= FARTHEST_ROWS:
        return f"got rows {farthest:,} elements apart, wanted less than {FARTHEST_ROWS:,}"
    return None


@constant
def _shared_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _check_inputs(query, key, value, layout):
    if not query.ndim == key.ndim == value.ndim == 3:
        raise ValueError(
            f"got query, key and value of {query.ndim}, {key.ndim} and {value.ndim} dimensions, wanted 3: "
            "(tokens, heads, K), without a batch"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"got query {query.dtype}, key {key.dtype}, value {value.dtype}; wanted one dtype (autocast may have "
            "cast some of them)"
        )
    if not query.device == key.device == value.device == layout.device:
        raise ValueError(
            f"got query on {query.device}, key on {key.device}, value on {value.device}, layout on {layout.device}; "
            "wanted one device (layout.to(device))"
        )
    if query.shape[0] != layout.num_queries or key.shape[0] != layout.num_keys:
        raise ValueError(
            f"got {query.shape[0]} query and {key.shape[0]} key rows, the layout has "
            f"{layout.num_queries} and {layout.num_keys}"
        )
    if key.shape != value.shape or query.shape[1] % key.shape[1] or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"got query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}; wanted "
            "(Tq, H, K), (T, Hkv, K), (T, Hkv, K) with H a multiple of Hkv"
        )
