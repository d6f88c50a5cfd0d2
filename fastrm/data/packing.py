"""Packs of encoded groups: one flat row of tokens each, with everything the model needs to read it.

    group 1: P1 C R      group 2: P2 A B       (P prompt; C, R, A, B responses)
    row:     [ P1 | C | R | P2 | A | B ]       segments; parents: P1 of C and R, P2 of A and B
    anchors:        ^   ^        ^   ^         last token of each response -> reward

Groups of one pack that begin with the same image or video, a cluster, share it (image -> question -> response).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fastrm.data.media.format import Grid, Patches, PatchFormat
from fastrm.data.record import MediaRef, Preference, VideoRef
from fastrm.data.template import EncodedResponse, TurnLoss
from fastrm.data.tree import Tree, build_tree


@dataclass(frozen=True)
class EncodedGroup:
    """A group ready to pack; its preferences carry their final weights."""

    id: str
    source: str
    origin: str
    responses: tuple[EncodedResponse, ...]
    preferences: tuple[Preference, ...] = ()

    @property
    def media(self) -> dict[str, MediaRef]:
        """The distinct images and videos of the group by key, in order of first use."""
        return {span.ref.key: span.ref for response in self.responses for span in response.media}

    @property
    def num_unshared_tokens(self) -> int:
        """The tokens of a plain pairwise trainer: both conversations of every preference, or the rated one, whole."""
        lengths = [len(response.tokens) for response in self.responses]
        return sum(lengths[number] for p in self.preferences for number in p.responses)

    def tree(self, share: bool = True) -> Tree:
        """Return the prefix tree of the group by itself."""
        numbers = {key: number for number, key in enumerate(self.media)}
        return build_tree([_content_keys(r, numbers) for r in self.responses], share)


@dataclass(frozen=True)
class GroupInPack:
    """The places of a group's results in its pack."""

    id: str
    source: str
    origin: str
    responses: slice
    preferences: slice


@dataclass
class Pack:
    """The inputs of one forward pass: T tokens, R responses, E preferences, S segments, I distinct images and videos.

    Attributes:
        input_ids: (T,) int64.
        position_ids: (3, T) int64, of each token in its own conversation (M-RoPE; the three rows are equal for text,
            and always for InternVL): a segment goes on where its parent's conversation stands, not at the row's count.
        lengths, parents: of each segment, in row order.
        anchor_rows: row of each response's last token, as Python integers: layouts are built from them,
            and reading them back from a GPU would wait for all that it has been given to do.
        anchors: (R,) int64, the same.
        edges: (E, 2) int64 winner and loser; margin, weight: (E,) float32.
        is_tie: (E,) bool, edges that stand for a tie, or for a rating, and do not count for accuracy.
        response_lengths: (R,) int64 tokens of each response's own text.
        patches: (patches of all images, channels * side^2) uint8, or None without images.
        video_patches: (patches of all videos, channels * frames * side^2) uint8, or None without videos.
        patch_format: how `pixel_values` come from them.
        media_grids: frames, rows and columns of the patches of each image, then of each video, as Python
            integers for the same reason.
        media_rows, media_features: (media tokens in the row,) int64: row, and number of its vision
            feature. An image that stands in two trees is encoded once and placed twice.
        turn_rows, turn_targets: (N,) int64, of each token that a model learns to write: the row before it, and the
            token; None where it writes nothing. A critic learns no text of weight 0.
        turn_owners, turn_weights: (N,) int64 and float32, the response that each is of, and its weight in the loss.
        groups: the groups, in order of their responses.
        num_unshared_tokens: what a plain pairwise trainer would process for the same preferences:
            both conversations of each, whole, without padding.
        num_padding_tokens: rows at the end that belong to no group and see only each other.
        num_again: edges that show a preference once more (`Preference.again`).
        layouts: what the model has made of the pack in a worker, with a method `to`.
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
    video_patches: torch.Tensor | None
    media_grids: list[Grid]
    media_rows: torch.Tensor | None
    media_features: torch.Tensor | None
    patch_format: PatchFormat | None = None
    turn_rows: torch.Tensor | None = None
    turn_targets: torch.Tensor | None = None
    turn_owners: torch.Tensor | None = None
    turn_weights: torch.Tensor | None = None
    groups: list[GroupInPack] = field(default_factory=list)
    num_unshared_tokens: int = 0
    num_padding_tokens: int = 0
    num_again: int = 0
    layouts: Any = None

    @property
    def num_tokens(self) -> int:
        """The number of tokens of the groups, without padding."""
        return self.input_ids.shape[0] - self.num_padding_tokens

    @property
    def pixel_values(self) -> torch.Tensor | None:
        """Patches (all, channels * frames * side^2) float32 as of the stock processors, computed at each access."""
        values = [self.patch_format.normalize(p) for p in (self.patches, self.video_patches) if p is not None]
        return torch.cat(values) if len(values) > 1 else next(iter(values), None)

    @property
    def num_preferences(self) -> int:
        """The number of preferences that it is about: two texts of a judge, in both orders, are about one."""
        return self.edges.shape[0] - self.num_again

    def to(self, device) -> "Pack":
        """Return the pack with its tensors on `device`; itself if they are there."""
        # "cuda" and "cuda:0" are unequal: ask where a tensor would land.
        if self.input_ids.device == torch.empty(0, device=device).device:
            return self
        moved = {name: value.to(device, non_blocking=True) for name, value in self._tensors().items()}
        return replace(self, **moved, layouts=None if self.layouts is None else self.layouts.to(device))

    def pin_memory(self) -> "Pack":
        """Return the pack with its tensors in page-locked memory, from which a GPU copies while it computes."""
        pinned = {name: value.pin_memory() for name, value in self._tensors().items()}
        return replace(self, **pinned, layouts=None if self.layouts is None else self.layouts.pin_memory())

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}


Pixels = dict[str, Patches]  # by key of the image or video


def build_pack(
    groups: Sequence[EncodedGroup],
    pixels: Pixels,
    patch_format: PatchFormat | None = None,
    *,
    share: bool = True,
    multiple: int = 1,
    turns: TurnLoss | None = None,
) -> Pack:
    """Pack groups into one row.

    Args:
        groups: at least one, each with at least one response.
        pixels: for every image and video of the groups.
        patch_format: of the patches; needed where there are any.
        share: build prefix trees; False packs every response whole.
        multiple: the row is padded to a multiple of this many tokens, with a tree of its own that no
            response belongs to (FP8 products want 16).
        turns: how the tokens of the responses' turns weigh; None: they are not learnt.
    """
    responses = [response for group in groups for response in group.responses]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(k for g in groups for k in g.media))}
    owner = [number for number, group in enumerate(groups) for _ in group.responses]
    row = _Row(responses, numbers)
    for members in _clusters(groups, owner, share):
        row.add_tree(members, share)
    edges, margin, weight, is_tie, placed = _edges(groups)
    turn_fields = {"weight": weight} if turns is None else _turn_tensors(row, responses, edges, weight, turns)
    vision = _vision_tensors(row, responses, pixels, patch_format)
    padding = -row.num_tokens % multiple
    # Padding has token 0, whatever it is: nothing reads these rows.
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
        is_tie=is_tie,
        response_lengths=torch.tensor([r.num_response_tokens for r in responses], dtype=torch.int64),
        groups=placed,
        num_unshared_tokens=sum(group.num_unshared_tokens for group in groups),
        num_padding_tokens=padding,
        num_again=sum(p.again for group in groups for p in group.preferences),
        **vision,
        **turn_fields,
    )


class _Row:
    """The row of a pack while its trees are added."""

    def __init__(self, responses: list[EncodedResponse], media_numbers: dict[str, int]):
        self.keys = [_content_keys(response, media_numbers) for response in responses]
        self.positions = [
            np.tile(np.arange(len(r.tokens)), (3, 1)) if r.positions is None else r.positions for r in responses
        ]
        self.spans: list[tuple[int, int, int]] = []  # (response, start, stop) of each segment
        self.parents: list[int] = []
        self.starts: list[int] = []
        self.num_tokens = 0
        self.anchors = [0] * len(responses)
        self.last_segments = [0] * len(responses)

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
            self.last_segments[member] = first + segment

    def rows_of(self, member: int) -> np.ndarray:
        """Return the rows of the tokens of a response's path, of which its own are the first."""
        parts, segment = [], self.last_segments[member]
        while segment >= 0:
            _, first, stop = self.spans[segment]
            parts.append(np.arange(self.starts[segment], self.starts[segment] + stop - first))
            segment = self.parents[segment]
        return np.concatenate(parts[::-1])

    def gather(self, of_response) -> np.ndarray:
        """Concatenate the segments' parts of a per-response array, over its last axis."""
        return np.concatenate([of_response(r)[..., a:b] for r, a, b in self.spans], axis=-1)


def _content_keys(response: EncodedResponse, media_numbers: dict[str, int]) -> np.ndarray:
    """Return tokens, with those of each image or video replaced by its number: equal keys mean equal content."""
    keys = response.tokens.copy()
    for span in response.media:
        keys[span.start : span.stop] = -1 - media_numbers[span.ref.key]
    return keys


def _clusters(groups, owner, share) -> list[list[int]]:
    """Return responses that may share a prefix: those of one group, and of groups with the same first medium."""
    clusters: dict[object, list[int]] = {}
    for number, group in enumerate(owner):
        # The group's first medium counts, not the response's: the responses of one group always share a tree.
        first = next(iter(groups[group].media), None) if share else None
        clusters.setdefault(group if first is None else first, []).append(number)
    return list(clusters.values())


def _edges(groups):
    """Return edge tensors over the pack's responses, and the places of each group's parts."""
    edges, margins, weights, ties, placed = [], [], [], [], []
    first = 0
    for group in groups:
        begin = len(edges)
        for p in group.preferences:
            edges.append((first + p.winner, first + p.loser))
            margins.append(p.margin)
            weights.append(p.weight)
            ties.append(p.tie or p.is_rating)
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


def _turn_tensors(
    row: _Row, responses: list[EncodedResponse], edges: torch.Tensor, weight: torch.Tensor, turns: TurnLoss
) -> dict[str, torch.Tensor]:
    """Return the pack's fields for what a model learns to write; each token is predicted from the row before it.

    A text counts once for each preference that its response is in. With `turns.per_token` the preferences, which are
    then ratings, get the weight of their tokens. Without, texts of weight 0 are left out: their logits, which take most
    of the time of a short model, would be multiplied by it.
    """
    lengths = np.asarray([stop - start for start, stop in (response.turn for response in responses)])
    counts = np.zeros(len(responses))
    for place in (0, 1):
        others = edges[:, 0] != edges[:, 1] if place else slice(None)  # a rating is of one response
        np.add.at(counts, edges[others, place].numpy(), weight[others].double().numpy())
    each = turns.factor * counts / (1 if turns.per_token else np.maximum(lengths, 1))
    learnt = [number for number in range(len(responses)) if turns.per_token or each[number]]
    owners = np.repeat(np.asarray(learnt, dtype=np.int64), lengths[learnt])
    places = [(number, *responses[number].turn) for number in learnt]
    none = np.zeros(0, dtype=np.int64)  # a pack may have nothing to learn
    rows = [row.rows_of(number)[start - 1 : stop - 1] for number, start, stop in places]
    targets = [responses[number].tokens[start:stop] for number, start, stop in places]
    return {
        "weight": weight * torch.from_numpy(lengths)[edges[:, 0]] if turns.per_token else weight,
        "turn_rows": torch.from_numpy(np.concatenate([none, *rows])),
        "turn_targets": torch.from_numpy(np.concatenate([none, *targets])),
        "turn_owners": torch.from_numpy(owners),
        "turn_weights": torch.from_numpy(each[owners]).float(),
    }


def _vision_tensors(row, responses, pixels: Pixels, patch_format) -> dict:
    """Return the pack's fields for the vision tower: patches of images, then of videos, each medium once."""
    refs = {span.ref.key: span.ref for response in responses for span in response.media}
    stills = [key for key, ref in refs.items() if not isinstance(ref, VideoRef)]
    videos = [key for key, ref in refs.items() if isinstance(ref, VideoRef)]
    grids = [pixels[key].grid for key in stills + videos]
    fields = {
        "patches": _joined(stills, pixels), "video_patches": _joined(videos, pixels), "patch_format": patch_format,
        "media_grids": grids, "media_rows": None, "media_features": None,
    }  # fmt: skip
    if not refs:
        return fields
    counts = [frames * rows * columns // patch_format.merge**2 for frames, rows, columns in grids]
    first_feature = dict(zip(stills + videos, itertools.accumulate([0, *counts]), strict=False))
    rows, features = [], []
    for (response, start, stop), row_start in zip(row.spans, row.starts, strict=True):
        for span in responses[response].media:
            # A cut can only fall inside an image if another image differs there; sizes then differ too.
            a, b = max(span.start, start), min(span.stop, stop)
            if a < b:
                rows.append(np.arange(a, b) - start + row_start)
                features.append(np.arange(a, b) - span.start + span.first_token + first_feature[span.ref.key])
    fields["media_rows"] = torch.from_numpy(np.concatenate(rows))
    fields["media_features"] = torch.from_numpy(np.concatenate(features))
    return fields


def _joined(keys: list[str], pixels: Pixels) -> torch.Tensor | None:
    """Concatenate the patches of these media to (N, ...) uint8."""
    return torch.from_numpy(np.concatenate([pixels[key].values for key in keys])) if keys else None
