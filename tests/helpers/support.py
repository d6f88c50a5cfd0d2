"""Tiny models of each family, and groups with every awkward shape, for the tests."""

import io

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image

from fastrm.config import HeadConfig, ModelConfig
from fastrm.data.media.format import FormatSettings
from fastrm.data.media.videos import VideoSettings
from fastrm.data.record import ImageRef, Message, Preference, Record, Response
from fastrm.data.tokenizer import train_tokenizer
from fastrm.limits import MediaLimits
from fastrm.model.families import chat_layout

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
FAMILIES = {
    "qwen2_5_vl": {
        "model_type": "qwen2_5_vl",
        "text_config": {**TEXT, "rope_parameters": MROPE},
        "vision_config": {
            "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
            "out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 56,
        },
    },
    "qwen2_vl": {
        "model_type": "qwen2_vl",
        "text_config": {**TEXT, "rope_parameters": MROPE},
        "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2, "num_heads": 2},
    },
    "qwen3_vl": {
        "model_type": "qwen3_vl",
        "text_config": {
            **TEXT, "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
        },
        # Deepstack features behind the first and the last block; 5 x 5 learned positions.
        "vision_config": {
            "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 14,
            "out_hidden_size": 32, "num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2],
        },
    },
    "internvl": {
        "model_type": "internvl",
        "text_config": {"model_type": "qwen2", **TEXT},
        # Tiles of 4 x 4 patches, which are four image tokens.
        "vision_config": {
            "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
            "image_size": [56, 56], "attention_bias": True,
        },
    },
    "qwen2": {"model_type": "qwen2", **TEXT},
    "qwen3": {"model_type": "qwen3", **TEXT, "head_dim": 16},
    "llama": {"model_type": "llama", **TEXT},
    # The second layer of both has no experts.
    "qwen2_moe": {
        "model_type": "qwen2_moe", **TEXT, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40, "mlp_only_layers": [1],
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe", **TEXT, "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 3,
        "moe_intermediate_size": 24, "norm_topk_prob": True, "mlp_only_layers": [1],
    },
    "mistral": {"model_type": "mistral", **TEXT, "sliding_window": None},
}  # fmt: skip
# For what the interpreter alone can do, or what would only compile for minutes on a GPU.
needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="runs in Triton's interpreter: hide the GPU with CUDA_VISIBLE_DEVICES="
)
needs_published_internvl_names = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="transformers up to 5.22 does not rename the weights of published InternVL checkpoints",
)
WORDS = ["the", "a", "red", "blue", "cat", "dog", "sits", "on", "Is", "this?", "yes", "no", "1", "2", "3", "\n", "so"]


def make_tokenizer(layout="qwen"):
    texts = [" ".join(np.random.default_rng(i).choice(WORDS, 12)) for i in range(50)]
    return train_tokenizer([(Message("user", (text,)),) for text in texts], 300, layout)


def make_model(family, *, head=None, seed=0, dtype=torch.float32, pooling="anchor", paradigm="reward"):
    """A tiny random RewardNetwork with its encoder, ready for CPU."""
    from fastrm.model.export import make_encoder
    from fastrm.model.network import RewardNetwork, init_backbone

    torch.manual_seed(seed)
    tokenizer = make_tokenizer(chat_layout(FAMILIES[family]["model_type"]))
    settings = ModelConfig(init=FAMILIES[family], tokenizer="unused")
    backbone = init_backbone(settings, tokenizer)
    # Default initialisation leaves all biases and positions 0 and norms 1, which would hide a dropped one.
    for parameter in backbone.parameters():
        if parameter.ndim in (1, 3):
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        else:
            parameter.data.mul_(2.0)
    video = VideoSettings(num_frames=6, min_pixels=28 * 28, max_pixels=28 * 28 * 12)
    settings = FormatSettings(min_pixels=28 * 28, max_pixels=28 * 28 * 40, max_tiles=4, video=video)
    encoder = make_encoder(backbone.config, tokenizer, None, "last_token", MediaLimits(), settings)
    model = RewardNetwork(backbone, head or HeadConfig(), encoder, pooling, paradigm)
    model.set_kernels(dtype, attention="sdpa")
    # As transformers loads them: buffers, the rotary frequencies, stay float32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def make_image(width, height, seed=0) -> ImageRef:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return ImageRef(data=buffer.getvalue())


def words(rng, count) -> str:
    return " ".join(rng.choice(WORDS, count))


def make_record(seed, *, num_responses=2, images=(), prompt_words=20, response_words=(1, 30), prompt=None, id=None):
    """A record with all pairs (earlier response preferred) and random text."""
    rng = np.random.default_rng(seed)
    text = words(rng, prompt_words) if prompt is None else prompt
    question = Message("user", (*images, text) if images else (text,))
    responses = tuple(
        Response((question, Message("assistant", (words(rng, int(rng.integers(*response_words))) + f" {n}",))))
        for n in range(num_responses)
    )
    preferences = tuple(Preference(a, b) for a in range(num_responses) for b in range(a + 1, num_responses))
    return Record(id or f"r{seed}", responses, preferences, "test", f"test:{seed}")


def pack_of(model, records, share=True):
    """One pack of all records."""
    from fastrm.data.batching import PackPlan
    from fastrm.data.loader import PackBuilder

    loaded = PackBuilder(records, model.encoder, share)[PackPlan(tuple(range(len(records))), 0, True)]
    assert not loaded.refused, loaded.refused
    return loaded.pack
