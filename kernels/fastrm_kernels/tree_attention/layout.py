"""The keys that each packed query token may see, as integer tensors built once per pack.

A pack is a row of segments; a segment's parent stands somewhere before it. Its tokens attend to the
tokens of all its ancestors, in order, and causally to their own segment. A segment that stands right
after its parent continues the parent's query run, so a chain of first children is ONE run whose
keys are themselves; only the other children need the ancestors' keys again:

    row:   [ P P P | C C C | R R ]        C and R are children of P
    runs:  queries [P C] with keys [P C],  queries [R] with keys [P R]

Within a run the mask is causal and aligned at the bottom right: query i of q sees the first
k - q + i + 1 keys. Runs serve the eager and varlen implementations; the Triton kernels read shared
keys in place and follow the work lists of `tiles.py` instead.
"""

from bisect import bisect_right
from dataclasses import dataclass, field, replace

import torch

Spans = tuple[tuple[int, int], ...]  # (start, stop) rows, in order, none empty, none touching
INT32_ROWS = 2**31 - 1  # the largest row number, and number of keys of all runs, that an int32 tensor holds


@dataclass(frozen=True, eq=False)
class TreeLayout:
    """Query runs of one packed row and the keys of each run; all index tensors on one device.

    Attributes:
        lengths, parents: of the segments, as given.
        paths: of each segment, the row spans of its ancestors and itself.
        query_rows: rows of the queries; None when every row is one.
        num_queries, num_keys: Tq and T, the rows of query and of key and value.
        query_lengths, key_lengths: tokens of each of the B runs, as Python integers.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32 cumulative lengths.
        key_index: (sum of key_lengths,) int64 rows of key and value, run by run; None when that
            is simply 0 .. T - 1, so that nothing has to be gathered.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    paths: tuple[Spans, ...]
    query_rows: tuple[int, ...] | None
    num_queries: int
    num_keys: int
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    key_index: torch.Tensor | None
    _made: dict = field(repr=False, compare=False, default_factory=dict)

    @staticmethod
    def build(lengths, parents, device=None) -> "TreeLayout":
        """Build the layout of a row of segments.

        Args:
            lengths: tokens of each segment, in row order, each >= 0.
            parents: index of each segment's parent, or -1; always smaller than the segment's own.
            device: of the index tensors.

        Raises:
            ValueError: if a parent does not stand before its child, a length is negative, or the runs have more
                than INT32_ROWS keys together.
        """
        lengths, parents = tuple(int(n) for n in lengths), tuple(int(p) for p in parents)
        if len(lengths) != len(parents):
            raise ValueError(f"got {len(lengths)} lengths and {len(parents)} parents, wanted one of each a segment")
        paths: list[Spans] = []
        queries, keys = [], []  # of each run: its tokens, and its key spans
        tail = -1  # last segment of the run that is open
        start = 0
        for segment, (length, parent) in enumerate(zip(lengths, parents, strict=True)):
            if length < 0 or not -1 <= parent < segment:
                raise ValueError(
                    f"segment {segment}: got length {length} and parent {parent}, "
                    f"wanted a length >= 0 and a parent in -1..{segment - 1}"
                )
            above = paths[parent] if parent >= 0 else ()
            paths.append(join_spans(above, (start, start + length)))
            start += length
            if parent >= 0 and parent == tail:
                queries[-1] += length
                keys[-1] = paths[-1]
            elif length:
                queries.append(length)
                keys.append(paths[-1])
            else:
                continue
            tail = segment
        return _from_runs(lengths, parents, tuple(paths), None, queries, keys, device)

    @staticmethod
    def from_lengths(lengths, device=None) -> "TreeLayout":
        """Build the layout of independent sequences, one after another (plain varlen)."""
        return TreeLayout.build(lengths, [-1] * len(lengths), device)

    def at_rows(self, rows) -> "TreeLayout":
        """Return the layout for queries at `rows` only, one run each, against the same keys.

        A row sees what it sees in the full layout: its path up to and including itself.

        Args:
            rows: R integers; a tensor on a GPU is waited for, so hand over a list or a CPU tensor.

        Raises:
            ValueError: for a row outside 0 .. T - 1.
        """
        rows = tuple(rows.tolist() if isinstance(rows, torch.Tensor) else rows)
        if rows and not 0 <= min(rows) <= max(rows) < self.num_keys:
            raise ValueError(f"rows: got {min(rows)} to {max(rows)}, wanted 0 to {self.num_keys - 1}")
        owners = [segment for segment, length in enumerate(self.lengths) if length]
        starts = self.starts
        firsts = [starts[segment] for segment in owners]
        keys = []
        for row in rows:
            *above, own = self.paths[owners[bisect_right(firsts, row) - 1]]
            keys.append((*above, (own[0], row + 1)))
        device = self.cu_seqlens_q.device
        return _from_runs(self.lengths, self.parents, self.paths, rows, [1] * len(keys), keys, device)

    @property
    def starts(self) -> list[int]:
        """The first row of each segment."""
        starts, end = [], 0
        for length in self.lengths:
            starts.append(end)
            end += length
        return starts

    @property
    def is_flat(self) -> bool:
        """True if the segments are independent sequences."""
        return all(parent < 0 for parent in self.parents)

    @property
    def device(self) -> torch.device:
        return self.cu_seqlens_q.device

    def to(self, device) -> "TreeLayout":
        """Return the same layout with its index tensors, work lists included, on `device`."""
        # "cuda" and "cuda:0" are unequal: ask where a tensor would land.
        if self.device == torch.empty(0, device=device).device:
            return self
        return self._with(lambda tensors: tensors.to(device, non_blocking=True), lambda made: made.to(device))

    def pin_memory(self) -> "TreeLayout":
        """Return the same layout with its index tensors, work lists included, in page-locked memory."""
        return self._with(torch.Tensor.pin_memory, lambda made: made.pin_memory())

    def _with(self, change_tensor, change_made) -> "TreeLayout":
        changed = {name: change_tensor(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        # Cached values without tensors are not copied: they are made again where they are used.
        made = {key: change_made(part) for key, part in self._made.items() if hasattr(part, "to")}
        return replace(self, **changed, _made=made)


def join_spans(spans: Spans, span: tuple[int, int]) -> Spans:
    """Append a (start, stop) span, merging it with the last one where they touch."""
    if span[0] == span[1]:
        return spans
    if spans and spans[-1][1] == span[0]:
        return (*spans[:-1], (spans[-1][0], span[1]))
    return (*spans, span)


def _from_runs(lengths, parents, paths, query_rows, query_lengths, key_spans, device) -> TreeLayout:
    num_keys = sum(lengths)
    flat = [span for spans in key_spans for span in spans]
    identity = [0] + [b for _, b in flat] == [a for a, _ in flat] + [num_keys]
    key_lengths = [sum(b - a for a, b in spans) for spans in key_spans]
    if max(num_keys, sum(key_lengths)) > INT32_ROWS:
        raise ValueError(
            f"got {num_keys:,} rows, and {sum(key_lengths):,} keys of {len(key_lengths):,} runs with the prefixes that "
            f"they share; wanted at most {INT32_ROWS:,} of each: use smaller packs"
        )
    return TreeLayout(
        lengths, parents, paths, query_rows, sum(query_lengths), num_keys, tuple(query_lengths), tuple(key_lengths),
        _cumulative(query_lengths, device), _cumulative(key_lengths, device),
        None if identity else expand_spans(flat).to(device),
    )  # fmt: skip


def expand_spans(spans) -> torch.Tensor:
    """Expand (start, stop) spans to all their rows, one after another, int64 on the CPU."""
    bounds = torch.tensor(list(spans), dtype=torch.int64).view(-1, 2)
    counts = bounds[:, 1] - bounds[:, 0]
    ends = counts.cumsum(0)
    # Row n of the result is the n-th place minus where its span begins there, plus where it begins in the row.
    return torch.arange(int(counts.sum())) + torch.repeat_interleave(bounds[:, 0] - (ends - counts), counts)


def _cumulative(lengths, device):
    total = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
    return total.to(device=device, dtype=torch.int32)
