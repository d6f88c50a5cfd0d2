"""The varlen functions of the flash-attn packages (FlashAttention-2, -3 and -4) behind one signature.

Each package has a public function with autograd inside, made of one function for the forward and one for the backward
pass. These two are used here, as in torch's own adapters for FlashAttention-3 and -4: an operator of torch
(flash_attn.py) needs them separately. All of them align the causal mask at the bottom right.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

NOT_INSTALLED = (
    'the flash-attn package is not installed for this GPU; pip install --no-build-isolation "flash-attn>=2.8"'
)
OLDEST = (2, 8)  # flash-attn 2.8: its functions have the parameters that are passed here


@dataclass(frozen=True)
class FlashAttention:
    """The functions of one flash-attn package behind one signature.

    Attributes:
        name: for the user.
        forward: (query, key, value, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, causal) -> output (Tq, H, K) and
            the natural log-sum-exp of each row, (H, Tq) float32.
        backward: (upstream, query, key, value, output, lse, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, causal,
            deterministic) -> gradients of query, key and value.
        widest: the largest head dimension.
    """

    name: str
    forward: Callable
    backward: Callable
    widest: int = 256


@functools.cache
def find_version(major: int) -> FlashAttention | str:
    """Return the functions for GPUs of compute capability `major`.x, or in words why there are none.

    FlashAttention-3 is taken before -4 and -4 before -2, where several are installed. One that is installed and
    broken is reported, not passed over.
    """
    for module_name, majors, adapt in _VERSIONS:
        if major not in majors:
            continue
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
                continue
            return f"{module_name} is installed but cannot be imported ({error})"
        except (ImportError, OSError) as error:
            return f"{module_name} is installed but cannot be imported ({error})"
        return adapt(module, major)
    return NOT_INSTALLED


def _flash_attention_2(module: ModuleType, major: int) -> FlashAttention | str:
    version = importlib.import_module("flash_attn").__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"got flash-attn {version}, wanted {'.'.join(map(str, OLDEST))} or newer"

    def forward(query, key, value, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, causal):
        return module._flash_attn_varlen_forward(
            query, key, value, cu_seqlens_q, cu_seqlens_k, max_q, max_k,
            dropout_p=0.0, softmax_scale=scale, causal=causal,
        )[:2]  # fmt: skip

    def backward(
        upstream, query, key, value, output, lse, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, causal, deterministic
    ):
        gradients = tuple(torch.empty_like(x) for x in (query, key, value))
        module._flash_attn_varlen_backward(
            upstream, query, key, value, output, lse, *gradients, cu_seqlens_q, cu_seqlens_k, max_q, max_k,
            dropout_p=0.0, softmax_scale=scale, causal=causal, window_size_left=-1, window_size_right=-1,
            softcap=0.0, alibi_slopes=None, deterministic=deterministic,
        )  # fmt: skip
        return gradients

    return FlashAttention(f"FlashAttention-2 of flash-attn {version}", forward, backward)


def _flash_attention_3(module: ModuleType, major: int) -> FlashAttention:
    operators = torch.ops.flash_attn_3  # importing the module has registered them

    def forward(query, key, value, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, causal):
        # One split: the number of splits that it would choose changes the order of sums from pack to pack.
        return operators.fwd(
            query, key, value, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_q,
            max_seqlen_k=max_k, softmax_scale=scale, is_causal=causal, num_splits=1,
        )[:2]  # fmt: skip

    def backward(
        upstream, query, key, value, output, lse, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, causal, deterministic
    ):
        gradients = tuple(torch.empty_like(x) for x in (query, key, value))
        operators.bwd(
            upstream, query, key, value, output, lse, *gradients, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_q, max_seqlen_k=max_k, softmax_scale=scale, is_causal=causal, deterministic=deterministic,
        )  # fmt: skip
        return gradients

    return FlashAttention("FlashAttention-3", forward, backward)


def _flash_attention_4(module: ModuleType, major: int) -> FlashAttention:
    def forward(query, key, value, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, causal):
        return module._flash_attn_fwd(
            query, key, value, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_q,
            max_seqlen_k=max_k, softmax_scale=scale, causal=causal, return_lse=True,
        )[:2]  # fmt: skip

    def backward(
        upstream, query, key, value, output, lse, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, causal, deterministic
    ):
        return module._flash_attn_bwd(
            query, key, value, output, upstream, lse, softmax_scale=scale, causal=causal, cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_q, max_seqlen_k=max_k, deterministic=deterministic,
        )[:3]  # fmt: skip

    return FlashAttention("FlashAttention-4 of flash-attn-4", forward, backward, widest=256 if major == 9 else 128)


# Module, the GPUs that it has kernels for (by the first number of their compute capability), adapter.
_VERSIONS = (
    ("flash_attn_interface", (9,), _flash_attention_3),
    ("flash_attn.cute.interface", (9, 10, 11), _flash_attention_4),
    ("flash_attn.flash_attn_interface", (8, 9, 10, 12), _flash_attention_2),
)
