"""The variants of the training step, as engines: they differ in how rewards are computed."""

import functools

import torch

from bench.training.plain import PlainEngine, collate, pairwise_rows, use_stock
from bench.training.shapes import TrainingShape, Variant
from bench.training.workloads import PATCHES, image_groups
from fastrm.config import Config
from fastrm.data.packing import Pack, build_pack
from fastrm.model.backbone import BackboneRunner
from fastrm.model.compiled import CompiledGraphs, mark_dynamic
from fastrm.model.fusion import fuse_projections, split_fused
from fastrm.model.network import RewardNetwork
from fastrm.model.vision.tower import MediaFeatures, MediaLayout
from fastrm.train.engine import LocalEngine
from fastrm.train.step_cost import make_cost_model


class CompiledLayers:
    """Compiled layers that networks with the same kind of layers use one after another: compiling takes long.

    Attributes:
        graphs: the count of them; None before the first network.
    """

    def __init__(self, backend: str = "inductor"):
        self._backend = backend
        self.graphs: CompiledGraphs | None = None

    def lend(self, network: RewardNetwork) -> None:
        """Compile the network's layers like `network.compile_layers()`, but reuse what is already compiled."""
        runner = network._runner
        if self.graphs is None:
            self.graphs = network.compile_layers(self._backend)
            self._functions = runner._layer, runner._block
        else:
            network.graphs, runner.compiled = self.graphs, True
            runner._layer, runner._block = self._functions


class TrainingStep:
    """A variant on one workload: forward, backward, clipping and update, one pack a step.

    Args:
        network: with its weights; it is changed to what the variant wants and must not be used by another.
        config: of the run.
        compiled: what compiles the layers, if the variant does.

    Attributes:
        flops: that the step needs, see `count_flops`.
        graphs: the count of compiled graphs, of all networks that share them; None without.
    """

    def __init__(
        self, variant: Variant, network: RewardNetwork, config: Config, shape: TrainingShape, compiled: CompiledLayers
    ):
        self.variant, self.name, self.shape = variant, variant.name, shape
        engine = PlainEngine if variant.plain else LocalEngine
        if variant.plain:
            use_stock(network, config)
        else:
            _switch(network, variant, config, compiled)
            _take_out(network, variant, shape)
        self.engine = engine(network, config)
        self.graphs = compiled.graphs if variant.compile else None
        self.flops = count_flops(network.model.config, config, shape, variant)
        pack = make_pack(shape, variant)
        pack.layouts = None if variant.plain else network.lay_out(pack)
        self.pack = pack.to(network.device)
        self._num_steps = 0

    @property
    def checkpointing(self) -> str:
        """The mode of recomputation in the backward pass: none, selective or full."""
        return self.engine.config.model.activation_checkpointing

    def step(self, number: int) -> None:
        """Run one training step."""
        self.engine.accumulate(self.pack)
        self.update()

    def update(self) -> None:
        """Apply the gradient that has been accumulated."""
        update = self.engine.update(self.engine.config.optim.lr, self._num_steps)
        self._num_steps += 1
        assert update.finite, f"{self.name}: loss {update.loss}, gradient norm {update.grad_norm}"

    def gradients(self, number: int) -> tuple[float, dict[str, torch.Tensor]]:
        """Return the mean loss and its gradients by stock name; change no weight."""
        total, _ = self.engine.loss_and_rewards(self.pack)
        loss = total / self.pack.weight.sum()
        loss.backward()
        network = self.engine.network
        found = {
            stock: piece.clone()
            for name, p in network.named_parameters()
            if p.grad is not None
            for stock, piece in split_fused(network, name, p.grad)
        }
        self.engine.discard()
        return float(loss.detach()), found

    def num_tokens(self, number: int) -> int:
        """Return the number of rows that the language model processes, padding included."""
        if self.variant.plain:
            return self.pack.padded_ids.numel()
        return self.pack.input_ids.shape[0]


def _switch(network: RewardNetwork, variant: Variant, config: Config, compiled: CompiledLayers) -> None:
    """Set the options that fastrm has, in the order of `fastrm train`."""
    if variant.fuse:
        network.fuse_projections()
    if variant.fp8 != "off":
        from fastrm.model.precision import convert_to_fp8

        network.fp8 = convert_to_fp8(network, variant.fp8)
    if variant.compile:
        compiled.lend(network)
    dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
    network.set_kernels(dtype, kernels=variant.kernels, attention=variant.attention)
    network.use_activation_checkpointing(config.model.activation_checkpointing)


def _take_out(network: RewardNetwork, variant: Variant, shape: TrainingShape) -> None:
    """Replace parts of the runner by ones that lack what the variant lacks; fastrm has no such options."""
    runner = network._runner
    if not variant.prune:
        if variant.fuse:
            # The last of the given layers keeps q, k and v apart, for pruning; here it has to be like the others.
            fuse_projections([*runner.language.layers, runner.language.layers[-1]])
        runner._last_layer = _WholeLastLayer(runner)
    if not variant.image_once and variant.share:
        runner.media_features = _SeenAgain(runner, copies=2 * shape.num_pairs // shape.num_groups)


class _WholeLastLayer:
    """A last layer that runs like the others, for every token, and then takes the anchors."""

    def __init__(self, runner: BackboneRunner):
        self._runner = runner

    def __call__(self, layer, hidden, cos, sin, anchors, layouts) -> torch.Tensor:
        runner = self._runner
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        arguments = runner._kernels.attention.arguments(layouts.tree, dtype)
        if runner.compiled:
            mark_dynamic(arguments)
        hidden = runner._run(runner._layer, layer, hidden, cos, sin, arguments, runner._kernels)
        return hidden.index_select(0, anchors)


class _SeenAgain:
    """A vision tower that runs once for each row of a pairwise trainer, though one result would serve all."""

    def __init__(self, runner: BackboneRunner, copies: int):
        self._encode, self.copies = runner.media_features, copies

    def __call__(self, pixel_values: torch.Tensor, layout: MediaLayout) -> MediaFeatures:
        # The mean of all copies, so that each has a backward pass as well.
        return MediaFeatures(sum(self._encode(pixel_values, layout).tokens for _ in range(self.copies)) / self.copies)


def count_flops(backbone_config, config: Config, shape: TrainingShape, variant: Variant) -> float:
    """Return FLOPs of the step's matrix products and attention, without recomputation and padding.

    By the formulas that balance ranks (fastrm/train/step_cost.py), which count the last layer as pruned; the
    rest of a whole last layer is left out here too, so that the share of the matmul rate is of useful work.
    """
    settings = config.model.model_copy(update={"activation_checkpointing": "none"})
    costs = make_cost_model(backbone_config, settings)
    groups, pixels = _content(shape, variant)
    trees = [group.tree(variant.share and not variant.plain) for group in groups]
    images = len(pixels) * costs.of_medium(*shape.grid)
    if variant.share and not variant.image_once:
        images *= 2 * shape.num_pairs // shape.num_groups
    return images + sum(
        costs.per_token * sum(tree.lengths) + costs.per_attention_pair * tree.num_attention_pairs for tree in trees
    )


def make_pack(shape: TrainingShape, variant: Variant) -> Pack:
    """Make the workload's pack as the variant packs it, on the CPU."""
    groups, pixels = _content(shape, variant)
    if not variant.plain:
        return build_pack(groups, pixels, PATCHES, share=variant.share, multiple=16 if variant.fp8 != "off" else 1)
    return collate(build_pack(groups, pixels, PATCHES, share=False), groups)


def _content(shape: TrainingShape, variant: Variant):
    """Return groups and pixels; for a variant that shares neither prompts nor images, those of its pairs."""
    groups, pixels = _groups(shape)
    if variant.plain or not (variant.share or variant.image_once):
        return pairwise_rows(groups, pixels)
    return groups, pixels


@functools.lru_cache(maxsize=2)
def _groups(shape: TrainingShape):
    return image_groups(shape.num_groups, shape.num_responses, shape.prefix_tokens, shape.response_tokens, shape.grid)
