"""The keys of config.json that have been looked at; all others are named to the user.

A key is known here if somebody has read what the stock class of its family does with it: it shapes modules that are
called as they are, it is read by our layers, `check_family` refuses all values but the right one, or no reward
depends on it. transformers keeps every other key of a file as an attribute, where any of its code may read it, today
or in a later version. So an unknown key is no error, but it is named, and the check against the stock model
(exactness.py) decides whether it changes rewards. The lists are written by hand: taken from transformers' classes,
they would know a new key before anybody has looked at it.
"""

# Keys of any part of a config that describe the file, ask for outputs or belong to heads and generation.
_ANYWHERE = {
    "architectures", "bos_token_id", "chunk_size_feed_forward", "decoder_start_token_id", "dtype", "eos_token_id",
    "finetuning_task", "id2label", "initializer_factor", "initializer_range", "is_decoder", "is_encoder_decoder",
    "label2id", "model_type", "num_labels", "output_attentions", "output_hidden_states", "pad_token_id",
    "per_layer_config", "prefix", "problem_type", "quantization_config", "return_dict", "sep_token_id",
    "task_specific_params", "tie_last_hidden_states", "tie_word_embeddings", "torch_dtype", "torchscript",
    "transformers_version", "unk_token_id", "use_cache",
}  # fmt: skip
# Keys of OpenRLHF's head (stored_head.py).
_HEAD = {"mean", "normalize_reward", "std", "value_head_prefix"}
_TEXT = {
    "attention_dropout", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "is_causal", "layer_types",
    "max_position_embeddings", "max_window_layers", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "use_sliding_window",
    "vocab_size",
}  # fmt: skip
_MEDIA = {"image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id"}
_QWEN_VISION = {
    "depth", "hidden_act", "hidden_size", "in_channels", "in_chans", "num_heads", "patch_size", "rope_parameters",
    "spatial_merge_size", "spatial_patch_size", "temporal_patch_size",
}  # fmt: skip
_INTERN_VISION = {
    "attention_bias", "attention_dropout", "dropout", "hidden_act", "hidden_dropout_prob", "hidden_size", "image_size",
    "intermediate_size", "layer_norm_eps", "layer_scale_init_value", "norm_type", "num_attention_heads",
    "num_channels", "num_hidden_layers", "patch_size", "projection_dropout", "use_absolute_position_embeddings",
    "use_mask_token", "use_mean_pooling", "use_qk_norm",
}  # fmt: skip
# Keys by the model_type of a config or of its parts.
KNOWN = {
    "llama": _TEXT | {"attention_bias", "mlp_bias", "pretraining_tp"},
    "qwen2": _TEXT,
    "qwen3": _TEXT | {"attention_bias"},
    "qwen2_vl": _MEDIA,
    "qwen2_vl_text": _TEXT,
    "qwen2_vl_vision": _QWEN_VISION | {"embed_dim", "mlp_ratio"},
    "qwen2_5_vl": _MEDIA,
    "qwen2_5_vl_text": _TEXT,
    "qwen2_5_vl_vision": _QWEN_VISION
    | {"fullatt_block_indexes", "intermediate_size", "out_hidden_size", "tokens_per_second", "window_size"},
    "internvl": {
        "downsample_ratio", "image_seq_length", "image_token_id", "projector_hidden_act", "vision_feature_layer",
        "vision_feature_select_strategy",
    },
    "internvl_vision": _INTERN_VISION,
}  # fmt: skip
PARTS = ("text_config", "vision_config")


def unknown_keys(config) -> list[str]:
    """Return the keys of a supported model's config that are unknown here, such as `text_config.alibi`.

    Left out are keys that have the default of transformers' class, which files need not hold.

    Args:
        config: a transformers config that `check_family` accepts.
    """
    found = _unknown(config, "", {*PARTS, *_HEAD, "fastrm"})
    for part in PARTS:
        if hasattr(config, part):
            found += _unknown(getattr(config, part), f"{part}.", set())
    return found


def describe_unknown_keys(config) -> str | None:
    """Return one line that names the unknown keys of a config; None if there are none."""
    names = unknown_keys(config)
    if not names:
        return None
    keys, are = ("keys", "are") if len(names) > 1 else ("key", "is")
    return f"config.json: {keys} {', '.join(names)} {are} unknown to fastrm for {config.model_type}, and not read"


def _unknown(config, prefix: str, besides: set[str]) -> list[str]:
    known = KNOWN.get(config.model_type, set()) | _ANYWHERE | besides
    usual = type(config)().to_dict()
    missing = object()
    return [
        prefix + name
        for name, value in config.to_dict().items()
        if name not in known and not name.startswith("_") and value != usual.get(name, missing)
    ]
