"""The module `RewardNetwork`: a stock backbone and a reward head, from packs to rewards."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from fastrm.config import HeadConfig, LossConfig, ModelConfig
from fastrm.data.packing import Pack
from fastrm.data.template import ConversationEncoder
from fastrm.errors import ConfigError
from fastrm.lora_config import LoraConfig
from fastrm.model.backbone import CHECKPOINTING, BackboneRunner
from fastrm.model.compiled import CompiledGraphs
from fastrm.model.families import FAMILIES, check_family, gated_activations, has_tied_embeddings
from fastrm.model.fusion import FusedLinear, fuse_projections
from fastrm.model.head import head_loss, head_rewards, make_head
from fastrm.model.kernel_choice import head_dims_of, pick_backend, pick_head_kernels
from fastrm.model.layers import BACKENDS, pick_norm_and_gate
from fastrm.model.precision import Fp8Report, fp8_disabled
from fastrm.model.turn_loss import turn_losses
from fastrm.model.vision.tower import VisionTower
from fastrm.names import device_name
from fastrm.paradigm_config import Paradigm
from fastrm_kernels.dispatch import Choice


class RewardNetwork(nn.Module):
    """The network r(prompt, response): it rewards every response of a pack in one forward pass.

    The state dict has stock names: `model.*` is the transformers model, `score.*` the head, `lm_head.*` that of a model
    that writes, unless it is tied to the embeddings.

    Attributes:
        model: transformers base model (no LM head).
        paradigm: reward; critic, whose turns are learnt besides; or judge, whose turns alone are learnt: the "rewards"
            of its responses are the mean log probabilities of their tokens.
        score: the head, an nn.Linear or nn.Sequential; without layers for a judge.
        lm_head: an nn.Linear; None for a model that does not write, and where the embeddings are its weight.
        head_settings: its layers and activation.
        pooling: what the head reads: anchor, a response's last token, or mean, over all tokens of its path.
        encoder: tokeniser and image processor of the model.
        attention: the attention backend in use and why.
        head_kernels: the implementation of head and loss in use and why.
        lm_kernels: that of the loss of turns (turn_loss.py).
        norm_and_gate: what RMSNorm and SwiGLU are in use, and why.
        lay_out: makes the layouts of packs, in a data worker or where the network runs.
        fp8: which layers compute in FP8 and why others do not; None without FP8.
        lora: the settings of its adapters (lora.py); None: all of its weights have stock names.
        quantize: the format of the frozen layers below adapters, nf4; None: they are as they were loaded.
        base_digest: what tells the weights below adapters from others (loading.py); None: it has no adapters.
        graphs: what torch.compile has made of the layers; None where they are not compiled.
        first_use: compares rewards with stock's before they are given away (first_use.py); None: nothing does.
        reward_statistics: of held-out rewards (reward_statistics.py), as an export stores them; None: none are known.
        writer: of a model that writes, as an export's config.json states it: its kind, and its SPEC; None for others.
        generation: the generation_config.json of its files, which the export of a model that writes keeps.
        normalization: (mean, std) that scoring applies to rewards; None: they are given away as they are.
        adopted: in words, how a head that others trained was read; empty for a new one and for an export's.
    """

    def __init__(
        self,
        model: nn.Module,
        head: HeadConfig,
        encoder: ConversationEncoder | None = None,
        pooling: str = "anchor",
        paradigm: Paradigm = "reward",
    ):
        super().__init__()
        _check_media_ids(model.config, encoder)
        self.model = model
        self.head_settings = head
        self.pooling, self.paradigm = pooling, paradigm
        text = model.config.get_text_config()
        self.score = nn.Sequential() if paradigm == "judge" else make_head(text.hidden_size, head)
        self.lm_head = None if paradigm == "reward" else _new_lm_head(model)
        self.encoder = encoder
        self.attention = Choice("", "not chosen yet")
        self.head_kernels = Choice("eager", "not chosen yet")
        self.norm_and_gate = "not chosen yet"
        self.lm_kernels = "eager"
        self.fp8: Fp8Report | None = None
        self.lora: LoraConfig | None = None
        self.quantize: str | None = None
        self.base_digest: str | None = None
        self.graphs: CompiledGraphs | None = None
        self.adopted = ""
        self.reward_statistics: dict[str, Any] | None = None
        self.writer: dict[str, Any] | None = None
        self.generation: dict[str, Any] = {}
        self.normalization: tuple[float, float] | None = None
        self._runner = BackboneRunner(model, pooling if paradigm == "reward" else "all")
        self.lay_out = self._runner.layout_builder(torch.float32)
        self.first_use: Callable | None = None

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def is_vision(self) -> bool:
        return self._runner.tower is not None

    @property
    def language(self) -> nn.Module:
        """The language model, without its vision tower."""
        return self._runner.language

    @property
    def tower(self) -> VisionTower | None:
        """The vision side of the model; None for a text model."""
        return self._runner.tower

    def forward(self, pack: Pack, loss: LossConfig | None = None) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Compute rewards (R,) float32 in the order of the pack's responses.

        With the settings of a loss, (sum of the weighted terms of the pack's preferences, rewards): head and
        loss are then one operation. They are one call of the network because ZeRO-3 holds the head's weights
        only while one runs. A critic's sum is two (2,), of its preferences and of its turns.
        """
        if self.paradigm != "reward":
            return self._forward_writer(pack, loss)
        if self.pooling == "mean":
            states, norm = self._runner.mean_states(pack), None
        else:
            states, norm = self._runner.anchor_states(pack), self._runner.language.norm
        head = self.score, self.head_settings.activation, states, norm, self.head_kernels.name
        return head_rewards(*head) if loss is None else head_loss(*head, pack, loss)

    def _forward_writer(self, pack: Pack, loss: LossConfig | None):
        states, norm, impl = self._runner.all_states(pack), self.language.norm, self.head_kernels.name
        head = self.score, self.head_settings.activation, states.index_select(0, pack.anchors), norm, impl
        if self.paradigm == "critic" and loss is None:
            return head_rewards(*head)
        written, means = turn_losses(states, norm, self.lm_weight, pack, self.lm_kernels)
        if self.paradigm == "judge":
            return means if loss is None else (written, means)
        total, rewards = head_loss(*head, pack, loss)
        return torch.stack([total, written]), rewards

    @property
    def lm_weight(self) -> nn.Parameter:
        """The weight (V, D) with which a model that writes makes logits."""
        return self.language.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def normalized(self, rewards: torch.Tensor) -> torch.Tensor:
        """Return rewards as scoring gives them away: less the mean and divided by the std of `normalization`."""
        if self.normalization is None:
            return rewards
        mean, std = self.normalization
        return (rewards - mean) / std

    def fuse_projections(self) -> int:
        """Compute q, k, v in one product and gate, up in one; return the number of fused matrices.

        The state dict keeps its stock names. Call it before an optimizer is made.
        """
        return fuse_projections(self._runner.language.layers)

    def set_kernels(self, dtype: torch.dtype, *, kernels: str = "auto", attention: str = "auto") -> None:
        """Choose implementations for the device that the weights are on.

        Call it after `fuse_projections` and `compile_layers`, which it takes into account.

        Args:
            dtype: of the backbone's matrix products.
            kernels: auto, triton or eager, for attention, head and loss, RMSNorm and SwiGLU.
            attention: auto to follow `kernels`, or a backend: sdpa, flash, flash_attn, triton.

        Raises:
            ConfigError: if an explicit choice cannot run there.
        """
        self.head_kernels = pick_head_kernels(kernels, self.device, self.head_settings.layers)
        # Not measured on a GPU: automatic choices stay with PyTorch's operations.
        self.lm_kernels = "triton" if kernels == "triton" else "eager"
        self.attention = pick_backend(attention, kernels, self.device, dtype, head_dims_of(self.model.config))
        fused = any(isinstance(module, FusedLinear) for module in self.model.modules())
        norm, gate, self.norm_and_gate = pick_norm_and_gate(
            kernels, self._runner.compiled, fused, self.device, gated_activations(self.model.config)
        )
        self._runner.set_kernels(BACKENDS[self.attention.name], norm, gate)
        self.lay_out = self._runner.layout_builder(dtype)

    def set_kernels_on_paper(self, dtype: torch.dtype, impl: str, norm: Callable, gate: Callable) -> None:
        """Set the implementations of another device, for passes over tensors without data.

        Args:
            dtype: of the backbone's matrix products.
            impl: of `tree_attention`: eager, varlen, flash_attn or triton.
            norm, gate: as of `LayerKernels`.
        """
        self._runner.set_kernels(impl, norm, gate, traced=impl != "eager")
        self.lay_out = self._runner.layout_builder(dtype)

    @contextmanager
    def watched_layers(self, watch: Callable) -> Iterator[None]:
        """Call `watch` in place of every whole decoder layer and vision block (`BackboneRunner.watch`), for the block.

        A pruned last layer is not among them.
        """
        self._runner.watch = watch
        try:
            yield
        finally:
            self._runner.watch = None

    def compile_layers(self, backend: str | Callable = "inductor") -> CompiledGraphs:
        """Run decoder layers and vision blocks through torch.compile; return the count of graphs made.

        Args:
            backend: name of a torch.compile backend, or a function that is one.
        """
        self.graphs = CompiledGraphs(backend)
        self._runner.compile(self.graphs)
        self.use_activation_checkpointing(self._runner.checkpointing)
        return self.graphs

    @contextmanager
    def plain_layers(self) -> Iterator[None]:
        """Compute layers as they were before `compile_layers` and `convert_to_fp8`, until the block ends."""
        with self._runner.uncompiled(), fp8_disabled(self) if self.fp8 is not None else nullcontext():
            yield

    def use_activation_checkpointing(self, mode: str) -> None:
        """Set what the backward pass recomputes: one of CHECKPOINTING.

        Call it before the first pass: compiled graphs are made for one mode.

        Raises:
            ValueError: for another mode.
        """
        if mode not in CHECKPOINTING:
            raise ValueError(f"activation checkpointing: got {mode!r}, wanted one of {', '.join(CHECKPOINTING)}")
        self._runner.checkpointing = mode
        if self.graphs is not None:
            self.graphs.recompute = mode == "selective"

    @property
    def always_run_tower(self) -> bool:
        """True to run the vision tower also for packs without images, on a blank one of weight 0."""
        return self._runner.always_run_tower

    @always_run_tower.setter
    def always_run_tower(self, value: bool) -> None:
        self._runner.always_run_tower = value and self.is_vision

    def freeze(self, parts: Sequence[str]) -> None:
        """Take parts out of training: vision (tower without projector), projector, language.

        Raises:
            ConfigError: for a vision part of a text model.
        """
        self.check_parts(parts, "model.freeze", "use [language]")
        for part in parts:
            for parameter in self.parameters_of(part):
                parameter.requires_grad_(False)

    def check_parts(self, parts: Iterable[str], setting: str, advice: str) -> None:
        """Refuse parts that the model lacks, which `setting` names.

        Raises:
            ConfigError: for a vision part of a text model.
        """
        if not self.is_vision and {"vision", "projector"} & set(parts):
            raise ConfigError(f"{setting}: {self.model.config.model_type} has no vision tower; {advice}")

    def parameters_of(self, part: str) -> set[nn.Parameter]:
        """Return the parameters of a part: vision (tower without projector), projector, language or head."""
        if part == "vision":  # Qwen's projector is inside the tower
            return set(self.tower.parameters()) - set(self.tower.projector.parameters())
        if part == "language":
            return set(self.language.parameters()) | set(() if self.lm_head is None else self.lm_head.parameters())
        return set((self.tower.projector if part == "projector" else self.score).parameters())


def _new_lm_head(model: nn.Module) -> nn.Linear | None:
    """Make the LM head that a stock model has besides its embeddings, without memory if these have none yet.

    It is as large as the embeddings, which ranks that read or divide their weights never hold twice.
    """
    if has_tied_embeddings(model.config):
        return None
    text = model.config.get_text_config()
    place = {"device": "meta"} if model.get_input_embeddings().weight.is_meta else {}
    return nn.Linear(text.hidden_size, text.vocab_size, bias=False, **place)


def _check_media_ids(config, encoder: ConversationEncoder | None) -> None:
    """Refuse a config and a tokenizer that mean other media tokens: stock models use the one, we the other."""
    if encoder is None or encoder.vision is None:
        return
    for kind, number in encoder.vision.placeholders.items():
        key = f"{kind.noun}_token_id"
        if (found := getattr(config, key, None)) != number:
            raise ConfigError(
                f"config.json: {key} is {found}, but the tokenizer has {number} for the token of {kind.noun}s; take "
                "the tokenizer that belongs to the model, or correct the key"
            )


def pick_device(requested: str | int | torch.device) -> torch.device:
    """Pick a device: auto is cuda if there is one, else cpu; other values are for `device_name`.

    A GPU that is asked for by its number becomes torch's current one, on which kernels are launched.

    Raises:
        ConfigError: for another name, or if there is no such GPU.
    """
    try:
        device = device_name(requested)
    except ValueError as error:
        raise ConfigError(f"device: {error}") from None
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {device}: torch finds no CUDA device; use cpu, or install a CUDA build of torch")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    found = torch.device(device)
    if found.index is not None:
        if found.index >= (there := torch.cuda.device_count()):
            raise ConfigError(f"device {device}: this machine has {there} GPUs, cuda:0 to cuda:{there - 1}; choose one")
        torch.cuda.set_device(found)
    return found


def init_backbone(settings: ModelConfig, tokenizer, setting: str = "model.init") -> nn.Module:
    """Make a stock base model with random float32 weights (torch's global generator) for a tokenizer.

    Vocabulary size and special-token ids come from the tokenizer; everything else from `settings.init`, which messages
    call `setting`.
    """
    from transformers import AutoConfig, AutoModel

    options = dict(settings.init)
    model_type = options.pop("model_type")
    ids = media_token_ids(model_type, tokenizer)
    shared = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    try:
        if "text_config" in options:
            options["text_config"] = {**options["text_config"], "vocab_size": len(tokenizer), **shared}
            config = AutoConfig.for_model(model_type, **options, **ids)
        else:
            config = AutoConfig.for_model(model_type, **{**options, "vocab_size": len(tokenizer), **shared})
        check_family(config)
        # eager needs no package: `set_kernels` chooses the attention later.
        return AutoModel.from_config(config, dtype=torch.float32, attn_implementation="eager")
    except ConfigError:
        raise
    except Exception as error:
        raise refusal(setting, error) from error


def refusal(what: str, error: Exception) -> ConfigError:
    """Return the error for a wrong value of the setting `what`, which may fail anywhere inside transformers."""
    return ConfigError(f"{what}: transformers refuses it: {str(error).strip() or type(error).__name__}")


def media_token_ids(model_type: str, tokenizer) -> dict[str, int]:
    """Return a config's entries for the tokens that stand for images and videos; none for a text model."""
    names = FAMILIES[model_type].media_tokens if model_type in FAMILIES else {}
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
