"""The families of stock models whose forward pass is known here, and the config keys that would change it."""

from fastrm.errors import ConfigError

QWEN_VL_FAMILIES = ("qwen2_vl", "qwen2_5_vl")
VISION_FAMILIES = (*QWEN_VL_FAMILIES, "internvl")
TEXT_FAMILIES = ("qwen2", "qwen3", "llama")
SILU = {"silu", "swish"}  # swish is an older name of silu
# Rotary embeddings whose frequencies are the stock module's, whatever a pack holds; dynamic up to `longest_path`.
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic")
# The section of a Qwen-VL config without one, as transformers reads it.
MROPE_SECTION = (16, 24, 24)


def chat_layout(model_type: str) -> str:
    """Return a family's key of `CHAT_LAYOUTS`: the layout of conversations for a tokenizer trained for it."""
    return "internvl" if model_type == "internvl" else "qwen"


def gated_activations(config) -> set[str]:
    """Return the activations of a model's gated MLPs, which our layers evaluate; other MLPs are stock modules."""
    text = config.get_text_config().hidden_act
    return {text, config.vision_config.hidden_act} if config.model_type == "qwen2_5_vl" else {text}


def has_windows(vision_config) -> bool:
    """Return whether blocks of a Qwen tower see windows: Qwen2.5-VL's do, whatever keys a Qwen2-VL config holds."""
    return vision_config.model_type.startswith("qwen2_5_vl")


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
    if config.model_type == "internvl":
        _check_internvl(config)
    elif config.model_type in QWEN_VL_FAMILIES:
        _check_qwen_vision(config)
    _check_text(config.model_type, config.get_text_config())


def _check_text(family: str, text) -> None:
    """Refuse a stock text model that computes otherwise than our layers."""
    if getattr(text, "attention_dropout", 0.0):
        raise ConfigError(f"{family}: attention_dropout is {text.attention_dropout}, only 0 is supported")
    if not getattr(text, "is_causal", True):
        raise ConfigError(f"{family}: is_causal is {text.is_causal!r}, only true is supported")
    if getattr(text, "is_heterogeneous", False):
        raise ConfigError(f"{family}: per_layer_config is set; layers that differ from one another are not supported")
    if _rope_type(text) == "longrope":
        raise ConfigError(f"{family}: rope_type longrope depends on the longest of a pack; not supported")
    if _rope_type(text) not in ROPE_TYPES:
        raise ConfigError(f"{family}: rope_type is {_rope_type(text)!r}, wanted one of {', '.join(ROPE_TYPES)}")
    partial = _rope(text).get("partial_rotary_factor")
    if partial not in (None, 1):
        raise ConfigError(f"{family}: partial_rotary_factor is {partial}, only 1 is supported")
    layer_types = set(getattr(text, "layer_types", None) or ())
    if "sliding_attention" in layer_types:
        raise ConfigError(
            f"{family}: sliding-window layers are not supported; set use_sliding_window: false if the "
            "checkpoint was trained without"
        )
    if others := layer_types - {"full_attention"}:
        raise ConfigError(f"{family}: layer_types has {sorted(others)}, only 'full_attention' is supported")
    _check_activation(family, "hidden_act", text.hidden_act)


def _check_activation(family: str, name: str, value) -> None:
    from transformers.activations import ACT2FN

    if not isinstance(value, str) or value not in ACT2FN:
        raise ConfigError(f"{family}: {name} is {value!r}, which transformers does not know")


def _check_qwen_vision(config) -> None:
    vision = config.vision_config
    if vision.in_channels != 3:
        raise ConfigError(
            f"{config.model_type}: vision_config.in_channels is {vision.in_channels}, only 3 is supported: images are "
            "read as red, green and blue"
        )
    for name in ("patch_size", "temporal_patch_size"):
        if not isinstance(getattr(vision, name), int):
            raise ConfigError(
                f"{config.model_type}: vision_config.{name} is {getattr(vision, name)!r}, only one number is supported"
            )
    rope_type = _rope(vision).get("rope_type", "axial")
    if rope_type != "axial":
        raise ConfigError(f"{config.model_type}: vision_config's rope_type is {rope_type!r}, only 'axial' is supported")
    _check_activation(config.model_type, "vision_config.hidden_act", vision.hidden_act)
    text = config.get_text_config()
    section = _rope(text).get("mrope_section", MROPE_SECTION)
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads > 0 else 0)
    if head_dim > 0 and 2 * sum(section) != head_dim:  # transformers refuses other sizes
        raise ConfigError(
            f"{config.model_type}: mrope_section of rope_parameters is {list(section)}, for heads of "
            f"{2 * sum(section)}; heads have {head_dim}: add the section that the model was trained with"
        )


def _check_internvl(config) -> None:
    text, vision = config.get_text_config(), config.vision_config
    if text.model_type not in TEXT_FAMILIES:
        raise ConfigError(
            f"internvl: text_config has model type {text.model_type!r}; wanted one of {', '.join(TEXT_FAMILIES)}"
        )
    if vision.model_type != "internvl_vision":
        raise ConfigError(f"internvl: vision_config has model type {vision.model_type!r}; wanted internvl_vision")
    found = {name: getattr(vision, name) for name in ("attention_dropout", "projection_dropout", "hidden_dropout_prob")}
    found |= {name: getattr(config, name) for name in ("vision_feature_layer", "vision_feature_select_strategy")}
    wanted = dict.fromkeys(found, 0.0) | {"vision_feature_layer": -1, "vision_feature_select_strategy": "default"}
    for name, value in found.items():
        if value != wanted[name]:
            raise ConfigError(f"internvl: {name} is {value!r}, only {wanted[name]!r} is supported")
    if vision.num_channels != 3:
        raise ConfigError(
            f"internvl: vision_config.num_channels is {vision.num_channels}, only 3 is supported: images are read as "
            "red, green and blue"
        )
    if vision.norm_type not in ("layer_norm", "rms_norm"):
        raise ConfigError(f"internvl: norm_type is {vision.norm_type!r}, wanted layer_norm or rms_norm")
    _check_activation("internvl", "vision_config.hidden_act", vision.hidden_act)
    _check_activation("internvl", "projector_hidden_act", config.projector_hidden_act)
    merge = int(1 / config.downsample_ratio)
    height, width = (size // patch for size, patch in zip(vision.image_size, vision.patch_size, strict=True))
    if height != width or len(set(vision.patch_size)) > 1 or height % merge or merge * config.downsample_ratio != 1:
        raise ConfigError(
            f"internvl: image_size {tuple(vision.image_size)}, patch_size {tuple(vision.patch_size)} and "
            f"downsample_ratio {config.downsample_ratio} give no square tiles of whole image tokens; wanted, for "
            "example, 448, 14 and 0.5"
        )


def longest_path(config) -> int | None:
    """Return the tokens that a prompt with one response may have; None without a limit that others would feel.

    The rotary frequencies of rope_type dynamic (InternVL's text models) are constant up to this length and
    follow the longest sequence beyond it: of a pack, so that one response would change another's reward.
    """
    text = config.get_text_config()
    return text.max_position_embeddings if _rope_type(text) == "dynamic" else None


def _rope(part) -> dict:
    return getattr(part, "rope_parameters", None) or {}


def _rope_type(text) -> str:
    return _rope(text).get("rope_type", "default")
