"""Trees of segments, for the tests of tree attention."""

import torch

from fastrm_kernels import TreeLayout
from fastrm_kernels.tree_attention.tiles import Blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Blocks(16, 16, 16, 16, 4, 4, 1, 1, 1)


def tree(lengths, parents):
    return TreeLayout.build(lengths, parents, DEVICE)


def flat(lengths):
    return TreeLayout.from_lengths(lengths, DEVICE)


def shuffled_tree(rng):
    """Parents before children, but not depth first."""
    lengths = [rng.choice([0, 1, 2, 17, 33]) for _ in range(rng.randint(2, 12))]
    return lengths, [rng.randint(-1, segment - 1) for segment in range(len(lengths))]


def random_tree(rng, max_segments=40, max_depth=4):
    """Lengths and parents of segments in depth-first order."""
    lengths, parents, path = [], [], []
    for segment in range(rng.randint(1, max_segments)):
        while path and (len(path) >= max_depth or rng.random() < 0.45):
            path.pop()
        parents.append(path[-1] if path else -1)
        lengths.append(rng.choice([0, 1, 2, 3, 17, 40, rng.randint(1, 80)]))
        path.append(segment)
    return lengths, parents
