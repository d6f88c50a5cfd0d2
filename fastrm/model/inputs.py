"""What the network needs of a pack besides its tensors, computed from Python integers.

It is a pure function of the pack and of the model's shape, and can run in a data worker: the training
process then only moves it to the device.
"""

from dataclasses import dataclass

import torch

from fastrm.data.packing import Pack
from fastrm.model.vision import VisionPlan, VisionShape
from fastrm_kernels import TreeLayout


@dataclass(frozen=True)
class PackLayouts:
    """Layouts of one pack.

    Attributes:
        tree: of all its tokens.
        anchors: of queries at the anchors, for the last layer.
        vision: order, positions and layouts of its patches; None without images.
    """

    tree: TreeLayout
    anchors: TreeLayout
    vision: VisionPlan | None

    def to(self, device) -> "PackLayouts":
        """The same with all index tensors on `device`."""
        vision = None if self.vision is None else self.vision.to(device)
        return PackLayouts(self.tree.to(device), self.anchors.to(device), vision)

    def pin_memory(self) -> "PackLayouts":
        """The same with all index tensors in page-locked memory."""
        vision = None if self.vision is None else self.vision.pin_memory()
        return PackLayouts(self.tree.pin_memory(), self.anchors.pin_memory(), vision)

    @property
    def trees(self) -> list[TreeLayout]:
        """All layouts that attention reads."""
        vision = () if self.vision is None else (self.vision.images, self.vision.windows)
        return [layout for layout in (self.tree, self.anchors, *vision) if layout is not None]


@dataclass(frozen=True)
class LayoutPlanner:
    """Makes the layouts of a pack; picklable, for the data workers.

    Attributes:
        vision: shape of the vision tower; None for a text model.
        triton: (dtype, head dimension of the language model, of the vision tower or 0), if the Triton
            kernels are going to run: their work lists are then made here too.
    """

    vision: VisionShape | None
    triton: tuple[torch.dtype, int, int] | None = None

    def __call__(self, pack: Pack) -> PackLayouts:
        tree = TreeLayout.build(pack.lengths, pack.parents)
        vision = VisionPlan.build(pack.image_grids, self.vision) if pack.image_grids else None
        layouts = PackLayouts(tree, tree.at_rows(pack.anchor_rows), vision)
        if self.triton is not None:
            dtype, head_dim, vision_head_dim = self.triton
            for layout in (layouts.tree, layouts.anchors):
                layout.prepare(dtype, head_dim)
            for layout in layouts.trees[2:]:
                layout.prepare(dtype, vision_head_dim, causal=False)
        return layouts
