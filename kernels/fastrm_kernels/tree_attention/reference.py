"""The specification of attention over a prefix tree: one dense masked softmax in plain PyTorch.

    o_i = sum_j softmax_j(scale * q_i . k_j  for j visible to i) v_j

Visible: in the run of query i (`layout.py`), with q queries and k keys, query number n sees the
first k - q + n + 1 keys when causal, and all k keys otherwise. Query head h reads key/value head
h // (H / Hkv). Any floating dtype, float64 included; O(Tq * T) memory, so for tests only.
"""

import torch


def tree_attention_reference(query, key, value, layout, *, scale=None, causal=True):
    """Compute `tree_attention` by one dense masked softmax, under the same contract."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)  # (T, H, K)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale  # (H, Tq, T)
    scores = scores.masked_fill(~visible(layout, causal), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)


def visible(layout, causal=True) -> torch.Tensor:
    """Return the mask (Tq, T) bool: True where a query token sees a key token."""
    device = layout.cu_seqlens_q.device
    index = layout.key_index
    index = torch.arange(layout.num_keys, device=device) if index is None else index
    mask = torch.zeros(sum(layout.query_lengths), layout.num_keys, dtype=torch.bool, device=device)
    q_start = k_start = 0
    for q_len, k_len in zip(layout.query_lengths, layout.key_lengths, strict=True):
        rows = torch.arange(q_start, q_start + q_len, device=device)
        allowed = torch.ones(q_len, k_len, dtype=torch.bool, device=device)
        if causal:
            allowed = allowed.tril(k_len - q_len)
        mask[rows[:, None], index[k_start : k_start + k_len][None, :]] = allowed
        q_start, k_start = q_start + q_len, k_start + k_len
    return mask
