"""Stock transformers models, driven directly: no LM head, no mask, no cache, a pruned last layer.

`BackboneRunner` calls the modules of a stock model in the order of its own forward, with two
differences that are exact for a reward model: attention follows the prefix tree, and the last
decoder layer computes queries, output projection and MLP for the anchor tokens alone, because
nothing else of it is read.
"""

from collections.abc import Callable

import torch
from torch import nn

from fastrm.data.packing import Pack
from fastrm.errors import ConfigError
from fastrm.model import checkpointing
from fastrm.model.attention import Attention, AttentionShape, keep_alive
from fastrm.model.compiled import mark_dynamic, own_copy
from fastrm.model.inputs import LayoutPlanner, PackLayouts
from fastrm.model.layers import (
    LayerKernels,
    decoder_layer,
    last_decoder_layer,
    rotation,
    stock_gate,
    stock_norm,
    vision_block,
)
from fastrm.model.vision import VisionPlan, VisionShape, embed_patches, reorder, rotary

VISION_FAMILIES = ("qwen2_vl", "qwen2_5_vl")
TEXT_FAMILIES = ("qwen2", "qwen3", "llama")


def check_family(config) -> None:
    """Refuse model types whose forward is not known to match `BackboneRunner`.

    Raises:
        ConfigError: for another model type, or for sliding-window layers.
    """
    if config.model_type not in VISION_FAMILIES + TEXT_FAMILIES:
        raise ConfigError(
            f"model type {config.model_type!r} is not supported; wanted one of "
            f"{', '.join(VISION_FAMILIES + TEXT_FAMILIES)}"
        )
    text = config.get_text_config()
    if getattr(text, "attention_dropout", 0.0):
        raise ConfigError(f"{config.model_type}: attention_dropout is {text.attention_dropout}, only 0 is supported")
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        raise ConfigError(
            f"{config.model_type}: sliding-window layers are not supported; set use_sliding_window: false if the "
            "checkpoint was trained without"
        )


class BackboneRunner:
    """Runs a stock model on packs. Holds no weights; `model` is a transformers base model.

    Attributes:
        language, visual: its parts; `visual` is None for a text model.
        checkpointing: none, selective or full (checkpointing.py).
        always_see: run the vision tower also for packs without images. ZeRO needs every rank to run the
            same modules: else ranks would wait for each other's parameters or gradients for ever.
        compiled: layers run as graphs of torch.compile.
    """

    def __init__(self, model: nn.Module):
        check_family(model.config)
        self.model = model
        self.is_vision = model.config.model_type in VISION_FAMILIES
        self.language = model.language_model if self.is_vision else model
        self.visual = model.visual if self.is_vision else None
        self.vision_shape = VisionShape.of(model.config.vision_config) if self.is_vision else None
        self.checkpointing = "none"
        self.always_see = False
        self.compiled = False
        self._blank: VisionPlan | None = None
        self._layer: Callable = decoder_layer
        self._block: Callable = vision_block
        self.choose("eager")

    def choose(self, impl: str, norm: Callable = stock_norm, gate: Callable = stock_gate) -> None:
        """Set the implementation of attention, RMSNorm and SwiGLU of all layers."""
        text = self.model.config.get_text_config()
        attention = Attention(impl, AttentionShape.of_language(text), True, self.compiled)
        rotate = rotation(self.language.layers[0].self_attn)
        self._kernels = LayerKernels(attention, rotate, norm, gate)
        if self.is_vision:
            attention = Attention(impl, AttentionShape.of_vision(self.model.config.vision_config), False, self.compiled)
            self._vision_kernels = LayerKernels(attention, rotation(self.visual.blocks[0].attn), norm, gate)

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
        self._block = torch.compile(own_copy(vision_block), **options)
        self.choose(self._kernels.attention.impl, self._kernels.norm, self._kernels.gate)

    def planner(self, dtype: torch.dtype) -> LayoutPlanner:
        """Makes the layouts of packs, anywhere; `dtype` is that of the attention's inputs."""
        triton = None
        if self._kernels.attention.impl == "triton":
            vision = self._vision_kernels.attention.shape.head_dim if self.is_vision else 0
            triton = (dtype, self._kernels.attention.shape.head_dim, vision)
        return LayoutPlanner(self.vision_shape, triton)

    def anchor_states(self, pack: Pack) -> torch.Tensor:
        """Hidden states (R, D) of the anchors after the last layer, before the final norm."""
        layouts = pack.prepared if pack.prepared is not None else LayoutPlanner(self.vision_shape)(pack)
        layouts = layouts.to(pack.input_ids.device)
        hidden = self._embed(pack, layouts)  # (T, D)
        # Text models read one row of positions; M-RoPE models all three.
        position_ids = pack.position_ids[:, None] if self.is_vision else pack.position_ids[:1]
        cos, sin = (part[0] for part in self.language.rotary_emb(hidden, position_ids))  # (T, K)
        plan = self._kernels.attention.plan(layouts.tree, _product_dtype(hidden))
        if self.compiled:
            mark_dynamic(cos, sin, plan)
        *layers, last = self.language.layers
        for layer in layers:
            hidden = self._run(self._layer, layer, hidden, cos, sin, plan, self._kernels)
        hidden = self._last_layer(last, hidden, cos, sin, pack.anchors, layouts)
        return keep_alive(hidden, layouts.trees) if self.compiled else hidden

    def _last_layer(self, layer: nn.Module, hidden, cos, sin, anchors, layouts: PackLayouts) -> torch.Tensor:
        """(T, D) -> (R, D). Never compiled: that would be a graph of its own for one layer in many."""
        plan = self._kernels.attention.plan(layouts.anchors, _product_dtype(hidden))
        return checkpointing.run(
            self.checkpointing, False, last_decoder_layer, layer, hidden, cos, sin, anchors, plan, self._kernels
        )

    def _run(self, function: Callable, layer: nn.Module, hidden: torch.Tensor, *arguments) -> torch.Tensor:
        if self.compiled:
            mark_dynamic(hidden)
        return checkpointing.run(self.checkpointing, self.compiled, function, layer, hidden, *arguments)

    def _embed(self, pack: Pack, layouts: PackLayouts) -> torch.Tensor:
        embeddings = self.language.embed_tokens(pack.input_ids)  # (T, D)
        if layouts.vision is not None:
            features = self.image_features(pack.pixel_values, layouts.vision)
            features = features.index_select(0, pack.image_features).to(embeddings.dtype)
            return embeddings.index_copy(0, pack.image_rows, features)
        if self.always_see:
            return embeddings + 0 * self._see_nothing(embeddings).to(embeddings.dtype)
        return embeddings

    def image_features(self, pixel_values: torch.Tensor, plan: VisionPlan) -> torch.Tensor:
        """(image tokens, D) of all images of a pack, each encoded once.

        Args:
            pixel_values: (N, channels * frames * patch^2) float.
            plan: of the images, on the same device.
        """
        visual, merge = self.visual, self.vision_shape.merge
        # Before the embedding: what a compiled block gets must be no view, or it is traced once more.
        hidden = embed_patches(visual, reorder(pixel_values, plan.order, merge))  # (N, D of the tower)
        cos, sin = rotary(visual, plan.positions)
        attention, dtype = self._vision_kernels.attention, _product_dtype(hidden)
        whole = attention.plan(plan.images, dtype)
        windows = None if plan.windows is None else attention.plan(plan.windows, dtype)
        if self.compiled:
            mark_dynamic(cos, sin, whole, windows)
        for number, block in enumerate(visual.blocks):
            layout = whole if number in self.vision_shape.whole else windows
            hidden = self._run(self._block, block, hidden, cos, sin, layout, self._vision_kernels)
        features = visual.merger(hidden)
        return features if plan.restore is None else features.index_select(0, plan.restore)

    def _see_nothing(self, embeddings: torch.Tensor) -> torch.Tensor:
        """The sum of the features of one blank image token, ()."""
        vision = self.model.config.vision_config
        merge, width = vision.spatial_merge_size, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        if self._blank is None or self._blank.positions.device != embeddings.device:
            # Kept: compiled attention knows its layouts by number, and needs them until the backward pass is done.
            self._blank = VisionPlan.build([(1, merge, merge)], self.vision_shape).to(embeddings.device)
        return self.image_features(embeddings.new_zeros(merge**2, width), self._blank).sum()


def _product_dtype(states: torch.Tensor) -> torch.dtype:
    """dtype in which matrix products of these states come out."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
