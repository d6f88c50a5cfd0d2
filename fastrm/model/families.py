"""The families of stock models whose forward pass is known here: the one table of them, and what each must say.

A family whose models read images is an object in a module of its own, `fastrm/model/vision/<family>.py`, and has a
media format in `fastrm/data/media/<family>.py`. Families of text alone differ by their config's keys (text.py).
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

from torch import nn

from fastrm.data.media.format import FormatSettings, VisionFormat
from fastrm.errors import ConfigError
from fastrm.model.text import TEXT_STEMS, check_text
from fastrm.model.vision.internvl import INTERNVL
from fastrm.model.vision.qwen2_vl import QWEN2_5_VL, QWEN2_VL
from fastrm.model.vision.qwen3_vl import QWEN3_VL
from fastrm.model.vision.tower import Passes, VisionTower


class VisionFamily(Protocol):
    """The interface of a family whose models read images.

    Attributes:
        model_type: of its config.
        stem: its part of the names of classes in transformers and vLLM: Qwen2VL of Qwen2VLConfig.
        keys: by model_type of the config and of its own parts, the keys that have been looked at (config_keys.py).
        tower: makes the vision side of a stock base model.
        chat_layout: key of `CHAT_LAYOUTS`, the layout of conversations for a tokenizer trained for it.
        media_tokens: by key of the config, the special tokens that stand for images and videos.
        has_axes: positions have three rows (M-RoPE), and the stock model is told the kinds of tokens.
        no_pixel_limits: why limits of an image's pixels mean nothing to it; empty where they do.
        file_names: beginnings of weights' names in memory, and in files where those differ.
        loaded_names: patterns of names in files, and what transformers is to put in their place.
    """

    model_type: str
    stem: str
    keys: Mapping[str, Collection[str]]
    tower: type[VisionTower]
    chat_layout: str
    media_tokens: Mapping[str, str]
    has_axes: bool
    no_pixel_limits: str
    file_names: Mapping[str, str]
    loaded_names: Mapping[str, str]

    def check(self, config) -> None:
        """Refuse values of its config, those of the text model apart, that change what a stock model computes.

        Raises:
            ConfigError: naming the key and its value.
        """

    def gated_activations(self, config) -> set[str]:
        """Return the activations of the tower's gated MLPs, which our layers evaluate; empty without."""

    def load_format(self, config, tokenizer, folder: str | None, settings: FormatSettings) -> VisionFormat:
        """Load the media format of a model folder, or without one of the config alone.

        Raises:
            ConfigError: if the processor's files or the tokenizer do not fit the model.
        """

    def media_costs(self, config, tower: Passes, projector: Passes) -> dict[str, int]:
        """Return the fields of `CostModel` that media have, in FLOPs of a training step."""

    def keep_first_blocks(self, vision_config, count: int) -> None:
        """Change a vision config to one of the tower's first blocks, of every kind."""

    def image_processor(self, tokenizer, folder: str | None, limits: Mapping[str, int]):
        """Return a processor of text and images for stock classes that needs no torchvision; None if there is none.

        Args:
            folder: whose image settings are taken; None: the stock ones.
            limits: min_pixels and max_pixels, which replace those.
        """

    def fixed_in_vllm(self, config) -> dict[str, tuple] | None:
        """Return by key (value, what vLLM computes whatever the value is); None if its exports for vLLM are unknown."""

    def add_vllm_files(self, folder: Path, config, tokenizer) -> None:
        """Write what vLLM reads besides the other files, into an export's folder."""


_VISION: tuple[VisionFamily, ...] = (QWEN2_VL, QWEN2_5_VL, QWEN3_VL, INTERNVL)
FAMILIES: dict[str, VisionFamily] = {family.model_type: family for family in _VISION}
VISION_FAMILIES = tuple(FAMILIES)
TEXT_FAMILIES = tuple(TEXT_STEMS)
# By model type, the family's part of names of classes.
STEMS = TEXT_STEMS | {family.model_type: family.stem for family in _VISION}


def chat_layout(model_type: str) -> str:
    """Return a family's key of `CHAT_LAYOUTS`: the layout of conversations for a tokenizer trained for it."""
    return FAMILIES[model_type].chat_layout if model_type in FAMILIES else "qwen"


def has_axes(config) -> bool:
    """Return whether positions of the model's tokens have three rows."""
    return config.model_type in FAMILIES and FAMILIES[config.model_type].has_axes


def gated_activations(config) -> set[str]:
    """Return the activations of a model's gated MLPs, which our layers evaluate; other MLPs are stock modules."""
    of_tower = FAMILIES[config.model_type].gated_activations(config) if config.model_type in FAMILIES else set()
    return {config.get_text_config().hidden_act} | of_tower


def has_tied_embeddings(config) -> bool:
    """Return whether a stock model that writes takes its embeddings for its LM head's weight."""
    return bool(getattr(config, "tie_word_embeddings", False))


def make_tower(model: nn.Module) -> VisionTower | None:
    """Make the tower of a stock base model; None for a text model."""
    family = model.config.model_type
    return None if family in TEXT_FAMILIES else FAMILIES[family].tower(model)


def check_family(config) -> None:
    """Refuse configs of transformers whose forward is not known to match `BackboneRunner`.

    A value of a key that changes what a stock model computes is either read, here or by the stock modules that are
    called, or refused by name. Keys that nobody has looked at are named by `config_keys.unknown_keys`.

    Raises:
        ConfigError: for another model type, and for values of its keys that are not supported.
    """
    if config.model_type not in VISION_FAMILIES + TEXT_FAMILIES:
        raise ConfigError(
            f"model type {config.model_type!r} is not supported; wanted one of "
            f"{', '.join(VISION_FAMILIES + TEXT_FAMILIES)}"
        )
    if getattr(config, "quantization_config", None):
        raise ConfigError(
            f"{config.model_type}: quantization_config is set; quantised weights cannot be trained or scored here: "
            "take the checkpoint that they were made from"
        )
    if config.model_type in FAMILIES:
        FAMILIES[config.model_type].check(config)
    check_text(config.model_type, config.get_text_config())
