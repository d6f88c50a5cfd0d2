"""FlashAttention on a CPU: what torch's varlen operator and the flash-attn packages compute, in float32.

The packages' functions have the parameters of the real ones (flash-attn 2.8.3, FlashAttention-3's operators,
flash-attn-4 4.0.0b36), so that a call that would not fit them fails here too.
"""

import importlib.machinery
import inspect
import sys
import types

import torch

from bench.gpu import emulation
from fastrm_kernels.tree_attention import flash_attn, varlen
from fastrm_kernels.tree_attention.flash_attn_versions import find_version

CALLS = {"forward": 0, "backward": 0}


def emulate(monkeypatch, name: str):
    """Make an implementation of `tree_attention` runnable on this CPU.

    Args:
        name: varlen, or flash_attn-2, flash_attn-3, flash_attn-4.

    Returns:
        What has to be kept alive while the emulation is used.
    """
    CALLS.update(forward=0, backward=0)
    monkeypatch.setattr(varlen, "varlen_obstacle", lambda query: None)
    if name == "varlen":
        library = torch.library.Library("aten", "IMPL")
        library.impl("_flash_attention_forward", _aten_forward, "CPU")
        library.impl("_flash_attention_backward", _aten_backward, "CPU")
        return library
    monkeypatch.setattr(flash_attn, "_major", lambda device: 9)
    return install(monkeypatch, name.removeprefix("flash_attn-"))


def install(monkeypatch, generation: str):
    """Put a package with FlashAttention-2, -3 or -4 among the imported modules; see `emulate`."""
    package = types.ModuleType("flash_attn")
    package.__version__ = "2.8.3"
    if generation == "2":
        module = types.ModuleType("flash_attn.flash_attn_interface")
        module._flash_attn_varlen_forward = _flash_attn_varlen_forward
        module._flash_attn_varlen_backward = _flash_attn_varlen_backward
        return _add(monkeypatch, package, module)
    if generation == "3":
        library = torch.library.Library("flash_attn_3", "DEF")
        library.define(f"fwd({FORWARD_3}) -> (Tensor, Tensor, Tensor, Tensor)")
        library.define(f"bwd({BACKWARD_3}) -> (Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor)")
        library.impl("fwd", _fwd_3, "CPU")
        library.impl("bwd", _bwd_3, "CPU")
        _add(monkeypatch, types.ModuleType("flash_attn_interface"))
        return library
    module = types.ModuleType("flash_attn.cute.interface")
    module._flash_attn_fwd, module._flash_attn_bwd = _flash_attn_fwd, _flash_attn_bwd
    return _add(monkeypatch, package, types.ModuleType("flash_attn.cute"), module)


def _add(monkeypatch, *modules):
    for module in modules:
        module.__path__ = []  # a package: nothing of a real one is looked for
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)  # transformers looks for it
        monkeypatch.setitem(sys.modules, module.__name__, module)
    find_version.cache_clear()
    return modules


@torch.autocast("cpu", enabled=False)  # which the real kernels do not know
def _forward(query, key, value, cu_q, cu_k, max_q, max_k, scale, causal):
    """Output (Tq, H, K) and log-sum-exp (H, Tq), by the emulation of torch's own operator."""
    CALLS["forward"] += 1
    return emulation.flash_forward(
        query, key, value, cu_q, cu_k, max_q, max_k, 0.0, causal, False, scale=scale
    )[:2]  # fmt: skip


@torch.autocast("cpu", enabled=False)
def _backward(upstream, query, key, value, output, lse, cu_q, cu_k, max_q, max_k, scale, causal):
    CALLS["backward"] += 1
    assert lse.shape == (query.shape[1], query.shape[0]) and output.shape == query.shape
    return emulation.flash_backward(
        upstream, query, key, value, output, lse, cu_q, cu_k, max_q, max_k, 0.0, causal, None, None, scale=scale
    )  # fmt: skip


# --- in the clothes of each package -------------------------------------------------------------


def _aten_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *,
    scale=None, window_size_left=None, window_size_right=None, **_,
):  # fmt: skip
    causal = is_causal or window_size_right == 0
    output, lse = _forward(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, scale, causal)
    return output, lse, *(torch.zeros(n, dtype=torch.uint64) for n in (2, 1)), query.new_empty(0)


def _aten_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
    rng_state, unused, *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    bounds, causal = (cum_seq_q, cum_seq_k, max_q, max_k), is_causal or window_size_right == 0
    return _backward(grad_out, query, key, value, out, logsumexp, *bounds, scale, causal)


def _flash_attn_varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None,
    leftpad_k=None, seqused_k=None, zero_tensors=False,
):  # fmt: skip
    output, lse = _forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)
    return output, lse, q.new_empty(0), torch.zeros(2, dtype=torch.int64)


def _flash_attn_varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    zero_tensors=False,
):  # fmt: skip
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    found = _backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal
    )
    for gradient, value in zip((dq, dk, dv), found, strict=True):
        gradient.copy_(value)
    return torch.empty_like(softmax_lse)


FORWARD_3 = (
    "Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? v_new=None, Tensor? q_v=None, Tensor? out=None, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, "
    "Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, Tensor? page_table=None, "
    "Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, Tensor? rotary_sin=None, "
    "Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
    "int attention_chunk=0, float softcap=0.0, bool is_rotary_interleaved=False, Tensor? scheduler_metadata=None, "
    "int num_splits=0, bool? pack_gqa=None, int sm_margin=0"
)
BACKWARD_3 = (
    "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None, "
    "Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
    "float softcap=0.0, bool deterministic=False, int sm_margin=0"
)


def _fwd_3(q, k, v, *rest, **named):
    given = _arguments(FORWARD_3, (q, k, v, *rest), named)
    assert given["num_splits"] == 1
    output, lse = _forward(
        q, k, v, given["cu_seqlens_q"], given["cu_seqlens_k"], given["max_seqlen_q"], given["max_seqlen_k"],
        given["softmax_scale"], given["is_causal"],
    )  # fmt: skip
    return output, lse, q.new_empty(0), q.new_empty(0)


def _bwd_3(dout, q, k, v, out, softmax_lse, dq, dk, dv, *rest, **named):
    given = _arguments(BACKWARD_3, (dout, q, k, v, out, softmax_lse, dq, dk, dv, *rest), named)
    found = _backward(
        dout, q, k, v, out, softmax_lse, given["cu_seqlens_q"], given["cu_seqlens_k"], given["max_seqlen_q"],
        given["max_seqlen_k"], given["softmax_scale"], given["is_causal"],
    )  # fmt: skip
    for gradient, value in zip((dq, dk, dv), found, strict=True):
        gradient.copy_(value)
    return dq, dk, dv, torch.empty_like(softmax_lse)


def _arguments(schema, given, named):
    """Arguments by name; the dispatcher leaves out trailing defaults."""
    parts = [part.split(" ", 1)[1].partition("=") for part in schema.split(", ")]
    values = {name: inspect.Parameter.empty if not default else eval(default) for name, _, default in parts}
    return {**values, **dict(zip(values, given, strict=False)), **named}


def _flash_attn_fwd(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
    max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
    window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None,
    intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, return_lse=False, **_,
):  # fmt: skip
    output, lse = _forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)
    return output, lse if return_lse else None, None, None, None


def _flash_attn_bwd(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
    window_size_right=None, *, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
    max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None,
):  # fmt: skip
    bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _backward(dout, q, k, v, out, lse, *bounds, softmax_scale, causal)
