"""What the training-step benchmark trains, and on what: models, groups, and the variants to compare."""

from dataclasses import dataclass, replace

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


def training_shapes(model: str, quick: bool = False) -> list[TrainingShape]:
    """Pairs and groups of 4 at every length. A step of a large model is about 16,000 tokens of trees."""
    tokens = 16_384 if model != "small" else 2_600
    shapes = []
    for num_responses in (2, 4):
        for prefix in GRIDS:
            num_groups = max(1, tokens // (prefix + 300 * num_responses))
            shapes.append(TrainingShape(min(num_groups, 8), num_responses, prefix, 300))
    return [shapes[0], shapes[3]] if quick else shapes


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
        kernels: of attention, head, loss.
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
    fp8: str = "off"


PLAIN = Variant("plain", plain=True, fuse=False, kernels="eager")
PACKED = Variant("packed rows", share=False, image_once=False, prune=False, fuse=False, kernels="eager")


def main_variants(on_gpu: bool) -> list[Variant]:
    """(a) plain, (b) packed without sharing, (c) fastrm, and on a GPU (d) fastrm in FP8.

    On a CPU, layers are not compiled (the compiler takes longer than the benchmark), and FP8 is emulated
    and would show nothing.
    """
    fastrm = Variant("fastrm", compile=on_gpu, kernels="triton" if on_gpu else "auto")
    return [PLAIN, PACKED, fastrm, *([replace(fastrm, name="fastrm FP8", fp8="rowwise")] if on_gpu else [])]


def leave_one_out(on_gpu: bool) -> list[Variant]:
    """fastrm with one feature taken out at a time."""
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
            replace(fastrm, name="without Triton kernels", kernels="eager"),
        ]
    return variants
