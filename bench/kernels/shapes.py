"""The shapes that kernels are measured and tested at, and the work that each one holds. Needs no torch.

Useful work is what the operation must do, whichever way it is computed: every variant of a shape is
judged by the same number of operations and bytes.
"""

import random
from dataclasses import dataclass

WIDTHS = (1536, 2048, 3584, 5120)
ROWS = (8, 2, 32, 64, 256)
PREFIX_RESPONSE = ((1300, 150), (1300, 300), (300, 300), (4100, 300), (1300, 1200))
RESPONSES = (2, 8, 4, 16)
HEADS = ((28, 4), (16, 2))
HEAD_DIM = 128
PACK_TOKENS = 16_384

VISION_HEADS, VISION_HEAD_DIM = 16, 80
MERGED_GRID = (37, 35)  # an image of 5,180 patches, in merged units of 2 x 2 patches
NUM_IMAGES = 3
WINDOW = 4  # merged units a side: 64 patches, fewer at the right and lower edges

ITEM_BYTES = {"bf16": 2, "fp32": 4}
FORWARD, STEP = "forward", "forward+backward"

Tree = tuple[tuple[int, ...], tuple[int, ...]]  # lengths of the segments, and their parents


@dataclass(frozen=True)
class HeadShape:
    """A two-layer head with norm and biases: D = F = width, R = rows; weights and rows in `dtype`."""

    width: int
    rows: int
    dtype: str

    @property
    def name(self) -> str:
        return f"D={self.width} R={self.rows} {self.dtype}"

    @property
    def weight_bytes(self) -> int:
        return self.width * self.width * ITEM_BYTES[self.dtype]

    @property
    def floor_bytes(self) -> int:
        """The fewest bytes of forward and backward: the weights read in each, their gradients written."""
        return 3 * self.weight_bytes

    @property
    def flops(self) -> int:
        """FLOPs of forward and backward: three products of (R, D) by (D, F), without the last layer's vector."""
        return 6 * self.rows * self.width * self.width

    def edges(self) -> list[tuple[int, int]]:
        """Return (winner, loser) of all pairs within groups of four responses, or of two if there are only two."""
        size = min(self.rows, 4)
        groups = range(0, self.rows - size + 1, size)
        return [(g + a, g + b) for g in groups for a in range(size) for b in range(a + 1, size)]

    def to_json(self) -> dict:
        return {"width": self.width, "rows": self.rows, "dtype": self.dtype}


@dataclass(frozen=True)
class AttentionShape:
    """A pack and its heads.

    Attributes:
        name: of the pack.
        prefix, response: tokens in each tree, or their means where trees differ; 0 for the vision tower.
        num_responses: of each tree; 0 for the vision tower.
        trees: one after another in the row.
        causal: False for the vision tower, where every patch sees its whole sequence.
    """

    name: str
    prefix: int
    response: int
    num_responses: int
    trees: tuple[Tree, ...]
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool = True
    dtype: str = "bf16"

    @property
    def lengths(self) -> list[int]:
        return [length for lengths, _ in self.trees for length in lengths]

    @property
    def parents(self) -> list[int]:
        """Parents in the whole row: the parent's place among all segments, or -1."""
        found: list[int] = []
        for _, parents in self.trees:
            first = len(found)
            found.extend(parent if parent < 0 else first + parent for parent in parents)
        return found

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def pairs(self) -> int:
        """(query, key) pairs of one head in which the query sees the key."""
        if not self.causal:
            return sum(length * length for length in self.lengths)
        return sum(visible_pairs(*tree) for tree in self.trees)

    @property
    def duplicated_lengths(self) -> list[int]:
        """Tokens of each sequence when each response has a prefix of its own, in the order of `duplicated_rows`."""
        return [lengths[0] + response for lengths, _ in self.trees for response in lengths[1:]]

    @property
    def duplicated_pairs(self) -> int:
        """The pairs in these duplicated sequences."""
        return sum(length * (length + 1) // 2 for length in self.duplicated_lengths)

    @property
    def work_ratio(self) -> float | None:
        """Pairs of duplicated sequences over those of the tree; None where nothing is shared."""
        return self.duplicated_pairs / self.pairs if self.num_responses else None

    def flops(self, direction: str) -> int:
        """Return FLOPs: two products of K per pair forward, five backward, each of 2 K operations."""
        return self.pairs * self.heads * self.head_dim * {FORWARD: 4, STEP: 14}[direction]

    def duplicated_rows(self) -> list[int]:
        """Return the pack's rows in the order of duplicated sequences: prefix, response, prefix, ..."""
        rows, start = [], 0
        for lengths, _ in self.trees:
            prefix, *responses = lengths
            own = start + prefix
            for response in responses:
                rows += [*range(start, start + prefix), *range(own, own + response)]
                own += response
            start = own
        return rows

    def to_json(self) -> dict:
        shown = ("prefix", "response", "num_responses", "heads", "kv_heads", "head_dim", "causal", "dtype")
        return {name: getattr(self, name) for name in shown} | {
            "num_trees": len(self.trees), "num_tokens": self.num_tokens, "pairs": self.pairs,
            "work_ratio": self.work_ratio,
        }  # fmt: skip


Shape = HeadShape | AttentionShape


def visible_pairs(lengths, parents) -> int:
    """Return the number of causal pairs of a tree: each token sees its ancestors and its segment up to itself."""
    above: list[int] = []  # tokens of all ancestors
    pairs = 0
    for length, parent in zip(lengths, parents, strict=True):
        above.append(above[parent] + lengths[parent] if parent >= 0 else 0)
        pairs += length * above[-1] + length * (length + 1) // 2
    return pairs


def tree_pack(
    prefix: int, response: int, num_responses: int, heads: tuple[int, int], *, pack_tokens: int = PACK_TOKENS,
    head_dim: int = HEAD_DIM, dtype: str = "bf16",
) -> AttentionShape:  # fmt: skip
    """Return as many trees of one kind as fit in `pack_tokens`, at least one."""
    tree = (prefix, *[response] * num_responses), (-1, *[0] * num_responses)
    num_trees = max(1, pack_tokens // sum(tree[0]))
    name = f"{prefix}/{response} N={num_responses} {heads[0]}/{heads[1]}" + (f" {dtype}" if dtype != "bf16" else "")
    return AttentionShape(name, prefix, response, num_responses, (tree,) * num_trees, *heads, head_dim, True, dtype)


def mixed_pack(
    num_trees: int, prefixes: tuple[int, int], responses: tuple[int, int], heads: tuple[int, int], *,
    head_dim: int = HEAD_DIM, dtype: str = "bf16",
) -> AttentionShape:  # fmt: skip
    """Return prompts with two responses each, as in a training pack, with lengths drawn from these ranges."""
    draw = random.Random(0)
    trees = tuple(
        ((draw.randint(*prefixes), draw.randint(*responses), draw.randint(*responses)), (-1, 0, 0))
        for _ in range(num_trees)
    )
    prefix = round(sum(lengths[0] for lengths, _ in trees) / num_trees)
    response = round(sum(sum(lengths[1:]) for lengths, _ in trees) / (2 * num_trees))
    name = f"{num_trees} mixed, {prefixes[0]}-{prefixes[1]}/{responses[0]}-{responses[1]} N=2 {heads[0]}/{heads[1]}"
    name += f" {dtype}" if dtype != "bf16" else ""
    return AttentionShape(name, prefix, response, 2, trees, *heads, head_dim, True, dtype)


def sequences(name: str, lengths, heads: int, head_dim: int, dtype: str = "bf16") -> AttentionShape:
    """Return independent sequences that see all of themselves."""
    trees = tuple(((length,), (-1,)) for length in lengths)
    return AttentionShape(f"{name} {heads}/{heads}", 0, 0, 0, trees, heads, heads, head_dim, False, dtype)


def window_lengths(grid: tuple[int, int], side: int = WINDOW) -> list[int]:
    """Return the numbers of patches of an image's windows, row by row, as Qwen2.5-VL cuts the grid."""
    height, width = grid
    return [
        4 * min(side, height - top) * min(side, width - left)
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]


def _vision() -> list[AttentionShape]:
    height, width = MERGED_GRID
    return [
        sequences("vision windows", window_lengths(MERGED_GRID) * NUM_IMAGES, VISION_HEADS, VISION_HEAD_DIM),
        sequences("vision images", [4 * height * width] * NUM_IMAGES, VISION_HEADS, VISION_HEAD_DIM),
    ]


# Shapes of goals come first: a run that is short of time measures from the front.
HEAD_SHAPES = [HeadShape(width, rows, dtype) for dtype in ("bf16", "fp32") for width in (3584, 1536, 2048, 5120)
               for rows in ROWS]  # fmt: skip
ATTENTION_SHAPES = [
    *_vision()[:1],
    *(tree_pack(*sizes, count, heads) for count in RESPONSES for sizes in PREFIX_RESPONSE for heads in HEADS),
    *_vision()[1:],
]

# The same kinds in small, for a machine without a GPU.
SMALL_HEAD_SHAPES = [HeadShape(256, 8, "fp32"), HeadShape(256, 64, "fp32"), HeadShape(256, 8, "bf16")]
SMALL_ATTENTION_SHAPES = [
    tree_pack(96, 24, 2, (4, 2), pack_tokens=300, head_dim=32, dtype="fp32"),
    tree_pack(96, 24, 8, (4, 2), pack_tokens=300, head_dim=32, dtype="fp32"),
    sequences("vision windows", window_lengths((9, 6)), 2, 20, "fp32"),
]
# Shapes of a training step: heads of SmolLM2-135M, Qwen2.5-VL-3B and 7B; with images, and with short texts.
CPU_ATTENTION_SHAPES = [
    *(tree_pack(1300, 300, count, (9, 3), pack_tokens=1, head_dim=64, dtype=dtype) for count in (2, 4, 8)
      for dtype in ("fp32", "bf16")),
    *(mixed_pack(*sizes, (9, 3), head_dim=64, dtype=dtype) for dtype in ("fp32", "bf16")
      for sizes in ((4, (300, 1700), (100, 500)), (16, (60, 400), (20, 300)))),
    *(tree_pack(1300, 300, 2, (16, 2), pack_tokens=1, dtype=dtype) for dtype in ("fp32", "bf16")),
    tree_pack(1300, 300, 2, (28, 4), pack_tokens=1, dtype="fp32"),
]  # fmt: skip


def head_shapes(on_gpu: bool, quick: bool = False) -> list[HeadShape]:
    """Return the shapes of the head in order of importance."""
    if not on_gpu:
        return SMALL_HEAD_SHAPES[:1] if quick else SMALL_HEAD_SHAPES
    return [s for s in HEAD_SHAPES if s.width == 3584 and s.rows in (8, 64)] if quick else HEAD_SHAPES


def attention_shapes(on_gpu: bool, quick: bool = False) -> list[AttentionShape]:
    """Return the shapes of attention in order of importance."""
    if not on_gpu:
        return SMALL_ATTENTION_SHAPES[1:] if quick else SMALL_ATTENTION_SHAPES + CPU_ATTENTION_SHAPES
    if not quick:
        return ATTENTION_SHAPES
    return [s for s in ATTENTION_SHAPES if not s.causal or (s.prefix == 1300 and s.response < 1000 and s.heads == 28
                                                            and s.num_responses in (2, 8))]  # fmt: skip
