"""The keys of config.json that have been looked at; all others are named to the user.

A key is known here if somebody has read what the stock class of its family does with it: it shapes modules that are
called as they are, it is read by our layers, `check_family` refuses all values but the right one, or no reward
depends on it. transformers keeps every other key of a file as an attribute, where any of its code may read it, today
or in a later version. So an unknown key is no error, but it is named, and the check against the stock model
(exactness.py) decides whether it changes rewards. The lists are written by hand: taken from transformers' classes,
they would know a new key before anybody has looked at it.
"""

from fastrm.model.families import FAMILIES
from fastrm.model.text import KNOWN_TEXT

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
# Keys by the model_type of a config or of its parts.
KNOWN = KNOWN_TEXT | {part: keys for family in FAMILIES.values() for part, keys in family.keys.items()}
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
