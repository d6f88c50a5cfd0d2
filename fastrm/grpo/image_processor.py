"""Qwen-VL's processor for text and images, where torchvision is not installed."""

from transformers import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


class ImageProcessor(Qwen2_5_VLProcessor):
    """The stock processor without its part for videos, the only one that needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, None, chat_template, **kwargs)

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]


def make_processor(tokenizer, path: str | None, limits: dict[str, int]) -> ImageProcessor:
    """Make a processor of a tokenizer and the settings of a folder.

    Args:
        path: the folder whose image settings are taken; None: the stock ones.
        limits: min_pixels and max_pixels, which replace those.
    """
    kind = Qwen2VLImageProcessorPil
    images = kind(**limits) if path is None else kind.from_pretrained(path, **limits)
    return ImageProcessor(images, tokenizer, chat_template=tokenizer.chat_template)
