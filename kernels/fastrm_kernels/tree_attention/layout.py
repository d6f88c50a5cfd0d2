"""Which keys each packed query token may see, as integer tensors built once per pack.

A pack is a row of segments; a segment's parent stands somewhere before it. Its tokens attend to the
tokens of all its ancestors, in order, and causally to their own segment. A segment that stands right
after its parent continues the parent's query run, so a chain of first children is ONE run whose
keys are themselves; only the other children need the ancestors' keys again:

    row:   [ P P P | C C C | R R ]        C and R are children of P
    runs:  queries [P C] with keys [P C],  queries [R] with keys [P R]

Within a run the mask is causal and aligned at the bottom right: query i of q sees the first
k - q + i + 1 keys.
"""

from bisect import bisect_right
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class TreeLayout:
    """Query runs of one packed row and the keys of each run; all index tensors on one device.

    Attributes:
        num_keys: T, the rows of key and value.
        query_lengths, key_lengths: tokens of each of the B runs, as Python integers.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32 cumulative lengths.
        key_index: (sum of key_lengths,) int64 rows of key and value, run by run; None when that
            is simply 0 .. T - 1, so that nothing has to be gathered.
    """

    num_keys: int
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    key_index: torch.Tensor | None
    _segments: tuple[tuple[int, tuple[tuple[int, int], ...]], ...] = field(repr=False, default=())
    _plans: dict = field(repr=False, compare=False, default_factory=dict)

    @staticmethod
    def build(lengths, parents, device=None) -> "TreeLayout":
        """Layout of a row of segments.

        Args:
            lengths: tokens of each segment, in row order, each >= 0.
            parents: index of each segment's parent, or -1; always smaller than the segment's own.
            device: of the index tensors.

        Raises:
            ValueError: if a parent does not stand before its child, or a length is negative.
        """
        lengths, parents = [int(n) for n in lengths], [int(p) for p in parents]
        if len(lengths) != len(parents):
            raise ValueError(f"got {len(lengths)} lengths and {len(parents)} parents, wanted one of each a segment")
        starts, end = [], 0
        for segment, (length, parent) in enumerate(zip(lengths, parents, strict=True)):
            if length < 0 or not -1 <= parent < segment:
                raise ValueError(
                    f"segment {segment}: got length {length} and parent {parent}, "
                    f"wanted a length >= 0 and a parent in -1..{segment - 1}"
                )
            starts.append(end)
            end += length
        paths = []  # of each segment: the (start, stop) spans of its ancestors and itself, joined
        queries, keys = [], []  # of each run: (start, stop), and its key spans
        tail = -1  # last segment of the run that is open
        for segment, (start, length, parent) in enumerate(zip(starts, lengths, parents, strict=True)):
            above = paths[parent] if parent >= 0 else ()
            paths.append(_join(above, (start, start + length)))
            if parent >= 0 and parent == tail:
                queries[-1] = (queries[-1][0], start + length)
                keys[-1] = paths[-1]
            elif length:
                queries.append((start, start + length))
                keys.append(paths[-1])
            else:
                continue
            tail = segment
        segments = tuple((a, path) for a, n, path in zip(starts, lengths, paths, strict=True) if n)
        return _from_runs(end, [b - a for a, b in queries], keys, segments, device)

    @staticmethod
    def from_lengths(lengths, device=None) -> "TreeLayout":
        """Independent sequences, one after another (plain varlen)."""
        return TreeLayout.build(lengths, [-1] * len(lengths), device)

    def at_rows(self, rows: torch.Tensor) -> "TreeLayout":
        """Layout for queries at `rows` (R,) only, one run each, against the same keys.

        A row sees what it sees in the full layout: its path up to and including itself.
        """
        starts = [start for start, _ in self._segments]
        keys = []
        for row in rows.tolist():
            path = self._segments[bisect_right(starts, row) - 1][1]
            keys.append((*path[:-1], (path[-1][0], row + 1)))
        return _from_runs(self.num_keys, [1] * len(keys), keys, (), rows.device)

    def to(self, device) -> "TreeLayout":
        """The same layout with its index tensors on `device`."""
        if self.cu_seqlens_q.device == torch.device(device):
            return self
        index = None if self.key_index is None else self.key_index.to(device)
        return TreeLayout(
            self.num_keys, self.query_lengths, self.key_lengths,
            self.cu_seqlens_q.to(device), self.cu_seqlens_k.to(device), index, self._segments,
        )  # fmt: skip


def _join(spans, span):
    """Append a (start, stop) span, merging it with the last one where they touch."""
    if span[0] == span[1]:
        return spans
    if spans and spans[-1][1] == span[0]:
        return (*spans[:-1], (spans[-1][0], span[1]))
    return (*spans, span)


def _from_runs(num_keys, query_lengths, key_spans, segments, device) -> TreeLayout:
    key_lengths = [sum(b - a for a, b in spans) for spans in key_spans]
    flat = [span for spans in key_spans for span in spans]
    identity = [0] + [b for _, b in flat] == [a for a, _ in flat] + [num_keys]
    index = None
    if not identity:
        ranges = [torch.arange(a, b, device=device) for a, b in flat]
        index = torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64, device=device)
    return TreeLayout(
        num_keys, tuple(query_lengths), tuple(key_lengths),
        _cumulative(query_lengths, device), _cumulative(key_lengths, device), index, segments,
    )  # fmt: skip


def _cumulative(lengths, device):
    total = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
    return total.to(device=device, dtype=torch.int32)
