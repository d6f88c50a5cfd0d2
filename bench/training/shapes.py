"""The models, groups and variants of the training-step benchmark."""

import importlib.util
from dataclasses import dataclass, replace

MODELS = ("small", "3B", "7B")
RESPONSE_TOKENS = 300
# Merged patches of the image, height and width, by prefix length: most of a long prefix is image. 840 x 1120,
# 560 x 728 and 392 x 392 pixels, of the range of the photographs and charts in ../shared/data.
GRIDS = {1300: (30, 40), 640: (20, 26), 300: (14, 14)}


@dataclass(frozen=True)
class TrainingShape:
    """One step: groups with all their pairs, and tokens of each part."""

    num_groups: int
    num_responses: int
    prefix_tokens: int
    response_tokens: int

    @property
    def name(self) -> str:
        kind = "pairs" if self.num_responses == 2 else f"groups of {self.num_responses}"
        return f"{kind}, {self.prefix_tokens}/{self.response_tokens}"

    @property
    def grid(self) -> tuple[int, int]:
        return GRIDS[self.prefix_tokens]

    @property
    def num_pairs(self) -> int:
        return self.num_groups * self.num_responses * (self.num_responses - 1) // 2

    @property
    def useful_tokens(self) -> int:
        """Tokens that a pairwise trainer has to see for these preferences, without padding."""
        return self.num_pairs * 2 * (self.prefix_tokens + self.response_tokens)

    @property
    def tree_tokens(self) -> int:
        """Tokens where a prompt is shared by its responses."""
        return self.num_groups * (self.prefix_tokens + self.num_responses * self.response_tokens)


def training_shapes(model: str, quick: bool = False) -> list[TrainingShape]:
    """Return pairs and groups of 4 at every length; first the two that goals are about.

    A step of a large model is at most 16,384 tokens of trees (a pack of the recipe for one GPU is twice
    that), and 60,000 of the pairwise rows, of which groups of 4 have eight times as many.
    """
    shapes = []
    for prefix, num_responses in [(1300, 2), (1300, 4), (640, 2), (640, 4), (300, 2), (300, 4)]:
        one = TrainingShape(1, num_responses, prefix, RESPONSE_TOKENS)
        if model == "small":
            num_groups = max(1, 2_600 // one.tree_tokens)
        else:
            num_groups = min(16_384 // one.tree_tokens, 60_000 // one.useful_tokens)
        shapes.append(replace(one, num_groups=num_groups))
    return shapes[:2] if quick else shapes


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        name: of it, as in the tables.
        plain: rows padded to one length, each with its own image, through the stock model.
        share: prompts are shared by their responses; else each is packed whole.
        image_once: the vision tower sees each image once, not once for every row of every pair.
        prune: the last layer computes keys and values only, but for the anchors.
        fuse, compile: fused projections, compiled layers.
        kernels: of head and loss, and of RMSNorm and SwiGLU where layers are not compiled.
        attention: its backend; auto follows `kernels`.
        fp8: recipe, or off.
    """

    name: str
    plain: bool = False
    share: bool = True
    image_once: bool = True
    prune: bool = True
    fuse: bool = True
    compile: bool = False
    kernels: str = "auto"
    attention: str = "auto"
    fp8: str = "off"


PLAIN = Variant("plain", plain=True, fuse=False, kernels="eager")
PACKED = Variant("packed rows", share=False, image_once=False, prune=False, fuse=False, kernels="eager")


def main_variants(on_gpu: bool) -> list[Variant]:
    """Return (a) plain, (b) packed without sharing, (c) fastrm, and on a GPU (d) fastrm in FP8.

    On a CPU, layers are not compiled (the compiler takes longer than the benchmark), and FP8 is emulated
    and would show nothing.
    """
    kernels = "triton" if on_gpu else "auto"
    fastrm = Variant("fastrm", compile=on_gpu, kernels=kernels, attention=kernels)
    return [PLAIN, PACKED, fastrm, *([replace(fastrm, name="fastrm FP8", fp8="rowwise")] if on_gpu else [])]


def leave_one_out(on_gpu: bool) -> list[Variant]:
    """Return variants of fastrm, each with one feature taken out."""
    fastrm = main_variants(on_gpu)[2]
    variants = [
        replace(fastrm, name="without sharing", share=False),
        replace(fastrm, name="without vision once", image_once=False),
        replace(fastrm, name="without last-layer pruning", prune=False),
        replace(fastrm, name="without fused projections", fuse=False),
    ]
    if on_gpu:
        variants += [
            replace(fastrm, name="without compiled layers", compile=False),
            replace(fastrm, name="without Triton attention", attention="flash"),
            replace(fastrm, name="without fused head", kernels="eager"),
        ]
    return variants


def alternatives(on_gpu: bool) -> list[Variant]:
    """Return variants of fastrm with another implementation of a part; none on a CPU, where none of them runs."""
    if not on_gpu:
        return []
    fastrm = main_variants(on_gpu)[2]
    found = [
        replace(fastrm, name="fastrm FP8", fp8="rowwise"),
        replace(fastrm, name="fastrm FP8 tensorwise", fp8="tensorwise"),
        replace(fastrm, name="fastrm, varlen attention", attention="flash"),
    ]
    # Versions 2 and 4 of the package have one name, version 3 another.
    if any(importlib.util.find_spec(name) is not None for name in ("flash_attn", "flash_attn_interface")):
        found.append(replace(fastrm, name="fastrm, flash-attn", attention="flash_attn"))
    return found
