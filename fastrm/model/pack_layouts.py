"""The layouts that the network needs of a pack besides its tensors, computed from Python integers.

They are a pure function of the pack and of the model's shape, and can be made in a data worker: the training
process then only moves them to the device.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fastrm.data.packing import Pack
from fastrm.model.pooling import MeanLayout
from fastrm.model.vision.tower import MediaLayout, MediaShape
from fastrm_kernels import TreeLayout
from fastrm_kernels.tree_attention.tiles import build_work_lists


@dataclass(frozen=True)
class PackLayouts:
    """The layouts of one pack.

    Attributes:
        tree: of all its tokens.
        anchors: of queries at the anchors, for the last layer; None where the head reads means.
        vision: order, positions and layouts of its patches; None without images.
        mean: how rows make the means of responses; None where the head reads anchors.
    """

    tree: TreeLayout
    anchors: TreeLayout | None
    vision: MediaLayout | None
    mean: MeanLayout | None = None

    def to(self, device) -> "PackLayouts":
        """Return the same layouts with all index tensors on `device`."""
        return self._with(lambda part: part.to(device))

    def pin_memory(self) -> "PackLayouts":
        """Return the same layouts with all index tensors in page-locked memory."""
        return self._with(lambda part: part.pin_memory())

    @property
    def of_language(self) -> list[TreeLayout]:
        """The layouts that the language model's attention reads."""
        return [layout for layout in (self.tree, self.anchors) if layout is not None]

    @property
    def of_vision(self) -> list[TreeLayout]:
        """The layouts that the vision tower's attention reads."""
        return [] if self.vision is None else self.vision.layouts

    @property
    def trees(self) -> list[TreeLayout]:
        """All layouts that attention reads."""
        return self.of_language + self.of_vision

    def _with(self, change: Callable) -> "PackLayouts":
        changed = {name: change(part) for name, part in vars(self).items() if part is not None}
        return replace(self, **changed)


@dataclass(frozen=True)
class LayoutBuilder:
    """A builder of packs' layouts; picklable, for the data workers.

    Attributes:
        vision: shape of the vision tower; None for a text model.
        triton: (dtype, head dimension of the language model, of the vision tower or 0), if the Triton
            kernels are going to run: their work lists are then made here too.
        pooling: anchor or mean, what the head reads.
    """

    vision: MediaShape | None
    triton: tuple[torch.dtype, int, int] | None = None
    pooling: str = "anchor"

    def __call__(self, pack: Pack) -> PackLayouts:
        tree = TreeLayout.build(pack.lengths, pack.parents)
        vision = self.vision.lay_out(pack.media_grids) if pack.media_grids else None
        if self.pooling == "mean":
            layouts = PackLayouts(tree, None, vision, MeanLayout.build(tree, pack.anchor_rows))
        else:
            layouts = PackLayouts(tree, tree.at_rows(pack.anchor_rows), vision)
        if self.triton is not None:
            dtype, head_dim, vision_head_dim = self.triton
            for layout in layouts.of_language:
                build_work_lists(layout, dtype, head_dim)
            for layout in layouts.of_vision:
                build_work_lists(layout, dtype, vision_head_dim, causal=False)
        return layouts
