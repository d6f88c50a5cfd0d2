"""A tiny random policy with its processor, as trainers take it."""

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from fastrm.config import ModelConfig
from fastrm.model.network import init_backbone
from fastrm.model.vision.qwen_processor import make_processor
from tests.helpers.support import FAMILIES, make_tokenizer


def vision_policy():
    """A Qwen2.5-VL of random weights that generates, and its processor; images become one to four tokens."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    backbone = init_backbone(ModelConfig(init=FAMILIES["qwen2_5_vl"], tokenizer="unused"), tokenizer)
    processor = make_processor(tokenizer, None, {"min_pixels": 28 * 28, "max_pixels": 56 * 56})
    return Qwen2_5_VLForConditionalGeneration(backbone.config), processor
