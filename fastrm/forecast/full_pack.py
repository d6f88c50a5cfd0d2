"""The pack that a forecast is made for: its sizes, from numbers alone, and its tensors, without data."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fastrm.config import Config
from fastrm.data.media.format import Grid
from fastrm.data.packing import Pack
from fastrm.forecast.workload import Workload
from fastrm.model.network import RewardNetwork
from fastrm.model.precision import token_multiple

FLOAT = 4  # bytes


@dataclass(frozen=True)
class PackShape:
    """The sizes of a pack.

    Attributes:
        lengths, parents: of its segments, in row order.
        anchor_rows: row of each response's last token.
        grids: of its images.
        num_image_rows: tokens in the row that stand for images.
        num_learnt: tokens that a critic or judge learns to write; None: all of its responses.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    anchor_rows: tuple[int, ...]
    grids: tuple[Grid, ...] = ()
    num_image_rows: int = 0
    num_learnt: int | None = None

    @property
    def num_patches(self) -> int:
        """The number of patches of all images, before they are merged into tokens."""
        return sum(math.prod(grid) for grid in self.grids)

    @staticmethod
    def of_groups(
        groups: Sequence[tuple[int, Sequence[int]]], grid: Grid | None, merge: int, share: bool
    ) -> "PackShape":
        """Lay out groups of a prompt and its responses.

        Args:
            groups: tokens of the prompt, its image included, and of each response.
            grid: of each prompt's image; None without images.
            merge: side of the square of patches that makes a token.
            share: responses share their prompt; else each has a copy, but not of the pixels.
        """
        lengths: list[int] = []
        parents: list[int] = []
        anchors: list[int] = []
        placed = 0
        for prompt, responses in groups:
            root, start = len(lengths), sum(lengths)
            if share:
                lengths.append(prompt)
                parents.append(-1)
                start += prompt
            for response in responses:
                own = response if share else prompt + response
                lengths.append(own)
                parents.append(root if share else -1)
                start += own
                anchors.append(start - 1)
            placed += 1 if share else len(responses)
        if grid is None:
            return PackShape(tuple(lengths), tuple(parents), tuple(anchors))
        image_rows = placed * math.prod(grid) // merge**2
        return PackShape(tuple(lengths), tuple(parents), tuple(anchors), (grid,) * len(groups), image_rows)


def full_pack(config: Config, load: Workload, network: RewardNetwork) -> PackShape:
    """Return the sizes of a pack as large as it may be, of whole groups as in `load`.

    The tokens that are left over are text of the first prompt. A group that is larger than a pack is made smaller, with
    its image.
    """
    multiple = token_multiple(config.precision.fp8)
    budget = config.optim.tokens_per_pack // multiple * multiple
    share, tower = config.data.share_prefixes, network.tower
    copies, tails = 1 if share else load.tails, load.tails
    text, tail, image = load.prompt_text_tokens, load.tail_tokens, load.image_tokens
    size = copies * (image + text) + tails * tail
    scale = min(1.0, budget / size)
    tail, learnt = max(1, int(scale * tail)), int(scale * load.learnt_tokens)
    grid = tower.grid_of(int(scale * image)) if image else None
    merge = 1 if tower is None else tower.shape.merge
    image = 0 if grid is None else math.prod(grid) // merge**2
    prompt = image + max(1, int(scale * text))
    num_groups = max(1, budget // (copies * prompt + tails * tail))
    spare = budget - num_groups * (copies * prompt + tails * tail)
    if spare < 0:  # of a group that cannot be made small enough
        spare %= multiple
    groups = [(prompt, (tail,) * tails)] * num_groups
    # Of an odd token too many for two copies, a response is made.
    groups[0] = (prompt + spare // copies, (tail,) * (tails - 1) + (tail + spare % copies,))
    return replace(PackShape.of_groups(groups, grid, merge, share), num_learnt=num_groups * tails * learnt)


def pixel_bytes(network: RewardNetwork, shape: PackShape) -> int:
    """Return the bytes of a pack's images as the vision tower takes them, in float32."""
    return FLOAT * shape.num_patches * network.tower.blank[1] if shape.grids else 0


def make_pack(shape: PackShape, network: RewardNetwork) -> Pack:
    """Return a pack of these sizes whose tensors nothing has written to; call it where tensors have no data."""
    num_tokens, num_responses = sum(shape.lengths), len(shape.anchor_rows)
    num_edges = num_responses // 2
    pixels = {}
    if shape.grids:
        form = network.tower.plain_patches
        pixels = {
            "patches": torch.empty(shape.num_patches, len(form.mean) * form.side**2, dtype=torch.uint8),
            "media_rows": torch.empty(shape.num_image_rows, dtype=torch.int64),
            "media_features": torch.empty(shape.num_image_rows, dtype=torch.int64),
            "patch_format": form,
        }
    turns = {}
    if network.paradigm != "reward":
        own = sum(length for length, parent in zip(shape.lengths, shape.parents, strict=True) if parent >= 0)
        num_learnt = (own or num_tokens) if shape.num_learnt is None else shape.num_learnt
        rows, weights = torch.empty(num_learnt, dtype=torch.int64), torch.empty(num_learnt)
        turns = {"turn_rows": rows, "turn_targets": rows, "turn_owners": rows, "turn_weights": weights}
    return Pack(
        input_ids=torch.empty(num_tokens, dtype=torch.int64),
        position_ids=torch.empty(3, num_tokens, dtype=torch.int64),
        lengths=list(shape.lengths),
        parents=list(shape.parents),
        anchor_rows=list(shape.anchor_rows),
        anchors=torch.empty(num_responses, dtype=torch.int64),
        edges=torch.empty(num_edges, 2, dtype=torch.int64),
        margin=torch.empty(num_edges),
        weight=torch.empty(num_edges),
        is_tie=torch.empty(num_edges, dtype=torch.bool),
        response_lengths=torch.empty(num_responses, dtype=torch.int64),
        media_grids=list(shape.grids),
        **{"patches": None, "video_patches": None, "media_rows": None, "media_features": None, **pixels, **turns},
    )
