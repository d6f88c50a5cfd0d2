"""Dense and causal rectangles of a layout, which eager tree attention computes without copies.

A segment's queries see their own segment causally and every ancestor whole. So each segment makes at
most two blocks: its own, causal; and a dense one of all queries below it against its keys.

    row:     [ P P P | C C C | R R ]        C and R are children of P
    blocks:  own:    P x P, C x C, R x R    causal
             below:  [C R] x P              dense

In depth-first order the queries below a segment lie side by side, so both sides of a block are
slices of the row. Where they do not (another order, small blocks padded together), rows are gathered.
Blocks of one level share no query and no key. Everything is made of the layout's Python numbers on the
CPU; index tensors and masks move to the device afterwards, without reading anything back.
"""

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from fastrm_kernels.tree_attention.layout import Spans, TreeLayout, join_spans

# One call costs about as much as this many multiplications of a query with a key on one CPU core (0.1 ms).
_CALL_PRODUCTS = 1 << 21
# Copying a row into a batch, and its results and gradients back, costs about as much as so many keys for a query.
_COPIED_KEYS = 32
_LEAST_ROWS = 8  # the least length that a side of a small block is padded to


@dataclass(frozen=True)
class Rows:
    """Rows of one side of a batch: `count` blocks of `length` rows each.

    Attributes:
        start, step: row n of block b is start + b * step + n. Unused where `index` is set.
        index: (count * length,) int64 rows, where they do not follow such a rule.
        real: places in `index` that are no padding; None where all are real.
    """

    count: int
    length: int
    start: int = 0
    step: int = 0
    index: torch.Tensor | None = None
    real: torch.Tensor | None = None

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """Read (rows, H, K) as (count, H, length, K): a view unless rows are gathered."""
        _, heads, width = x.shape
        if self.index is not None:
            return x.index_select(0, self.index).view(self.count, self.length, heads, width).transpose(1, 2)
        row, head, column = x.stride()
        shape, strides = (self.count, heads, self.length, width), (self.step * row, head, row, column)
        return x.as_strided(shape, strides, x.storage_offset() + self.start * row)

    def write(self, x: torch.Tensor, values: torch.Tensor) -> None:
        """Write values (count, H, length, K) to these rows of x; padding is dropped."""
        if self.index is None:
            self.read(x).copy_(values)
            return
        index, values = self.index, values.transpose(1, 2).flatten(0, 1)
        if self.real is not None:
            index, values = index.index_select(0, self.real), values.index_select(0, self.real)
        x[index] = values.to(x.dtype)

    def add(self, x: torch.Tensor, values: torch.Tensor) -> None:
        """Add values to these rows of x; a row occurs once, so that every sum has one order."""
        if self.index is None:
            self.read(x).add_(values)
        else:
            self.write(x, self.read(x) + values)

    def padded(self, x: torch.Tensor, value: float) -> torch.Tensor:
        """Return what `read` gave of x, with `value` in its padding."""
        if self.real is None:
            return x
        filled = torch.full_like(x.transpose(1, 2), value, memory_format=torch.contiguous_format).flatten(0, 1)
        filled[self.real] = x.transpose(1, 2).flatten(0, 1).index_select(0, self.real)
        return filled.view(self.count, self.length, *x.shape[1::2]).transpose(1, 2)

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Rows":
        tensors = {"index": self.index, "real": self.real}
        return replace(self, **{name: None if x is None else move(x) for name, x in tensors.items()})


@dataclass(frozen=True)
class Batch:
    """Blocks of one level, padded to one shape.

    Attributes:
        causal: query n of a block sees its first n + 1 keys.
        mask: (B, 1, q or 1, k) of 0 and -inf; None where every query sees all keys, or as `causal` says.
    """

    queries: Rows
    keys: Rows
    causal: bool
    mask: torch.Tensor | None

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        mask = None if self.mask is None else move(self.mask)
        return Batch(self.queries.moved(move), self.keys.moved(move), self.causal, mask)


@dataclass(frozen=True)
class BlockLayout:
    """All blocks of a layout.

    Attributes:
        levels: batches. Those of the first hold every query once; those of the others add to it.
        holds_all_keys: the first level holds every key, too.
    """

    levels: tuple[tuple[Batch, ...], ...]
    holds_all_keys: bool

    def to(self, device) -> "BlockLayout":
        return self._moved(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> "BlockLayout":
        return self._moved(torch.Tensor.pin_memory)

    def _moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "BlockLayout":
        levels = tuple(tuple(batch.moved(move) for batch in level) for level in self.levels)
        return BlockLayout(levels, self.holds_all_keys)


def block_layout(layout: TreeLayout, causal: bool, dtype: torch.dtype, width: int) -> BlockLayout:
    """Return the blocks of a layout on its device, built at the first call and kept on the layout.

    Args:
        dtype: of the queries.
        width: of one row of queries, all heads; it decides from which size on a block is worth a call.
    """
    key = ("blocks", causal, dtype, width)
    if key not in layout._made:
        layout._made[key] = _make_layout(layout, causal, dtype, width).to(layout.device)
    return layout._made[key]


@dataclass(frozen=True)
class _Block:
    """Queries and the keys that they see.

    Queries are places among all queries; `sees` is the number of keys that each query sees, None where that is all.
    """

    queries: Spans
    keys: tuple[int, int]
    sees: tuple[int, ...] | None = None

    @property
    def num_queries(self) -> int:
        return sum(stop - start for start, stop in self.queries)

    @property
    def num_keys(self) -> int:
        return self.keys[1] - self.keys[0]


def _make_layout(layout, causal, dtype, width) -> BlockLayout:
    segments, parents = _segments(layout)
    own = _own_queries(layout, [start for start, _ in segments], segments)
    firsts = [_own_block(layout, segment, queries) for segment, queries in zip(segments, own, strict=True)]
    levels = [[block for block in firsts if block is not None]]
    below: list[Spans] = [()] * len(segments)
    for number in reversed(range(len(segments))):
        if parents[number] >= 0:
            spans = sorted((*own[number], *below[number], *below[parents[number]]))
            below[parents[number]] = _joined(spans)
    depths: list[int] = []
    for number, parent in enumerate(parents):
        depths.append(depths[parent] + 1 if parent >= 0 else 1)
        if below[number]:
            levels += [[] for _ in range(depths[-1] + 1 - len(levels))]
            levels[depths[-1]].append(_Block(below[number], segments[number]))
    first_is_causal = causal and layout.query_rows is None
    area = max(1, _CALL_PRODUCTS // width)
    batches = tuple(
        tuple(_batches(blocks, first_is_causal and not level, dtype, area)) for level, blocks in enumerate(levels)
    )
    return BlockLayout(batches, layout.query_rows is None)


def _segments(layout) -> tuple[list[tuple[int, int]], list[int]]:
    """Return (start, stop) and parent of the segments that are not empty; an only child is joined to its parent."""
    alive: list[int] = []  # of each segment, itself or its nearest ancestor with tokens; -1
    num_children: dict[int, int] = {}
    for number, (length, parent) in enumerate(zip(layout.lengths, layout.parents, strict=True)):
        above = alive[parent] if parent >= 0 else -1
        alive.append(number if length else above)
        if length:
            num_children[above] = num_children.get(above, 0) + 1
    segments, parents = [], []
    place: dict[int, int] = {-1: -1}
    for number, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
        if not length:
            continue
        parent = layout.parents[number]
        parent = alive[parent] if parent >= 0 else -1
        if parent >= 0 and num_children[parent] == 1 and segments[place[parent]][1] == start:
            place[number] = place[parent]
            segments[place[parent]] = (segments[place[parent]][0], start + length)
            continue
        place[number] = len(segments)
        segments.append((start, start + length))
        parents.append(place[parent])
    return segments, parents


def _own_queries(layout, firsts: Sequence[int], segments) -> list[Spans]:
    """Return the places of each segment's queries among all queries."""
    if layout.query_rows is None:
        return [(segment,) for segment in segments]
    found: list[Spans] = [()] * len(segments)
    for place, row in enumerate(layout.query_rows):
        owner = bisect_right(firsts, row) - 1
        found[owner] = join_spans(found[owner], (place, place + 1))
    return found


def _own_block(layout, segment, queries: Spans) -> _Block | None:
    """Return the block of a segment's queries with the keys of the segment that they see; None without queries."""
    if layout.query_rows is None:
        return _Block(queries, segment)
    if not queries:
        return None
    start = segment[0]
    sees = tuple(layout.query_rows[place] + 1 - start for span in queries for place in range(*span))
    most = max(sees)
    return _Block(queries, (start, start + most), None if min(sees) == most else sees)


def _joined(spans: Iterable[tuple[int, int]]) -> Spans:
    found: Spans = ()
    for span in spans:
        found = join_spans(found, span)
    return found


def _batches(blocks: Sequence[_Block], causal: bool, dtype, area: int) -> Iterable[Batch]:
    """Yield blocks of one shape in batches: one for each run of blocks at equal distances, or one of copies.

    The shape that a block is computed in depends on the block alone: nothing else in the row changes a bit of it.
    """
    groups: dict[tuple[int, int, bool], list[_Block]] = {}
    for block in blocks:
        q_len, k_len = _shape(block, area)
        masked = not causal and (block.sees is not None or block.num_keys < k_len)
        groups.setdefault((q_len, k_len, masked), []).append(block)
    for (q_len, k_len, masked), group in groups.items():
        streaks = _streaks(group)
        uniform = all((block.num_queries, block.num_keys) == (q_len, k_len) for block in group)
        # No copies are made where each of the calls that this takes is worth its cost.
        if not uniform or len(group) * q_len * k_len < area * len(streaks):
            streaks = [group]
        yield from (_batch(streak, (q_len, k_len), causal, masked, dtype) for streak in streaks)


def _shape(block: _Block, area: int) -> tuple[int, int]:
    """Return the numbers of queries and keys that a block is padded to.

    They are powers of two, so that small blocks share calls, or the block's own numbers.
    """
    own = block.num_queries, block.num_keys
    q_len, k_len = (max(_LEAST_ROWS, 1 << (length - 1).bit_length()) for length in own)
    is_cheap = _COPIED_KEYS * sum(own) <= area and q_len * k_len - own[0] * own[1] <= area
    return (q_len, k_len) if is_cheap else own


def _streaks(group: Sequence[_Block]) -> list[list[_Block]]:
    """Split blocks into runs in which the queries, and the keys, lie at one distance from block to block."""
    streaks: list[list[_Block]] = []
    for block in group:
        streak = streaks[-1] if streaks else []
        if streak and (len(streak) == 1 or _step(streak[-2:]) == _step([streak[-1], block])):
            streak.append(block)
        else:
            streaks.append([block])
    return streaks


def _step(pair: Sequence[_Block]) -> tuple[int, int]:
    first, second = pair
    return second.queries[0][0] - first.queries[0][0], second.keys[0] - first.keys[0]


def _batch(blocks: Sequence[_Block], shape: tuple[int, int], causal: bool, masked: bool, dtype) -> Batch:
    q_len, k_len = shape
    queries = _rows([block.queries for block in blocks], q_len)
    keys = _rows([(block.keys,) for block in blocks], k_len)
    return Batch(queries, keys, causal, _mask(blocks, q_len, k_len, dtype) if masked else None)


def _rows(blocks: Sequence[Spans], length: int) -> Rows:
    """Return one side of a batch from the spans of its blocks; a short block repeats its last row up to `length`."""
    count, starts = len(blocks), [spans[0][0] for spans in blocks]
    counts = [sum(stop - start for start, stop in spans) for spans in blocks]
    steps = {after - before for before, after in itertools.pairwise(starts)}
    in_place = set(counts) == {length} and all(len(spans) == 1 for spans in blocks)
    if in_place and len(steps) <= 1 and min(steps, default=0) >= 0:
        return Rows(count, length, starts[0], steps.pop() if steps else 0)
    padded = []
    for spans, rows in zip(blocks, counts, strict=True):
        last = spans[-1][1]
        padded += [*spans, *[(last - 1, last)] * (length - rows)]
    index, real = _expanded(padded), None
    if set(counts) != {length}:
        real = _expanded((n * length, n * length + rows) for n, rows in enumerate(counts))
    return Rows(count, length, index=index, real=real)


def _mask(blocks: Sequence[_Block], q_len: int, k_len: int, dtype) -> torch.Tensor:
    """Return (B, 1, q or 1, k): -inf where a query does not see a key. Padded queries see what the last one sees."""
    seen = [[block.num_keys] if block.sees is None else list(block.sees) for block in blocks]
    if any(block.sees is not None for block in blocks):
        seen = [row + row[-1:] * (q_len - len(row)) for row in seen]
    hidden = torch.arange(k_len) >= torch.tensor(seen)[:, None, :, None]
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))


def _expanded(spans: Iterable[tuple[int, int]]) -> torch.Tensor:
    return torch.tensor([row for span in spans for row in range(*span)])
