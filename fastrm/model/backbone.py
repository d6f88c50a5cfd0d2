"""Stock transformers models, driven directly: no LM head, no mask, no cache, a pruned last layer.

`BackboneRunner` calls the modules of a stock model in the order of its own forward, with two
differences that are exact for a reward model: attention follows the prefix tree, and where the head reads
the anchor tokens alone, the last decoder layer computes queries, output projection and MLP only for
them, because nothing else of it is read.
"""

import functools
import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastrm.data.packing import Pack
from fastrm.errors import ConfigError
from fastrm.model.compiled import mark_dynamic, own_copy
from fastrm.model.families import check_family, has_axes, make_tower
from fastrm.model.layers import (
    Attention,
    AttentionShape,
    LayerKernels,
    decoder_layer,
    keep_alive,
    last_decoder_layer,
    rotation,
    stock_gate,
    stock_norm,
)
from fastrm.model.pooling import MeanLayout, mean_of_paths
from fastrm.model.text import longest_path, path_limit_key
from fastrm.model.vision.tower import MediaFeatures, MediaLayout, MediaShape
from fastrm_kernels import TreeLayout
from fastrm_kernels.tree_attention.tiles import build_work_lists

# Activation checkpointing: the parts of a layer that its backward pass computes again instead of keeping. none keeps
# all; full keeps a layer's input and runs the layer again; selective keeps the results of matrix products and
# attention, which are dear to compute, and runs norms, activations, rotary embeddings and casts again, which are dear
# to keep: about half of a layer's activations for a few per cent of its time.
CHECKPOINTING = ("none", "selective", "full")


@dataclass(frozen=True)
class PackLayouts:
    """The layouts that the network needs of one pack besides its tensors, computed from Python integers.

    They are a pure function of the pack and of the model's shape, and can be made in a data worker: the training
    process then only moves them to the device.

    Attributes:
        tree: of all its tokens.
        anchors: of queries at the anchors, for the last layer; None where states of other tokens are read too.
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
        pooling: anchor or mean, what the head reads; all: the states of all tokens are read.
    """

    vision: MediaShape | None
    triton: tuple[torch.dtype, int, int] | None = None
    pooling: str = "anchor"

    def __call__(self, pack: Pack) -> PackLayouts:
        tree = TreeLayout.build(pack.lengths, pack.parents)
        vision = self.vision.lay_out(pack.media_grids) if pack.media_grids else None
        if self.pooling == "mean":
            layouts = PackLayouts(tree, None, vision, MeanLayout.build(tree, pack.anchor_rows))
        elif self.pooling == "all":
            layouts = PackLayouts(tree, None, vision)
        else:
            layouts = PackLayouts(tree, tree.at_rows(pack.anchor_rows), vision)
        if self.triton is not None:
            dtype, head_dim, vision_head_dim = self.triton
            for layout in layouts.of_language:
                build_work_lists(layout, dtype, head_dim)
            for layout in layouts.of_vision:
                build_work_lists(layout, dtype, vision_head_dim, causal=False)
        return layouts


class BackboneRunner:
    """A runner of a stock model on packs. It holds no weights; `model` is a transformers base model.

    Attributes:
        language: its language model.
        tower: its vision side; None for a text model.
        checkpointing: one of CHECKPOINTING.
        always_run_tower: run the vision tower also for packs without images. ZeRO needs every rank to run the
            same modules: else ranks would wait for each other's parameters or gradients for ever.
        compiled: layers run as graphs of torch.compile.
        pooling: anchor, mean or all, which of `anchor_states`, `mean_states` and `all_states` layouts are made for.
        watch: called for each whole decoder layer and each vision block in place of running it, as
            watch(run, layer, hidden, arguments) -> hidden, where run() runs it; None: nobody watches.
    """

    def __init__(self, model: nn.Module, pooling: str = "anchor"):
        check_family(model.config)
        self.model = model
        self.pooling = pooling
        self.tower = make_tower(model)
        self.language = model if self.tower is None else model.language_model
        self.checkpointing = "none"
        self.always_run_tower = False
        self.compiled = False
        self.watch: Callable | None = None
        self._longest_path, self._has_axes = longest_path(model.config), has_axes(model.config)
        self._blank: MediaLayout | None = None
        self._layer: Callable = decoder_layer
        self._shape = None if self.tower is None else self.tower.shape
        self._block: Callable | None = None if self.tower is None else self.tower.block
        self.set_kernels("eager")

    def set_kernels(
        self, impl: str, norm: Callable = stock_norm, gate: Callable = stock_gate, traced: bool = False
    ) -> None:
        """Set the implementation of attention, RMSNorm and SwiGLU of all layers.

        Args:
            traced: as of `Attention`; compiled layers are traced in any case.
        """
        text, traced = self.model.config.get_text_config(), traced or self.compiled
        attention = Attention(impl, AttentionShape.of_language(text), True, traced)
        rotate = rotation(self.language.layers[0].self_attn)
        self._kernels = LayerKernels(attention, rotate, norm, gate)
        if self.tower is not None:
            self.tower.set_kernels(impl, traced, norm, gate)

    def compile(self, backend) -> None:
        """Run decoder layers and vision blocks as graphs of torch.compile, each for any number of tokens.

        Args:
            backend: as torch.compile takes it.
        """
        self.compiled = True
        # Whole graphs or an error: a break in silence would be the slow path in disguise. `dynamic` is not
        # set, because it would make inputs of the constants too; `mark_dynamic` names what changes.
        options = {"backend": backend, "fullgraph": True}
        self._layer = torch.compile(own_copy(decoder_layer), **options)
        if self.tower is not None:
            self._block = torch.compile(own_copy(self.tower.block), **options)
        self._set_kernels_again()

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Run the layers themselves and not their graphs, until the block ends."""
        if not self.compiled:
            yield
            return
        kept = self.compiled, self._layer, self._block
        self.compiled, self._layer = False, decoder_layer
        self._block = None if self.tower is None else self.tower.block
        self._set_kernels_again()
        try:
            yield
        finally:
            self.compiled, self._layer, self._block = kept
            self._set_kernels_again()

    def _set_kernels_again(self) -> None:
        self.set_kernels(self._kernels.attention.impl, self._kernels.norm, self._kernels.gate)

    def layout_builder(self, dtype: torch.dtype) -> LayoutBuilder:
        """Return the builder of packs' layouts, which can run anywhere; `dtype` is that of attention's inputs."""
        triton = None
        if self._kernels.attention.impl == "triton":
            vision = self.tower.kernels.attention.shape.head_dim if self.tower is not None else 0
            triton = (dtype, self._kernels.attention.shape.head_dim, vision)
        return LayoutBuilder(self._shape, triton, self.pooling)

    def anchor_states(self, pack: Pack) -> torch.Tensor:
        """Return hidden states (R, D) of the anchors after the last layer, before the final norm."""
        layouts = self._layouts(pack)
        *layers, last = self.language.layers
        hidden, cos, sin = self._run_layers(layers, pack, layouts)
        hidden = self._last_layer(last, hidden, cos, sin, pack.anchors, layouts)
        return keep_alive(hidden, layouts.trees) if self.compiled else hidden

    def mean_states(self, pack: Pack) -> torch.Tensor:
        """Return means (R, D) over all tokens of each response's path, after the final norm, of whole layers."""
        layouts = self._layouts(pack)
        hidden, _, _ = self._run_layers(self.language.layers, pack, layouts)
        norm = self.language.norm
        means = call_checkpointed(self.checkpointing, False, mean_of_paths, hidden, norm, layouts.mean)
        return keep_alive(means, layouts.trees) if self.compiled else means

    def all_states(self, pack: Pack) -> torch.Tensor:
        """Return hidden states (T, D) of all tokens after the last layer, before the final norm."""
        layouts = self._layouts(pack)
        hidden, _, _ = self._run_layers(self.language.layers, pack, layouts)
        return keep_alive(hidden, layouts.trees) if self.compiled else hidden

    def _layouts(self, pack: Pack) -> PackLayouts:
        layouts = pack.layouts
        if layouts is None:
            layouts = LayoutBuilder(self._shape, pooling=self.pooling)(pack)
        limit, longest = self._longest_path, max(layouts.tree.key_lengths)
        if limit is not None and longest > limit:
            raise ConfigError(
                f"a response of {longest:,} tokens with its prompt: {self.model.config.model_type} with "
                f"{path_limit_key(self.model.config)} is exact up to {limit:,}; lower data.max_tokens_per_group, or "
                "tokens_per_pack when scoring"
            )
        return layouts.to(pack.input_ids.device)

    def _run_layers(self, layers: Iterable[nn.Module], pack: Pack, layouts: PackLayouts):
        """Return states (T, D) after whole layers, and cos and sin (T, K) of the rotary embedding."""
        hidden, deep = self._embed(pack, layouts)  # (T, D)
        # M-RoPE models read all three rows of positions, others one.
        position_ids = pack.position_ids[:, None] if self._has_axes else pack.position_ids[:1]
        cos, sin = self._rotary(hidden, position_ids)
        arguments = self._kernels.attention.arguments(layouts.tree, _product_dtype(hidden))
        if self.compiled:
            mark_dynamic(cos, sin, arguments)
        for number, layer in enumerate(layers):
            hidden = self._run(self._layer, layer, hidden, cos, sin, arguments, self._kernels)
            if number < len(deep):
                features = deep[number].index_select(0, pack.media_features).to(hidden.dtype)
                hidden = hidden.index_add(0, pack.media_rows, features)
        return hidden, cos, sin

    def _rotary(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin (T, K) of the rotary embedding."""
        rotary = self.language.rotary_emb
        # The decorators are left out: they look for the largest position, and so wait for a GPU.
        with torch.no_grad():
            cos, sin = inspect.unwrap(type(rotary).forward)(rotary, hidden, position_ids)
        return cos[0], sin[0]

    def _last_layer(self, layer: nn.Module, hidden, cos, sin, anchors, layouts: PackLayouts) -> torch.Tensor:
        """Run the last layer, (T, D) -> (R, D). It is never compiled: that would be a graph for one layer of many."""
        arguments = self._kernels.attention.arguments(layouts.anchors, _product_dtype(hidden))
        return call_checkpointed(
            self.checkpointing, False, last_decoder_layer, layer, hidden, cos, sin, anchors, arguments, self._kernels
        )

    def _run(self, function: Callable, layer: nn.Module, hidden: torch.Tensor, *arguments) -> torch.Tensor:
        if self.compiled:
            mark_dynamic(hidden)
        run = functools.partial(
            call_checkpointed, self.checkpointing, self.compiled, function, layer, hidden, *arguments
        )
        return run() if self.watch is None else self.watch(run, layer, hidden, arguments)

    def _embed(self, pack: Pack, layouts: PackLayouts) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return the input (T, D) of the first layer, and what is added to media tokens behind the first layers."""
        embeddings = self.language.embed_tokens(pack.input_ids)  # (T, D)
        if layouts.vision is not None:
            found = self.media_features(pack.pixel_values, layouts.vision)
            features = found.tokens.index_select(0, pack.media_features).to(embeddings.dtype)
            return embeddings.index_copy(0, pack.media_rows, features), found.deep
        if self.always_run_tower:
            return embeddings + 0 * self._run_tower_on_blank(embeddings).to(embeddings.dtype), ()
        return embeddings, ()

    def media_features(self, pixel_values: torch.Tensor, layout: MediaLayout) -> MediaFeatures:
        """Return the features of all images and videos of a pack, each encoded once.

        Args:
            pixel_values: (N, channels * frames * patch^2) float.
            layout: of the images, on the same device.
        """
        return self.tower.features(pixel_values, layout, functools.partial(self._run, self._block), _product_dtype)

    def _run_tower_on_blank(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the sum () of the features of the smallest image, a blank one."""
        grid, values = self.tower.blank
        if self._blank is None or self._blank.layouts[0].device != embeddings.device:
            # Kept: compiled attention knows layouts by number, and needs them until the backward pass is done.
            self._blank = self.tower.shape.lay_out([grid]).to(embeddings.device)
        found = self.media_features(embeddings.new_zeros(math.prod(grid), values), self._blank)
        return sum((features.sum() for features in found.deep), found.tokens.sum())


def _product_dtype(states: torch.Tensor) -> torch.dtype:
    """Return the dtype in which matrix products of these states come out."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def call_checkpointed(mode: str, compiled: bool, layer: Callable, *arguments):
    """Return layer(*arguments), recomputed in the backward pass as `mode` says.

    Args:
        compiled: the layer is a torch.compile graph, which itself decides what selective recomputes
            (`CompiledGraphs.recompute`).
    """
    if mode == "none" or (mode == "selective" and compiled) or not torch.is_grad_enabled():
        return layer(*arguments)
    # Only dropout of adapters draws random numbers; saving the generator's state would read it back from a GPU.
    draws_random = getattr(arguments[0], "draws_random", False)
    options = {"use_reentrant": False, "preserve_rng_state": draws_random}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_products)
    return checkpoint(layer, *arguments, **options)


def _keep_products(context, operator, *_, **__) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _products() else CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def _products() -> frozenset:
    """Return the overloads of matrix products and of every implementation of attention that is loaded."""
    packets = [
        getattr(torch.ops.aten, name, None)
        for name in (
            "mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_attention_math",
        )
    ]  # fmt: skip
    packets += [torch.ops.fastrm.tree_attention, torch.ops.fastrm.tree_attention_eager, torch.ops.fastrm.flash_attn]
    importlib.import_module("torch.nn.attention.varlen")  # registers its operator
    packets.append(torch.ops.torch_attn._varlen_attn)
    return frozenset(
        getattr(packet, overload) for packet in packets if packet is not None for overload in packet.overloads()
    )
