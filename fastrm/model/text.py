"""The stock text models whose forward pass is known here, alone or in a vision model, and what is refused of them."""

from fastrm.errors import ConfigError

# The text models that are known by themselves, with their part of transformers' and vLLM's names of classes.
TEXT_STEMS = {
    "qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama", "mistral": "Mistral", "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe",
}  # fmt: skip
# Those of them whose exports for vLLM are known (vllm_classes.py).
IN_VLLM = {"qwen2", "qwen3", "llama"}
SILU = {"silu", "swish"}  # swish is an older name of silu
# Rotary embeddings whose frequencies are the stock module's, whatever a pack holds; dynamic up to `longest_path`.
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic")
# The keys of a text model's config that all of them have; see config_keys.py.
TEXT_KEYS = {
    "attention_dropout", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "is_causal", "layer_types",
    "max_position_embeddings", "max_window_layers", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "use_sliding_window",
    "vocab_size",
}  # fmt: skip
# Those of models with experts besides. The last two are of losses and outputs of transformers' LM class alone.
_EXPERT_KEYS = {
    "decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob", "num_experts",
    "num_experts_per_tok", "num_local_experts", "output_router_logits", "router_aux_loss_coef",
}  # fmt: skip
# The keys of each text model, by its model_type.
KNOWN_TEXT = {
    "llama": TEXT_KEYS | {"attention_bias", "mlp_bias", "pretraining_tp"},
    "mistral": TEXT_KEYS,
    "qwen2": TEXT_KEYS,
    "qwen2_moe": TEXT_KEYS | _EXPERT_KEYS | {"qkv_bias", "shared_expert_intermediate_size"},
    "qwen3": TEXT_KEYS | {"attention_bias"},
    "qwen3_moe": TEXT_KEYS | _EXPERT_KEYS | {"attention_bias"},
}


def check_text(family: str, text) -> None:
    """Refuse a stock text model that computes otherwise than our layers.

    Args:
        family: the model type of the whole model, for the message.
        text: its text config.

    Raises:
        ConfigError: naming the key and its value.
    """
    heads, shared = text.num_attention_heads, getattr(text, "num_key_value_heads", None) or 1
    if text.num_hidden_layers < 1 or heads < 1 or heads % shared:
        raise ConfigError(
            f"{family}: num_hidden_layers is {text.num_hidden_layers}, num_attention_heads {heads}, "
            f"num_key_value_heads {shared}; wanted a layer or more, and attention heads that the last number divides"
        )
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
    partial = rope_parameters(text).get("partial_rotary_factor")
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
    check_activation(family, "hidden_act", text.hidden_act)
    if text.model_type.endswith("_moe") and not 1 <= text.num_experts_per_tok <= max(text.num_experts, 1):
        raise ConfigError(
            f"{family}: num_experts_per_tok is {text.num_experts_per_tok}, wanted 1 to num_experts, {text.num_experts}"
        )


def check_activation(family: str, name: str, value) -> None:
    """Refuse an activation that transformers does not know.

    Raises:
        ConfigError: naming the key and its value.
    """
    from transformers.activations import ACT2FN

    if not isinstance(value, str) or value not in ACT2FN:
        raise ConfigError(f"{family}: {name} is {value!r}, which transformers does not know")


def longest_path(config) -> int | None:
    """Return the tokens that a prompt with one response may have; None without a limit that others would feel.

    The rotary frequencies of rope_type dynamic (InternVL's text models) are constant up to this length and
    follow the longest sequence beyond it: of a pack, so that one response would change another's reward. Mistral's
    and Qwen3-MoE's attention reaches `sliding_window` tokens back, the token itself among them, which is all of a path
    of that length.
    """
    return min((limit for _, limit in _path_limits(config)), default=None)


def path_limit_key(config) -> str:
    """Return what sets `longest_path`, as config.json says it, for messages."""
    return min(_path_limits(config), key=lambda found: found[1])[0]


def _path_limits(config) -> list[tuple[str, int]]:
    text, found = config.get_text_config(), []
    if _rope_type(text) == "dynamic":
        found.append(("rope_type dynamic", text.max_position_embeddings))
    if text.model_type in ("mistral", "qwen3_moe") and text.sliding_window is not None:
        found.append((f"sliding_window {text.sliding_window}", text.sliding_window))
    return found


def rope_parameters(part) -> dict:
    """Return the rotary embedding's settings of a config or of a part of one; empty without."""
    return getattr(part, "rope_parameters", None) or {}


def _rope_type(text) -> str:
    return rope_parameters(text).get("rope_type", "default")
