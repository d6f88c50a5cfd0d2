"""The common part of all families' vision sides: from the patches of a pack to features of its image tokens.

A tower knows its stock modules, the shape from which the layout of a pack's images is made (in a data worker), the
function that evaluates one of its blocks, and what to do before and after the blocks. How blocks run (compiled,
recomputed in the backward pass) is decided by the runner, which passes `run`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from fastrm.data.media.format import Grid, PatchFormat
from fastrm.data_config import DataConfig
from fastrm.model.layers import Attention, AttentionShape, LayerKernels
from fastrm_kernels import TreeLayout

# (stock block, states, further arguments of the tower's block function) -> states
Run = Callable[..., torch.Tensor]


class MediaLayout(Protocol):
    """The order, positions and attention of a pack's patches, in integers made on the CPU."""

    @property
    def layouts(self) -> list[TreeLayout]:
        """All layouts that attention reads."""

    def to(self, device) -> "MediaLayout":
        """Return the same layout with its tensors on `device`."""

    def pin_memory(self) -> "MediaLayout":
        """Return the same layout with its tensors in page-locked memory."""


class MediaShape(Protocol):
    """The sizes of a config by which patches are laid out; picklable, for the data workers.

    Attributes:
        merge: side of the square of patches that makes one image token.
    """

    merge: int

    def lay_out(self, grids: Sequence[Grid]) -> MediaLayout:
        """Make the layout on the CPU for images with these grids, one after another in the row of patches."""


class MediaFeatures(NamedTuple):
    """The features of a pack's images and videos, each encoded once.

    Attributes:
        tokens: (image tokens, D), which take the place of the tokens' embeddings.
        deep: (image tokens, D) each, added to the tokens' states behind the first, second ... decoder layer.
    """

    tokens: torch.Tensor
    deep: tuple[torch.Tensor, ...] = ()


class VisionTower(ABC):
    """The vision side of one stock model. It holds no weights of its own.

    Attributes:
        module: the stock tower.
        projector: the stock module that makes image tokens of its states; inside the tower for Qwen.
        embedding: the stock module that multiplies pixels.
        blocks: the stock blocks, in order.
        shape: makes the layout of a pack's images from their grids: `shape.lay_out(grids)`.
        block: evaluates one block.
        kernels: how blocks compute; set by `set_kernels`.
    """

    module: nn.Module
    projector: nn.Module
    embedding: nn.Module
    blocks: nn.ModuleList
    shape: MediaShape
    block: Callable
    kernels: LayerKernels

    def set_kernels(self, impl: str, traced: bool, norm: Callable, gate: Callable) -> None:
        """Set the implementation of attention, RMSNorm and SwiGLU of all blocks; `traced` as of `Attention`."""
        attention = Attention(impl, self.heads(self.module.config), False, traced)
        self.kernels = LayerKernels(attention, self._rotation(), norm, gate)

    def parameters(self) -> set[nn.Parameter]:
        """Return the parameters of tower and projector."""
        return {*self.module.parameters(), *self.projector.parameters()}

    @staticmethod
    @abstractmethod
    def heads(vision_config) -> AttentionShape:
        """Return the heads of the blocks' attention."""

    @abstractmethod
    def features(self, pixel_values: torch.Tensor, layout, run: Run, dtype: Callable) -> MediaFeatures:
        """Return the features of all images of a pack.

        Args:
            pixel_values: (N, values of a patch) float.
            layout: of the images, on the same device.
            run: evaluates one block.
            dtype: (states) -> dtype in which their matrix products come out.
        """

    @property
    @abstractmethod
    def blank(self) -> tuple[Grid, int]:
        """The grid of the smallest image, and the values of a patch."""

    @property
    @abstractmethod
    def plain_patches(self) -> PatchFormat:
        """The format of a still image's patches, with values as they are."""

    @abstractmethod
    def largest_image(self, data: DataConfig) -> tuple[int, str]:
        """Return the tokens of the largest image that the data may hold, and the key that bounds it."""

    @abstractmethod
    def num_rows(self, num_tokens: int) -> int:
        """Return the rows that go through the blocks for an image of so many tokens."""

    @abstractmethod
    def num_attention_pairs(self, num_tokens: int) -> int:
        """Return the query-key pairs of such an image over all blocks; windows at its edge count as full ones."""

    @abstractmethod
    def grid_of(self, num_tokens: int) -> Grid:
        """Return the grid of an image of at most so many tokens, or of the smallest one."""

    def _rotation(self) -> Callable | None:
        return None


@dataclass(frozen=True)
class Passes:
    """The passes of a training step through a part of the model besides its forward pass.

    Attributes:
        trained: the part has gradients of its own.
        reached: something in it or before it is trained, so that gradients pass through it.
        repeated: its layers run again in the backward pass.
    """

    trained: bool
    reached: bool
    repeated: bool

    def matrices(self, num_parameters: int, last: int) -> int:
        """Return FLOPs per row of one layer; `last` of the parameters, its last product, are not repeated."""
        return 2 * (num_parameters * (1 + self.reached + self.trained) + (num_parameters - last) * self.repeated)

    def attention(self, width: int) -> int:
        """Return FLOPs of a query-key pair of one layer with queries of this width, all heads together."""
        return 4 * width * (1 + 2 * self.reached + self.repeated)


def plain_patches(side: int, merge: int, frames: int, channels: int) -> PatchFormat:
    """Return the format of patches whose values stay as they are."""
    return PatchFormat(side, merge, frames, 1.0, (0.0,) * channels, (1.0,) * channels)


def project_patches(projection: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Apply a tower's first convolution, whose stride is its kernel: (N, channels * frames * patch^2) -> (N, D)."""
    # Autocast rounds the pixels itself; rounding them to float16 weights first would round twice.
    if not torch.is_autocast_enabled(pixel_values.device.type):
        pixel_values = pixel_values.to(projection.weight.dtype)
    return F.linear(pixel_values, projection.weight.flatten(1), projection.bias)
