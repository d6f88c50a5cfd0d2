"""Tree attention through PyTorch's scaled_dot_product_attention, on any device and dtype.

SDPA takes rectangular batches, so runs of similar size are padded together into buckets: many small
runs cost a few calls, long runs go alone and waste nothing. Which runs share a bucket depends on
their lengths only, so changing one response's tokens cannot change another's result.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastrm_kernels.tree_attention.gather import take_rows

# One SDPA call costs about as much as this many query-key products of a small head on one CPU core.
_CALL_AREA = 1 << 15
# Padding may add this share to the work of a bucket.
_PADDING_SHARE = 0.2


@dataclass(frozen=True)
class _Bucket:
    """B runs padded to one (q, k) shape. `mask` is None where SDPA needs none."""

    shape: tuple[int, int, int]  # B, q, k
    query_rows: torch.Tensor  # (B * q,)
    key_rows: torch.Tensor  # (B * k,)
    is_causal: bool
    mask: torch.Tensor | None  # (B or 1, 1, q, k) float, 0 or -inf


def tree_attention_eager(query, key, value, layout, *, scale=None, causal=True):
    """Same contract as `tree_attention`."""
    num_queries, heads, width = query.shape
    if num_queries == 0:
        return query + 0 * (key.sum() + value.sum())  # nothing, but of all three, for autograd
    buckets, order = _plan(layout, causal, query.dtype)
    outputs = []
    for bucket in buckets:
        batch, q_len, k_len = bucket.shape
        output = F.scaled_dot_product_attention(
            take_rows(query, bucket.query_rows).view(batch, q_len, heads, width).transpose(1, 2),
            take_rows(key, bucket.key_rows).view(batch, k_len, -1, width).transpose(1, 2),
            take_rows(value, bucket.key_rows).view(batch, k_len, -1, width).transpose(1, 2),
            attn_mask=bucket.mask,
            is_causal=bucket.is_causal,
            scale=scale,
            enable_gqa=heads != key.shape[1],
        )
        outputs.append(output.transpose(1, 2).reshape(batch * q_len, heads, width))
    return take_rows(torch.cat(outputs) if len(outputs) > 1 else outputs[0], order)


def bucket_inputs(layout, causal, dtype):
    """Of each bucket: query rows (B, q), key rows (B, k), which queries are no padding (B, q), and a mask or None.

    The mask is (B or 1, 1, q, k), 0 or -inf, also where SDPA is told `is_causal` instead.
    """
    buckets, order = _plan(layout, causal, dtype)
    total = sum(batch * q_len for batch, q_len, _ in (bucket.shape for bucket in buckets))
    real = torch.ones(total, dtype=torch.bool, device=layout.device)
    if order is not None:
        real = torch.zeros_like(real).index_fill_(0, order, True)
    offset = 0
    for bucket in buckets:
        batch, q_len, k_len = bucket.shape
        mask = bucket.mask
        if bucket.is_causal:
            mask = torch.full((1, 1, q_len, k_len), float("-inf"), dtype=dtype, device=layout.device).triu(1)
        rows, keys = (
            torch.arange(count, device=layout.device) if index is None else index
            for index, count in ((bucket.query_rows, batch * q_len), (bucket.key_rows, batch * k_len))
        )
        stop = offset + batch * q_len
        yield rows.view(batch, q_len), keys.view(batch, k_len), real[offset:stop].view(batch, q_len), mask
        offset = stop


def _plan(layout, causal, dtype):
    """Buckets, and for each query row its row in their concatenated outputs; kept on the layout."""
    kept = layout._plans.get((causal, dtype))
    if kept is None:
        kept = layout._plans[(causal, dtype)] = _make_plan(layout, causal, dtype)
    return kept


def _make_plan(layout, causal, dtype):
    device = layout.cu_seqlens_q.device
    q_starts, k_starts = layout.cu_seqlens_q.tolist(), layout.cu_seqlens_k.tolist()
    keys = layout.key_index
    keys = torch.arange(layout.num_keys, device=device) if keys is None else keys
    buckets, places, offset = [], torch.empty(q_starts[-1], dtype=torch.int64, device=device), 0
    for runs in _group(layout.query_lengths, layout.key_lengths):
        q_lens = torch.tensor([layout.query_lengths[r] for r in runs], device=device)
        k_lens = torch.tensor([layout.key_lengths[r] for r in runs], device=device)
        q_len, k_len = int(q_lens.max()), int(k_lens.max())
        q_pos = torch.arange(q_len, device=device).expand(len(runs), -1)
        k_pos = torch.arange(k_len, device=device).expand(len(runs), -1)
        # Padding repeats the last row of the run: always in range, and masked or never read.
        q_pad, k_pad = q_pos.minimum(q_lens[:, None] - 1), k_pos.minimum(k_lens[:, None] - 1)
        q_start = torch.tensor([q_starts[r] for r in runs], device=device)[:, None]
        k_start = torch.tensor([k_starts[r] for r in runs], device=device)[:, None]
        real = q_pos < q_lens[:, None]
        places[(q_start + q_pos)[real]] = (offset + torch.arange(real.numel(), device=device)).view_as(q_pos)[real]
        uniform = bool((q_lens == q_len).all() and (k_lens == k_len).all())
        buckets.append(
            _Bucket(
                (len(runs), q_len, k_len),
                _rows((q_start + q_pad).reshape(-1), q_starts[-1]),
                _rows(keys[k_start + k_pad].reshape(-1), layout.num_keys),
                is_causal=causal and uniform and q_len == k_len,
                mask=_mask(q_pad, k_pos, q_lens, k_lens, uniform, causal, dtype),
            )
        )
        offset += real.numel()
    return buckets, _rows(places, offset)


def _rows(index, total):
    """None if `index` is simply 0 .. total - 1."""
    same = index.numel() == total and torch.equal(index, torch.arange(total, device=index.device))
    return None if same else index


def _mask(q_pad, k_pos, q_lens, k_lens, uniform, causal, dtype):
    if uniform and (not causal or int(q_lens[0]) == int(k_lens[0])):
        return None
    if uniform:
        q_pad, k_pos, q_lens, k_lens = q_pad[:1], k_pos[:1], q_lens[:1], k_lens[:1]
    last = k_lens[:, None] - 1  # (B, 1), or with causal (B, q): the last key that a query sees
    if causal:
        last = k_lens[:, None] - q_lens[:, None] + q_pad
    hidden = k_pos[:, None, :] > last[:, :, None]  # (B, q or 1, k)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
    return mask.expand(-1, q_pad.shape[1], -1)[:, None]


def _group(query_lengths, key_lengths):
    """Lists of runs to pad together: sorted by size, cut where padding would cost too much."""
    order = sorted(range(len(query_lengths)), key=lambda r: (key_lengths[r], query_lengths[r]))
    groups, area, q_max = [], 0, 0
    for run in order:
        q_len, k_len = query_lengths[run], key_lengths[run]
        if groups:
            padded = (len(groups[-1]) + 1) * max(q_max, q_len) * k_len
            true = area + q_len * k_len
        if not groups or padded - true > _PADDING_SHARE * true + _CALL_AREA:
            groups.append([])
            area = q_max = 0
        groups[-1].append(run)
        area, q_max = area + q_len * k_len, max(q_max, q_len)
    return groups
