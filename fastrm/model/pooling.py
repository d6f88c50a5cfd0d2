"""The mean of the final hidden states over a response's whole path, prompt and images included.

A linear head on it is the setting of InternLM-XComposer2.5-Reward (arXiv 2501.12368). Responses of a tree
share tokens, so each token is normed once and each piece of the row summed once; a response's mean is
made of the sums of its path's pieces. A piece is what all responses share wholly or not at all: a
segment, or a part of one where a response ends inside it.
"""

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from fastrm_kernels import TreeLayout


@dataclass(frozen=True)
class MeanLayout:
    """The weights by which the rows of a pack make the means of its R responses.

    Attributes:
        pieces: tokens of each of the C pieces, in row order; they cover the row.
        weights: (R, C) float32: 1 / tokens of the response's path for its pieces, 0 for the others.
    """

    pieces: tuple[int, ...]
    weights: torch.Tensor

    @staticmethod
    def build(tree: TreeLayout, anchor_rows: Sequence[int]) -> "MeanLayout":
        """Make the layout on the CPU for responses whose paths end at these rows.

        Args:
            tree: layout of the whole row.
        """
        paths = _paths(tree, anchor_rows)
        bounds = sorted({0, tree.num_keys, *(bound for path in paths for span in path for bound in span)})
        starts = torch.tensor(bounds[:-1])
        weights = torch.zeros(len(paths), len(starts))
        for weight, path in zip(weights, paths, strict=True):
            share = 1 / sum(stop - start for start, stop in path)
            for start, stop in path:
                weight[(starts >= start) & (starts < stop)] = share
        return MeanLayout(tuple(b - a for a, b in itertools.pairwise(bounds)), weights)

    def to(self, device) -> "MeanLayout":
        """Return the same layout with its tensor on `device`."""
        return replace(self, weights=self.weights.to(device, non_blocking=True))

    def pin_memory(self) -> "MeanLayout":
        """Return the same layout with its tensor in page-locked memory."""
        return replace(self, weights=self.weights.pin_memory())


def _paths(tree: TreeLayout, rows: Sequence[int]) -> list[tuple[tuple[int, int], ...]]:
    """Return the (start, stop) spans of rows that each of these rows sees: its path up to and including itself."""
    starts = tree.starts
    owners = [segment for segment, length in enumerate(tree.lengths) if length]
    firsts = [starts[segment] for segment in owners]
    paths = []
    for row in rows:
        *above, own = tree.paths[owners[bisect_right(firsts, row) - 1]]
        paths.append((*above, (own[0], row + 1)))
    return paths


def mean_of_paths(hidden: torch.Tensor, norm: nn.Module, layout: MeanLayout) -> torch.Tensor:
    """Compute means (R, D) of the normed states from states (T, D) after the last layer, in float32 or better.

    Every sum is of one response's path or of a part of it, so no response changes another's mean.

    Args:
        norm: the model's final RMSNorm.
    """
    # Like the head: float32, outside autocast, whatever the layers compute in.
    with torch.autocast(hidden.device.type, enabled=False):
        states = norm(hidden.to(torch.promote_types(hidden.dtype, torch.float32)))
        sums = torch.stack([piece.sum(0) for piece in states.split(layout.pieces)])  # (C, D)
        return layout.weights.to(sums.dtype) @ sums
