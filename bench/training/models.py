"""Random models of the published shapes, and a small one; no hub and no tokenizer is needed."""

import torch
from transformers import AutoConfig, AutoModel

from bench.training.workloads import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START, random_network, vision_config
from fastrm.config import Config, HeadConfig
from fastrm.model.network import RewardNetwork

PUBLISHED_NAMES = {"3B": "Qwen2.5-VL-3B-Instruct", "7B": "Qwen2.5-VL-7B-Instruct"}


def training_config(model: str, checkpointing: str, overrides: dict | None = None) -> Config:
    """Return the settings of every variant: those of configs/full.yaml that a step depends on.

    The small model computes in float32. A large model's matrices are bf16 with 8-bit moments in all variants, so that
    the plain trainer fits the GPU as well.
    """
    small = model == "small"
    tree = {
        "model": {
            "init": {"model_type": "qwen2_5_vl"}, "tokenizer": "none", "freeze": [] if small else ["vision"],
            "activation_checkpointing": checkpointing,
        },
        "optim": {"lr": 1e-6, "states": "fp32" if small else "8bit"},
        "precision": {"dtype": "fp32" if small else "bf16", "weights": "fp32" if small else "bf16"},
    }  # fmt: skip
    for section, values in (overrides or {}).items():
        tree[section] |= values
    return Config.model_validate(tree)


def checkpointing_modes(model: str, plain: bool) -> tuple[str, ...]:
    """Return a variant's modes of activation checkpointing; each is tried if the one before does not fit."""
    if model == "small":
        return ("none",)
    # `fastrm plan` predicts 113 GiB for the 7B with selective checkpointing here. Stock transformers has none:
    # peers recompute whole layers.
    is_large = not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory >= 120 * 2**30
    return ("selective", "full") if is_large and not plain else ("full",)


def make_network(model: str, device: str, num_layers: int | None = None) -> RewardNetwork:
    """Make a network of random weights, the same at every call.

    Args:
        num_layers: of the language model and of the vision tower, for a gate in float32; None for all.
    """
    if model == "small":
        return random_network(vision_config(), HeadConfig()).to(device)
    config = published_config(model, num_layers)
    torch.manual_seed(0)
    with torch.device(device):
        backbone = AutoModel.from_config(config, dtype=torch.float32, attn_implementation="eager")
        network = RewardNetwork(backbone, HeadConfig())
    network.freeze(["vision"])
    return network.train()


def matmul_sizes(model: str) -> list[tuple[int, int, int]]:
    """Return (rows, inner, columns) of the model's large products, and of the square one of data sheets."""
    if model == "small":
        return [(2048, 2048, 2048)]
    text = published_config(model).text_config
    return [(8192, 8192, 8192), (16_384, text.hidden_size, text.intermediate_size)]


def published_config(model: str, num_layers: int | None = None):
    """Return the transformers config of a published shape, with the special tokens of workloads.py."""
    from fastrm.model.architectures import PUBLISHED

    options = dict(PUBLISHED[PUBLISHED_NAMES[model]].options)
    if num_layers is not None:
        options["text_config"] = {**options["text_config"], "num_hidden_layers": num_layers}
        options["vision_config"] = {
            **options["vision_config"], "depth": num_layers, "fullatt_block_indexes": [num_layers - 1],
        }  # fmt: skip
    return AutoConfig.for_model(
        **options,
        image_token_id=IMAGE_PAD, video_token_id=VIDEO_PAD,
        vision_start_token_id=VISION_START, vision_end_token_id=VISION_END,
    )  # fmt: skip
