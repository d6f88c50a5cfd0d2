"""Work lists of the Triton kernels: the tiles of rows, and the steps that each one takes.

A token's place in depth-first order of the tree is its `rank`. Key j is visible to query i if

    key_low[j] <= rank[i] < key_high[j]

with, for a causal tree, key_low the key's own rank and key_high the end of its segment's subtree; for
independent sequences that see all of themselves, the first rank and the end of the sequence. That is
the whole mask, one comparison with each of two integers, at any depth of the tree.

The forward pass and the gradient of the queries give every tile of query rows a list of key steps; the
gradient of keys and values gives every tile of key rows a list of query steps. A step is a range of
at most so many rows; steps that are whole and visible throughout come first, and need no mask.

A tile may hold the end of one response and the beginning of the next: its steps are those of all its
rows, so that many short responses read their shared prefix once per tile and not once per response.
"""

import itertools
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fastrm_kernels.tree_attention.layout import Spans, TreeLayout

MULTIPROCESSORS = 132  # of an H100 or H200; used only to judge how evenly work is divided
MOST_STEPS = 2**30 - 1  # a kernel finds a step's two numbers with 32-bit offsets
LONGEST_SHARE = 0.7  # how much of a multiprocessor's share the longest program may take; docs/lab/experiments.md


@dataclass(frozen=True)
class Blocks:
    """Shapes of the kernels' tiles, by which the work lists are cut.

    Attributes:
        query_tile, key_step: query rows that a program holds and key rows that it takes at each step, in
            the forward pass and for the gradient of the queries.
        key_tile, query_step: the same with the roles exchanged, for the gradient of keys and values.
        query_warps, key_warps: warps of a program that holds query rows, or key rows.
        fwd_stages, query_stages, key_stages: num_stages of the three kernels. Triton divides them between
            the load of a step's place and the loads at that place: 5 keep three steps in flight, 2 to 4 two.
    """

    query_tile: int
    key_step: int
    key_tile: int
    query_step: int
    query_warps: int
    key_warps: int
    fwd_stages: int
    query_stages: int
    key_stages: int


def pick_blocks(dtype: torch.dtype, head_dim: int, single_rows: bool) -> Blocks:
    """Choose the tile shapes for a dtype and a head dimension.

    Args:
        single_rows: the queries are chosen rows, such as the anchors: a tile then holds those of one
            tree only, rarely more than 64.
    """
    if dtype == torch.float32:
        return Blocks(32, 32, 32, 32, 8, 8, 1, 1, 1)  # exact products have no use for a pipeline
    # Steps of 64 rows, or of 32 where the accumulators leave too few registers for them (docs/lab/experiments.md).
    if single_rows:
        return Blocks(64, 32, 128, 32, 4, 8, 5, 5, 5)
    return Blocks(128, 64, 128, 32 if head_dim > 64 else 64, 8, 8, 5, 5, 5)


@dataclass(frozen=True)
class TileList:
    """Tiles, those with most work first, and their steps.

    Attributes:
        tiles: (N, 5) int32: first row, end row, first step, first step that needs the mask, end step.
        steps: (M, 2) int32: first row, end row.
        longest: steps of the longest tile.
    """

    tiles: torch.Tensor
    steps: torch.Tensor
    longest: int = 0

    def parts_wanted(self, heads: int, group: int) -> int:
        """Return how many programs share the `group` query heads that a tile of keys takes in turn.

        The longest tile, begun first, should end well before the rest. Otherwise most multiprocessors would
        wait for a long prefix that all responses see. The parts are written in float32 and summed
        afterwards, so no more of them than that takes.
        """
        share = self.steps.shape[0] * heads * group / MULTIPROCESSORS
        divisors = [d for d in range(1, group + 1) if group % d == 0]
        return next((d for d in divisors if self.longest * group / d <= LONGEST_SHARE * share), group)


@dataclass(frozen=True)
class WorkLists:
    """Everything that the kernels need to know of a layout; all tensors on one device.

    Attributes:
        query_rank: (Tq,) int32.
        key_bounds: (T, 2) int32, low and high of each key side by side: a kernel reads both at once.
        query_tiles: tiles of query rows with key steps.
        key_tiles: tiles of key rows with query steps; they cover every key row.
        packed: the int32 tensor that all of these are views of, once they have been moved.
    """

    query_rank: torch.Tensor
    key_bounds: torch.Tensor
    query_tiles: TileList
    key_tiles: TileList
    packed: torch.Tensor | None = None

    def to(self, device) -> "WorkLists":
        """Return the same lists on `device`, moved as one tensor: many small copies would each cost a launch."""
        return self._with(lambda packed: packed.to(device, non_blocking=True))

    def pin_memory(self) -> "WorkLists":
        """Return the same lists in page-locked memory."""
        return self._with(torch.Tensor.pin_memory)

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "WorkLists":
        """Change all lists as one tensor, where each starts at a multiple of 16 bytes: else Triton compiles again."""
        parts = self.tensors()
        rooms = [-(-part.numel() // 4) * 4 for part in parts]
        packed = self.packed
        if packed is None:
            packed = torch.zeros(sum(rooms), dtype=torch.int32)
            for piece, part in zip(packed.split(rooms), parts, strict=True):
                piece[: part.numel()] = part.reshape(-1)
        packed = change(packed)
        split = zip(packed.split(rooms), parts, strict=True)
        pieces = [piece[: part.numel()].view(part.shape) for piece, part in split]
        lists = WorkLists.from_tensors(pieces, (self.query_tiles.longest, self.key_tiles.longest))
        return replace(lists, packed=packed)

    @staticmethod
    def from_tensors(tensors, longest: tuple[int, int] = (0, 0)) -> "WorkLists":
        """Return lists from the result of `tensors`; a launch takes nothing else."""
        rank, bounds, *lists = tensors
        return WorkLists(rank, bounds, TileList(*lists[:2], longest[0]), TileList(*lists[2:], longest[1]))

    def tensors(self) -> list[torch.Tensor]:
        """Return all lists in a fixed order, for an operator that takes tensors only."""
        lists = (self.query_tiles, self.key_tiles)
        return [self.query_rank, self.key_bounds, *(x for part in lists for x in (part.tiles, part.steps))]


def work_lists(layout: TreeLayout, blocks: Blocks, causal: bool) -> WorkLists:
    """Return the work lists of a layout, built at the first call and kept on it."""
    key = (blocks.query_tile, blocks.key_step, blocks.key_tile, blocks.query_step, causal)
    kept = layout._made.get(key)
    if kept is None:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "the layout's work lists are missing, and torch.compile cannot trace how they are built; "
                "call tiles.build_work_lists(layout, dtype, head_dim, causal=...) before the compiled function"
            )
        kept = layout._made[key] = _build(layout, blocks, causal).to(layout.device)
    return kept


def build_work_lists(layout: TreeLayout, dtype: torch.dtype, head_dim: int, *, causal: bool = True) -> None:
    """Build now what the Triton kernels need of a layout for inputs of this kind.

    Otherwise the first call does it, which torch.compile cannot trace.
    """
    work_lists(layout, pick_blocks(dtype, head_dim, layout.query_rows is not None), causal)


def _build(layout: TreeLayout, blocks: Blocks, causal: bool) -> WorkLists:
    tree = _Tree(layout, causal)
    query_tiles, key_tiles = tree.query_tiles(blocks.query_tile), tree.key_tiles(blocks.key_tile)
    lists = [
        _tile_list(query_tiles, [tree.keys_of(*tile) for tile in query_tiles], blocks.key_step),
        _tile_list(key_tiles, [tree.queries_of(*tile) for tile in key_tiles], blocks.query_step),
    ]
    counts = torch.tensor(layout.lengths, dtype=torch.int64)
    if causal:
        # Rows of a segment have consecutive ranks.
        low = torch.repeat_interleave(torch.tensor(tree.ranks) - torch.tensor(tree.starts), counts)
        low = low + torch.arange(layout.num_keys)
    else:
        low = torch.repeat_interleave(torch.tensor(tree.ranks), counts)
    high = torch.repeat_interleave(torch.tensor(tree.rank_ends), counts)
    ranks = torch.tensor(tree.query_ranks, dtype=torch.int32)
    return WorkLists(ranks, torch.stack([low, high], 1).int(), *lists)


def _tile_list(tiles, seen, step_rows: int) -> TileList:
    """Cut what each tile sees into steps.

    Args:
        tiles: (start, end) rows.
        seen: for each tile, the spans that any row of it sees, and those that all of its rows see.

    Raises:
        ValueError: there are more than MOST_STEPS steps.
    """
    owners = torch.tensor([n for n, (some, _) in enumerate(seen) for _ in some], dtype=torch.int64)
    spans = torch.tensor([span for some, _ in seen for span in some], dtype=torch.int64).view(-1, 2)
    counts = (spans[:, 1] - spans[:, 0] + step_rows - 1) // step_rows
    if (num_steps := int(counts.sum())) > MOST_STEPS:
        raise ValueError(f"the tiles take {num_steps:,} steps, wanted at most {MOST_STEPS:,}: use smaller packs")
    number = torch.arange(num_steps) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    starts = torch.repeat_interleave(spans[:, 0], counts) + number * step_rows
    ends = torch.minimum(starts + step_rows, torch.repeat_interleave(spans[:, 1], counts))
    owners = torch.repeat_interleave(owners, counts)
    masked = (_tops(owners, starts, seen) < ends) | (ends - starts < step_rows)
    order = torch.argsort(owners * 2 + masked, stable=True)
    per_tile = torch.bincount(owners, minlength=len(tiles))
    last = per_tile.cumsum(0)
    first_masked = last - torch.bincount(owners[masked], minlength=len(tiles))
    rows = torch.tensor(tiles, dtype=torch.int64).view(-1, 2)
    table = torch.stack([rows[:, 0], rows[:, 1], last - per_tile, first_masked, last], 1)
    longest_first = torch.argsort(per_tile, descending=True, stable=True)
    steps = torch.stack([starts, ends], 1)[order].int()
    return TileList(table[longest_first].int(), steps, int(per_tile.max()) if len(tiles) else 0)


def _tops(owners, starts, seen) -> torch.Tensor:
    """Return for each step the end of the fully visible span that its first row lies in; 0 if in none."""
    # Spans of one tile are in order, so (tile, row) is sorted; one binary search finds them all.
    reach = 1 + max((end for some, _ in seen for _, end in some), default=0)
    keys = torch.tensor([n * reach + start for n, (_, full) in enumerate(seen) for start, _ in full], dtype=torch.int64)
    ends = torch.tensor([0] + [n * reach + end for n, (_, full) in enumerate(seen) for _, end in full])
    place = torch.searchsorted(keys, owners * reach + starts, right=True)
    return ends[place] - owners * reach


class _Tree:
    """The ranks of a layout's segments, the tiles that its rows are cut into, and what a tile sees."""

    def __init__(self, layout: TreeLayout, causal: bool):
        self.causal = causal
        self.lengths, self.parents, self.paths = layout.lengths, layout.parents, layout.paths
        self.starts = layout.starts
        self.num_keys = layout.num_keys
        self.sizes = _subtree_sizes(self.lengths, self.parents)
        self.ranks = _ranks(self.parents, self.lengths, self.sizes)
        self.rank_ends = [rank + size for rank, size in zip(self.ranks, self.sizes, strict=True)]
        self.segments = [s for s, length in enumerate(self.lengths) if length]
        self.firsts = [self.starts[s] for s in self.segments]
        if layout.query_rows is None:
            rows = range(self.num_keys)
            self.owners = None
        else:
            rows = layout.query_rows
            self.owners = [self._owner(row) for row in rows]
        self.rows = rows
        depth_first = self.ranks == self.starts
        self.query_ranks = (
            list(rows)
            if depth_first
            else [self.ranks[s] + row - self.starts[s] for s, row in ((self._owner(r), r) for r in rows)]
        )
        self.sorted = (depth_first and layout.query_rows is None) or all(
            a <= b for a, b in itertools.pairwise(self.query_ranks)
        )

    def query_tiles(self, tile_rows: int):
        if self.owners is None:
            return self.key_tiles(tile_rows)
        # Single rows of different trees share no keys: one tile of both would only take longer.
        tiles, root = [], -1
        for query, owner in enumerate(self.owners):
            above = self._root(owner)
            if not tiles or above != root or query - tiles[-1][0] == tile_rows:
                tiles.append((query, query))
            tiles[-1], root = (tiles[-1][0], query + 1), above
        return tiles

    def key_tiles(self, tile_rows: int):
        """Cut the row into tiles. A tile goes on into the next segment only if that saves a later tile.

        Going on costs the steps of the new rows, and saves those of a whole tile, its prefix included.
        """
        tiles = []
        for segment in self.segments:
            start = self.starts[segment]
            end = start + self.lengths[segment]
            if tiles:
                first, _ = tiles[-1]
                room, to_come = tile_rows - (start - first), self._to_come(segment)
                if -(-max(0, to_come - room) // tile_rows) < -(-to_come // tile_rows):
                    tiles[-1] = (first, min(end, first + tile_rows))
                    start = tiles[-1][1]
            while start < end:
                tiles.append((start, min(end, start + tile_rows)))
                start = tiles[-1][1]
        return tiles

    def _to_come(self, segment: int) -> int:
        """Return the number of rows from this segment on that are cut with the same aim.

        They are its own subtree, with all siblings that follow where they share more than each has of its own:
        a saved tile is then worth more than tiles that begin with a sibling.
        """
        parent = self.parents[segment]
        if parent >= 0 and sum(b - a for a, b in self.paths[parent]) >= self.sizes[segment]:
            return self.rank_ends[parent] - self.ranks[segment]
        return self.sizes[segment]

    def keys_of(self, start: int, end: int) -> tuple[Spans, Spans]:
        """Return the key rows that any, and those that all, of the query rows start .. end - 1 see."""
        pieces = []  # (segment, one past the last row of it that is seen)
        if self.owners is None:
            pieces = [(s, row_end) for s, _, row_end in self._pieces(start, end)]
        else:
            pieces = [(s, row + 1) for s, row in zip(self.owners[start:end], self.rows[start:end], strict=True)]
        if not self.causal:
            whole = [(self.starts[s], self.starts[s] + self.lengths[s]) for s, _ in pieces]
            return _union(whole), tuple(whole) if len(set(whole)) == 1 else ()
        some = _union(span for s, stop in pieces for span in _clip(self.paths[s], stop))
        low, high = min(self.query_ranks[start:end]), max(self.query_ranks[start:end])
        ancestor = pieces[0][0]
        while ancestor >= 0 and not self.ranks[ancestor] <= low <= high < self.rank_ends[ancestor]:
            ancestor = self.parents[ancestor]
        if ancestor < 0:
            return some, ()
        # The lowest common ancestor is seen up to the first query, its ancestors wholly.
        seen_rows = min(self.lengths[ancestor], low - self.ranks[ancestor] + 1)
        return some, _clip(self.paths[ancestor], self.starts[ancestor] + seen_rows)

    def queries_of(self, start: int, end: int) -> tuple[Spans, Spans]:
        """Return the query rows that see any, and those that see all, of the key rows start .. end - 1."""
        some, lows, highs = [], [], []
        for s, row, row_end in self._pieces(start, end):
            first = self.ranks[s] + (row - self.starts[s] if self.causal else 0)
            last = self.ranks[s] + (row_end - 1 - self.starts[s] if self.causal else 0)
            some.append((first, self.rank_ends[s]))
            lows.append(last)
            highs.append(self.rank_ends[s])
        spans = _union(span for low, high in _union(some) for span in self._queries_between(low, high))
        return spans, self._queries_between(max(lows), min(highs))

    def _queries_between(self, low: int, high: int) -> Spans:
        """Return the spans of queries whose rank is in low .. high - 1."""
        if low >= high:
            return ()
        if self.sorted:
            span = bisect_left(self.query_ranks, low), bisect_left(self.query_ranks, high)
            return (span,) if span[0] < span[1] else ()
        return _union((n, n + 1) for n, rank in enumerate(self.query_ranks) if low <= rank < high)

    def _pieces(self, start: int, end: int):
        """Yield (segment, first row, end row) of the segments within rows start .. end - 1."""
        place = bisect_left(self.firsts, start + 1) - 1
        for segment, first in zip(self.segments[place:], self.firsts[place:], strict=True):
            if first >= end:
                break
            yield segment, max(first, start), min(first + self.lengths[segment], end)

    def _owner(self, row: int) -> int:
        return self.segments[bisect_left(self.firsts, row + 1) - 1]

    def _root(self, segment: int) -> int:
        while self.parents[segment] >= 0:
            segment = self.parents[segment]
        return segment


def _subtree_sizes(lengths, parents) -> list[int]:
    """Return the number of tokens of each segment and all its descendants."""
    sizes = list(lengths)
    for segment in reversed(range(len(parents))):
        if parents[segment] >= 0:
            sizes[parents[segment]] += sizes[segment]
    return sizes


def _ranks(parents, lengths, sizes) -> list[int]:
    """Return the first depth-first rank of each segment, siblings in row order."""
    ranks, free, root_end = [], list(lengths), 0  # free: where the next child begins, from its parent's rank
    for segment, parent in enumerate(parents):
        if parent < 0:
            ranks.append(root_end)
            root_end += sizes[segment]
        else:
            ranks.append(ranks[parent] + free[parent])
            free[parent] += sizes[segment]
    return ranks


def _union(spans) -> Spans:
    """Return spans in any order, overlapping or touching, as disjoint ones in order."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        elif start < end:
            merged.append((start, end))
    return tuple(merged)


def _clip(spans: Spans, stop: int) -> Spans:
    """Return the spans up to row `stop`."""
    return tuple((a, min(b, stop)) for a, b in spans if a < stop)
