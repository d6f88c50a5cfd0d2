"""`RewardNetwork`: a stock backbone and a reward head, from packs to rewards."""

from collections.abc import Sequence

import torch
from torch import nn

from fastrm.config import HeadConfig, ModelConfig
from fastrm.data.packing import Pack
from fastrm.data.template import ConversationEncoder
from fastrm.errors import ConfigError
from fastrm.model.attention import use_backend
from fastrm.model.backbone import BackboneRunner, check_family
from fastrm.model.head import head_rewards, make_head
from fastrm.model.kernels import choose_backend, choose_head_kernels, head_dims_of


class RewardNetwork(nn.Module):
    """r(prompt, response) for every response of a pack, in one forward pass.

    The state dict has stock names: `model.*` is the transformers model, `score.*` the head.

    Attributes:
        model: transformers base model (no LM head).
        score: the head, an nn.Linear or nn.Sequential.
        head: its settings.
        encoder: tokeniser and image processor of the model.
        attention: the attention backend in use and why.
        head_kernels: the implementation of head and loss in use and why.
    """

    def __init__(self, model: nn.Module, head: HeadConfig, encoder: ConversationEncoder | None = None):
        super().__init__()
        self.model = model
        self.head = head
        self.score = make_head(model.config.get_text_config().hidden_size, head)
        self.encoder = encoder
        self.attention = ("", "not chosen yet")
        self.head_kernels = ("eager", "not chosen yet")
        self._runner = BackboneRunner(model)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def is_vision(self) -> bool:
        return self._runner.is_vision

    def forward(self, pack: Pack) -> torch.Tensor:
        """Rewards (R,) float32 in the order of the pack's responses."""
        states = self._runner.anchor_states(pack)
        norm = self._runner.language.norm
        return head_rewards(self.score, self.head.activation, states, norm, self.head_kernels[0])

    def use_kernels(self, dtype: torch.dtype, *, kernels: str = "auto", attention: str = "auto") -> None:
        """Choose implementations for the device that the weights are on.

        Args:
            dtype: of the backbone's matrix products.
            kernels: auto, triton or eager, for attention, head and loss.
            attention: auto to follow `kernels`, or a backend: sdpa, flash, triton.

        Raises:
            ConfigError: if an explicit choice cannot run there.
        """
        self.head_kernels = choose_head_kernels(kernels, self.device)
        self.attention = choose_backend(attention, kernels, self.device, dtype, head_dims_of(self.model.config))
        use_backend(self.model, self.attention[0])

    def use_gradient_checkpointing(self) -> None:
        """Recompute activations layer by layer in the backward pass."""
        # transformers renamed the method between the oldest and the newest version that we support.
        enable = getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        # transformers now asks for a gradient of every embedding and patch, which only reentrant
        # checkpointing needs; a frozen vision tower would get a whole backward pass from it.
        self.model.disable_input_require_grads()
        self._runner.gradient_checkpointing = True

    def freeze(self, parts: Sequence[str]) -> None:
        """Take parts out of training: vision (tower without merger), projector (its merger), language.

        Raises:
            ConfigError: for a vision part of a text model.
        """
        if not self.is_vision and {"vision", "projector"} & set(parts):
            raise ConfigError(f"model.freeze: {self.model.config.model_type} has no vision tower; use [language]")
        for part in parts:
            if part == "language":
                self._runner.language.requires_grad_(False)
                continue
            for name, parameter in self.model.visual.named_parameters():
                if name.startswith("merger.") == (part == "projector"):
                    parameter.requires_grad_(False)


def pick_device(requested: str) -> torch.device:
    """auto = cuda if there is one, else cpu.

    Raises:
        ConfigError: if cuda is asked for and there is none.
    """
    if requested == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: torch finds no CUDA device; use cpu, or install a CUDA build of torch")
    if requested == "auto":
        requested = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(requested)


def init_backbone(settings: ModelConfig, tokenizer) -> nn.Module:
    """A stock base model with random float32 weights (torch's global generator) for a tokenizer.

    Vocabulary size and special-token ids come from the tokenizer; everything else from model.init.
    """
    from transformers import AutoConfig, AutoModel

    options = dict(settings.init)
    model_type = options.pop("model_type")
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video")}
    ids["vision_start_token_id"] = tokenizer.convert_tokens_to_ids("<|vision_start|>")
    ids["vision_end_token_id"] = tokenizer.convert_tokens_to_ids("<|vision_end|>")
    shared = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    try:
        if "text_config" in options:
            options["text_config"] = {**options["text_config"], "vocab_size": len(tokenizer), **shared}
            config = AutoConfig.for_model(model_type, **options, **ids)
        else:
            config = AutoConfig.for_model(model_type, **{**options, "vocab_size": len(tokenizer), **shared})
        check_family(config)
        # Any attention will do until `use_kernels` chooses, but a stock one must not be checked for.
        return AutoModel.from_config(config, dtype=torch.float32, attn_implementation="eager")
    except ConfigError:
        raise
    except Exception as error:
        # Whatever a wrong size or type runs into, deep inside: it is the configuration's fault.
        raise ConfigError(
            f"model.init: transformers refuses it: {str(error).strip() or type(error).__name__}"
        ) from error
