"""Tiny random policies with processors, as trainers take them."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from fastrm.config import ModelConfig
from fastrm.model.network import init_backbone
from tests.helpers.support import FAMILIES, make_tokenizer


class ImageOnlyProcessor(Qwen2_5_VLProcessor):
    """The stock processor without its video processor, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, None, chat_template, **kwargs)

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]


def vision_policy():
    """A Qwen2.5-VL of random weights that generates, and its processor; images become one to four tokens."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    backbone = init_backbone(ModelConfig(init=FAMILIES["qwen2_5_vl"], tokenizer="unused"), tokenizer)
    pictures = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56)
    processor = ImageOnlyProcessor(pictures, tokenizer, chat_template=tokenizer.chat_template)
    return Qwen2_5_VLForConditionalGeneration(backbone.config), processor


def text_policy():
    """A Qwen2 of random weights that generates, and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    backbone = init_backbone(ModelConfig(init=FAMILIES["qwen2"], tokenizer="unused"), tokenizer)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**backbone.config.to_dict())), tokenizer
