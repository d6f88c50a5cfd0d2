"""Encoded groups -> packs: one flat row of tokens each, with everything the model needs to read it.

    group 1: P1 C R      group 2: P2 A B       (P prompt; C, R, A, B responses)
    row:     [ P1 | C | R | P2 | A | B ]       segments; parents: P1 of C and R, P2 of A and B
    anchors:        ^   ^        ^   ^         last token of each response -> reward

Groups of one pack that begin with the same image share it (image -> question -> response).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fastrm.data.patches import Grid, PatchFormat
from fastrm.data.positions import mrope_positions
from fastrm.data.record import ImageRef, Preference
from fastrm.data.template import EncodedResponse
from fastrm.data.tree import Tree, build_tree


@dataclass(frozen=True)
class EncodedGroup:
    """One group ready to pack; its preferences carry their final weights."""

    id: str
    source: str
    origin: str
    responses: tuple[EncodedResponse, ...]
    preferences: tuple[Preference, ...] = ()

    @property
    def images(self) -> dict[str, ImageRef]:
        return {span.ref.key: span.ref for response in self.responses for span in response.images}

    @property
    def num_unshared_tokens(self) -> int:
        """Tokens of a plain pairwise trainer: both conversations of every preference, whole."""
        lengths = [len(response.tokens) for response in self.responses]
        return sum(lengths[p.winner] + lengths[p.loser] for p in self.preferences)

    def tree(self, share: bool = True) -> Tree:
        """The prefix tree of the group by itself."""
        numbers = {key: number for number, key in enumerate(self.images)}
        return build_tree([_content_keys(r, numbers) for r in self.responses], share)

    def num_tree_tokens(self, share: bool = True) -> int:
        """Tokens of the group's own tree: an upper bound of what it adds to a pack."""
        return sum(self.tree(share).lengths)


@dataclass(frozen=True)
class GroupInPack:
    """Where a group's results are in its pack."""

    id: str
    source: str
    origin: str
    responses: slice
    preferences: slice


@dataclass
class Pack:
    """One forward pass. T tokens, R responses, E preferences, S segments, I distinct images.

    Attributes:
        input_ids: (T,) int64.
        position_ids: (3, T) int64, M-RoPE; the three rows are equal for text.
        lengths, parents: of each segment, in row order.
        anchor_rows: row of each response's last token, as Python integers: layouts are built from them,
            and reading them back from a GPU would wait for all that it has been given to do.
        anchors: (R,) int64, the same.
        edges: (E, 2) int64 winner and loser; margin, weight: (E,) float32.
        is_tie: (E,) bool, edges that stand for a tie and do not count for accuracy.
        response_lengths: (R,) int64 tokens of each response's own text.
        patches: (patches, channels * patch * patch) uint8, or None without images.
        patch_format: how `pixel_values` come from them.
        image_grids: frames, rows and columns of each image's patches, as Python integers for the same reason.
        image_rows, image_features: (image tokens in the row,) int64: row, and number of its vision
            feature. An image that stands in two trees is encoded once and placed twice.
        groups: the groups, in order of their responses.
        num_unshared_tokens: what a plain pairwise trainer would process for the same preferences:
            both conversations of each, whole, without padding.
        num_padding_tokens: rows at the end that belong to no group and see only each other.
        prepared: what the model has made of the pack in a worker, with a method `to`.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    lengths: list[int]
    parents: list[int]
    anchor_rows: list[int]
    anchors: torch.Tensor
    edges: torch.Tensor
    margin: torch.Tensor
    weight: torch.Tensor
    is_tie: torch.Tensor
    response_lengths: torch.Tensor
    patches: torch.Tensor | None
    image_grids: list[Grid]
    image_rows: torch.Tensor | None
    image_features: torch.Tensor | None
    patch_format: PatchFormat | None = None
    groups: list[GroupInPack] = field(default_factory=list)
    num_unshared_tokens: int = 0
    num_padding_tokens: int = 0
    prepared: Any = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the groups, without padding."""
        return self.input_ids.shape[0] - self.num_padding_tokens

    @property
    def pixel_values(self) -> torch.Tensor | None:
        """(patches, channels * frames * patch * patch) float32 as of the stock processor, made anew at each call."""
        return None if self.patches is None else self.patch_format.normalize(self.patches)

    @property
    def num_preferences(self) -> int:
        return self.edges.shape[0]

    def to(self, device) -> "Pack":
        """The pack with its tensors on `device`; itself if they are there."""
        # "cuda" and "cuda:0" are unequal: ask where a tensor would land.
        if self.input_ids.device == torch.empty(0, device=device).device:
            return self
        moved = {name: value.to(device, non_blocking=True) for name, value in self._tensors().items()}
        return replace(self, **moved, prepared=None if self.prepared is None else self.prepared.to(device))

    def pin_memory(self) -> "Pack":
        """The pack with its tensors in page-locked memory, from which a GPU copies while it computes."""
        pinned = {name: value.pin_memory() for name, value in self._tensors().items()}
        return replace(self, **pinned, prepared=None if self.prepared is None else self.prepared.pin_memory())

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}


# Patches of an image, (N, channels * patch * patch) uint8, and its grid.
Pixels = dict[str, tuple[np.ndarray, Grid]]


def build_pack(
    groups: Sequence[EncodedGroup],
    pixels: Pixels,
    patch_format: PatchFormat | None = None,
    *,
    share: bool = True,
    multiple: int = 1,
) -> Pack:
    """Pack groups into one row.

    Args:
        groups: at least one, each with at least one response.
        pixels: by image key, for every image of the groups.
        patch_format: of the patches; needed where there are images.
        share: build prefix trees; False packs every response whole.
        multiple: the row is padded to a multiple of this many tokens, with a tree of its own that no
            response belongs to (FP8 products want 16).
    """
    responses = [response for group in groups for response in group.responses]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(k for g in groups for k in g.images))}
    owner = [number for number, group in enumerate(groups) for _ in group.responses]
    row = _Row(responses, numbers)
    for members in _families(groups, owner, share):
        row.add_tree(members, share)
    edges, margin, weight, is_tie, placed = _edges(groups)
    image = _image_tensors(row, responses, numbers, pixels, patch_format)
    padding = -row.num_tokens % multiple
    # Token 0, whatever it is: nothing reads these rows.
    input_ids = np.pad(row.gather(lambda r: responses[r].tokens), (0, padding))
    position_ids = np.concatenate(
        [row.gather(lambda r: row.positions[r]), np.tile(np.arange(padding), (3, 1))], axis=1, dtype=np.int64
    )
    return Pack(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        lengths=row.lengths + [padding] * (padding > 0),
        parents=row.parents + [-1] * (padding > 0),
        anchor_rows=row.anchors,
        anchors=torch.tensor(row.anchors, dtype=torch.int64),
        edges=edges,
        margin=margin,
        weight=weight,
        is_tie=is_tie,
        response_lengths=torch.tensor([r.num_response_tokens for r in responses], dtype=torch.int64),
        groups=placed,
        num_unshared_tokens=sum(group.num_unshared_tokens for group in groups),
        num_padding_tokens=padding,
        **image,
    )


class _Row:
    """The row of a pack while its trees are added."""

    def __init__(self, responses: list[EncodedResponse], image_numbers: dict[str, int]):
        self.keys = [_content_keys(response, image_numbers) for response in responses]
        self.positions = [
            mrope_positions(len(r.tokens), [(s.start, s.height, s.width) for s in r.images]) for r in responses
        ]
        self.spans: list[tuple[int, int, int]] = []  # (response, start, stop) of each segment
        self.parents: list[int] = []
        self.starts: list[int] = []
        self.num_tokens = 0
        self.anchors = [0] * len(responses)

    @property
    def lengths(self) -> list[int]:
        return [stop - start for _, start, stop in self.spans]

    def add_tree(self, members: list[int], share: bool) -> None:
        tree = build_tree([self.keys[m] for m in members], share)
        first = len(self.spans)
        for (sequence, start, stop), parent in zip(tree.spans, tree.parents, strict=True):
            self.spans.append((members[sequence], start, stop))
            self.parents.append(parent + first if parent >= 0 else -1)
            self.starts.append(self.num_tokens)
            self.num_tokens += stop - start
        for member, (segment, offset) in zip(members, tree.ends, strict=True):
            self.anchors[member] = self.starts[first + segment] + offset

    def gather(self, of_response) -> np.ndarray:
        """Concatenate the segments' parts of a per-response array, over its last axis."""
        return np.concatenate([of_response(r)[..., a:b] for r, a, b in self.spans], axis=-1)


def _content_keys(response: EncodedResponse, image_numbers: dict[str, int]) -> np.ndarray:
    """Tokens, with those of each image replaced by a number of its own: equal keys, equal content."""
    keys = response.tokens.copy()
    for span in response.images:
        keys[span.start : span.start + span.num_tokens] = -1 - image_numbers[span.ref.key]
    return keys


def _families(groups, owner, share) -> list[list[int]]:
    """Responses that may share a prefix: those of one group, and of groups with the same first image."""
    families: dict[object, list[int]] = {}
    for number, group in enumerate(owner):
        # By the group's image, not the response's: the responses of one group always share a tree.
        image = next(iter(groups[group].images), None) if share else None
        families.setdefault(group if image is None else image, []).append(number)
    return list(families.values())


def _edges(groups):
    """Edge tensors over the pack's responses, and where each group's parts are."""
    edges, margins, weights, ties, placed = [], [], [], [], []
    first = 0
    for group in groups:
        begin = len(edges)
        for p in group.preferences:
            edges.append((first + p.winner, first + p.loser))
            margins.append(p.margin)
            weights.append(p.weight)
            ties.append(p.tie)
        stop = first + len(group.responses)
        placed.append(GroupInPack(group.id, group.source, group.origin, slice(first, stop), slice(begin, len(edges))))
        first = stop
    return (
        torch.tensor(edges, dtype=torch.int64).view(-1, 2),
        torch.tensor(margins, dtype=torch.float32),
        torch.tensor(weights, dtype=torch.float32),
        torch.tensor(ties, dtype=torch.bool),
        placed,
    )


def _image_tensors(row, responses, numbers, pixels, patch_format) -> dict:
    if not numbers:
        return {"patches": None, "image_grids": [], "image_rows": None, "image_features": None}
    grids = [pixels[key][1] for key in numbers]
    counts = [frames * rows * columns // patch_format.merge**2 for frames, rows, columns in grids]
    offsets = dict(zip(numbers, itertools.accumulate([0, *counts]), strict=False))
    rows, features = [], []
    for (response, start, stop), row_start in zip(row.spans, row.starts, strict=True):
        for span in responses[response].images:
            # A cut can only fall inside an image if another image differs there; sizes then differ too.
            a, b = max(span.start, start), min(span.start + span.num_tokens, stop)
            if a < b:
                rows.append(np.arange(a, b) - start + row_start)
                features.append(np.arange(a, b) - span.start + offsets[span.ref.key])
    return {
        "patches": torch.from_numpy(np.concatenate([pixels[key][0] for key in numbers])),
        "patch_format": patch_format,
        "image_grids": grids,
        "image_rows": torch.from_numpy(np.concatenate(rows)),
        "image_features": torch.from_numpy(np.concatenate(features)),
    }
