"""Shapes of models without their weights: published architectures, and networks on torch's meta device."""

from dataclasses import dataclass
from pathlib import Path

import torch

from fastrm.config import ModelConfig, TrainedTokenizer
from fastrm.data.tokenizer import load_tokenizer
from fastrm.errors import ConfigError
from fastrm.model.families import check_family
from fastrm.model.lm_head import untie_as_files
from fastrm.model.lora import add_lora
from fastrm.model.network import RewardNetwork, refusal
from fastrm.model.places import locate
from fastrm.paradigm_config import Paradigm


@dataclass(frozen=True)
class Published:
    """A published checkpoint: keyword arguments of its transformers config, and its size.

    Attributes:
        options: model_type, text_config and vision_config, from the checkpoint's config.json.
        num_parameters: of the checkpoint with its LM head, as its hub page states them; a head that is
            tied to the embeddings counts once. None where we have not seen the page state it.
    """

    options: dict
    num_parameters: int | None = None


def _text(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, tied: bool, context: int) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        # Sizes with tied embeddings keep the tokenizer's own vocabulary, the others are padded.
        "vocab_size": 151_936 if tied else 152_064,
        "tie_word_embeddings": tied,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]},
    }


def _qwen2_5_vl(*text, vision_intermediate: int, num_parameters: int, tied: bool = False) -> Published:
    vision = {"hidden_size": 1280, "intermediate_size": vision_intermediate, "out_hidden_size": text[0]}
    options = {"text_config": _text(*text, tied, 128_000), "vision_config": vision}
    return Published({"model_type": "qwen2_5_vl", **options}, num_parameters)


def _qwen2_vl(*text, num_parameters: int, tied: bool = False) -> Published:
    # `hidden_size` is the width of the merger's output; the tower's own is `embed_dim`.
    vision = {"embed_dim": 1280, "hidden_size": text[0], "mlp_ratio": 4}
    options = {"text_config": _text(*text, tied, 32_768), "vision_config": vision}
    return Published({"model_type": "qwen2_vl", **options}, num_parameters)


def _qwen3(*text, num_parameters: int, tied: bool = False) -> Published:
    options = _text(*text, tied, 40_960) | {"head_dim": 128, "vocab_size": 151_936}
    options["rope_parameters"] = {"rope_type": "default", "rope_theta": 1_000_000.0}
    return Published({"model_type": "qwen3", **options}, num_parameters)


def _qwen3_moe(*text, experts: int, per_token: int, width: int) -> Published:
    options = _text(*text, False, 40_960) | {"head_dim": 128, "vocab_size": 151_936, "norm_topk_prob": True}
    options["rope_parameters"] = {"rope_type": "default", "rope_theta": 1_000_000.0}
    sizes = {"num_experts": experts, "num_experts_per_tok": per_token, "moe_intermediate_size": width}
    return Published({"model_type": "qwen3_moe", **options, **sizes})


def _mistral(*text, vocabulary: int) -> Published:
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0}
    sizes = {"head_dim": 128, "vocab_size": vocabulary, "rms_norm_eps": 1e-5, "sliding_window": None}
    return Published({"model_type": "mistral", **_text(*text, False, 32_768), **sizes, "rope_parameters": rope})


def _qwen3_vl(*text, tied: bool = False, vision: dict | None = None) -> Published:
    options = _text(*text, tied, 262_144) | {"head_dim": 128, "vocab_size": 151_936}
    options["rope_parameters"] = {
        "rope_type": "default", "rope_theta": 5_000_000.0, "mrope_section": [24, 20, 20], "mrope_interleaved": True,
    }  # fmt: skip
    vision_config = {**(vision or {}), "out_hidden_size": text[0]}
    options = {"text_config": options, "vision_config": vision_config, "tie_word_embeddings": tied}
    return Published({"model_type": "qwen3_vl", **options})


# The smaller tower of Qwen3-VL; that of 8B and 32B is transformers' default.
_QWEN3_VL_SMALL = {
    "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17],
}  # fmt: skip


def _internvl(model_type: str, *text, vocabulary: int, eps: float) -> Published:
    hidden, intermediate, layers, heads, kv_heads = text
    text_config = {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": eps,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1_000_000.0},
    }
    # InternViT-300M: the defaults of transformers, except for the biases.
    options = {"text_config": text_config, "vision_config": {"attention_bias": True}, "tie_word_embeddings": False}
    return Published({"model_type": "internvl", **options})


# Hub names without their organisation. Text dimensions: hidden, intermediate, layers, heads, KV heads.
PUBLISHED = {
    "Qwen2.5-VL-3B-Instruct": _qwen2_5_vl(
        2048, 11008, 36, 16, 2, vision_intermediate=3420, num_parameters=3_754_622_976, tied=True
    ),
    "Qwen2.5-VL-7B-Instruct": _qwen2_5_vl(
        3584, 18944, 28, 28, 4, vision_intermediate=3420, num_parameters=8_292_166_656
    ),
    "Qwen2.5-VL-32B-Instruct": _qwen2_5_vl(
        5120, 27648, 64, 40, 8, vision_intermediate=3456, num_parameters=33_452_718_336
    ),
    "Qwen2.5-VL-72B-Instruct": _qwen2_5_vl(
        8192, 29568, 80, 64, 8, vision_intermediate=3456, num_parameters=73_410_777_344
    ),
    "Qwen2-VL-2B-Instruct": _qwen2_vl(1536, 8960, 28, 12, 2, num_parameters=2_208_985_600, tied=True),
    "Qwen2-VL-7B-Instruct": _qwen2_vl(3584, 18944, 28, 28, 4, num_parameters=8_291_375_616),
    "Qwen3-8B": _qwen3(4096, 12288, 36, 32, 8, num_parameters=8_190_735_360),
    "Qwen3-30B-A3B": _qwen3_moe(2048, 6144, 48, 32, 4, experts=128, per_token=8, width=768),
    "Mistral-7B-Instruct-v0.3": _mistral(4096, 14336, 32, 32, 8, vocabulary=32_768),
    "Qwen3-VL-2B-Instruct": _qwen3_vl(2048, 6144, 28, 16, 8, tied=True, vision=_QWEN3_VL_SMALL),
    "Qwen3-VL-4B-Instruct": _qwen3_vl(2560, 9728, 36, 32, 8, tied=True, vision=_QWEN3_VL_SMALL),
    "Qwen3-VL-8B-Instruct": _qwen3_vl(4096, 12288, 36, 32, 8),
    "Qwen3-VL-32B-Instruct": _qwen3_vl(5120, 25600, 64, 64, 8),
    "InternVL3-1B-hf": _internvl("qwen2", 896, 4864, 24, 14, 2, vocabulary=151_674, eps=1e-6),
    "InternVL3-2B-hf": _internvl("qwen2", 1536, 8960, 28, 12, 2, vocabulary=151_674, eps=1e-6),
    "InternVL3-8B-hf": _internvl("qwen2", 3584, 18944, 28, 28, 4, vocabulary=151_674, eps=1e-6),
    "InternVL2_5-8B-MPO-hf": _internvl("llama", 4096, 14336, 32, 32, 8, vocabulary=92_553, eps=1e-5),
}


def find_architecture(settings: ModelConfig) -> tuple[object, str]:
    """Find the transformers config that the settings stand for; return it and its source. Reads no weights.

    Looks at model.init, then at config.json in the folder model.path, then for the path's last part
    among PUBLISHED; never on the network.

    Raises:
        ConfigError: if the family is not supported or transformers refuses the config.
        LookupError: if nothing here knows the architecture; the message says why.
    """
    if settings.init is not None:
        config, origin = _initial_config(settings), "model.init"
        check_family(config)
        return config, origin
    base = locate(settings.path).base if Path(settings.path).is_dir() else settings.path
    if (Path(base) / "config.json").is_file():
        config, origin = _local_config(base), f"{base}/config.json"
    elif (name := Path(base).name) in PUBLISHED:
        config, origin = _make_config(PUBLISHED[name].options, "published config"), f"published config of {name}"
    else:
        raise LookupError(f"no config.json in {base!r}, and its name is not one of {', '.join(PUBLISHED)}")
    check_family(config)
    return config, origin


def meta_network(config, settings: ModelConfig, paradigm: Paradigm = "reward") -> RewardNetwork:
    """Make the network of a training run, its parts frozen, with its adapters, on torch's meta device without memory.

    Of a model that writes, an LM head of its own in the files of model.path counts, if these are here, whatever the
    config says: its tie_word_embeddings is then set to false.

    Raises:
        ConfigError: if the architecture's sizes make no model, or model.freeze does not fit it.
        ConfigError, StorageError: as `untie_as_files`.
    """
    from transformers import AutoModel

    if paradigm != "reward" and settings.path is not None:
        untie_as_files(config, settings.path)
    try:
        with torch.device("meta"):
            backbone = AutoModel.from_config(config, dtype=torch.float32, attn_implementation="eager")
            network = RewardNetwork(backbone, settings.head, pooling=settings.pooling, paradigm=paradigm)
    except ConfigError:
        raise
    except Exception as error:
        raise refusal("model.init" if settings.path is None else f"model.path {settings.path!r}", error) from error
    network.freeze(settings.freeze)
    if settings.lora is not None:
        add_lora(network, settings.lora)
    return network


def _initial_config(settings: ModelConfig):
    """Return model.init with the vocabulary of its tokenizer; a trained one has at most the size asked for."""
    # The defaults of these ids can lie outside a small vocabulary, which embeddings refuse.
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    sizes = {"vocab_size": _vocab_size(settings.tokenizer), **ids}
    options = dict(settings.init)
    if "text_config" in options:
        options["text_config"] = {**options["text_config"], **sizes}
    else:
        options |= sizes
    return _make_config(options, "model.init")


def _vocab_size(tokenizer: str | TrainedTokenizer) -> int:
    if isinstance(tokenizer, TrainedTokenizer):
        return tokenizer.train_vocab_size
    if not Path(tokenizer).is_dir():
        raise LookupError(f"the vocabulary of model.init is that of {tokenizer!r}, which is not a local folder")
    return len(load_tokenizer(tokenizer))


def _make_config(options: dict, what: str):
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**options)
    except Exception as error:
        raise refusal(what, error) from error


def _local_config(path: str):
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a wrong value may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{path}/config.json: not a model configuration: {reason}; is the download whole?") from None
