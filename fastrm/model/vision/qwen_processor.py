"""Qwen-VL's processor for text and images, where torchvision is not installed."""

from collections.abc import Mapping

from transformers import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

# Settings that a video's frames share with images.
_SHARED = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")


class ImageProcessor(Qwen2_5_VLProcessor):
    """The stock processor without its part for videos, the only one that needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, None, chat_template, **kwargs)

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]

    def to_dict(self) -> dict:
        """Return what a folder of the stock processor says, which transformers reads where torchvision is installed.

        Of a class that it does not know, `AutoProcessor` would return the tokenizer alone, without a word.
        """
        images = self.image_processor
        video = {"video_processor_type": "Qwen2VLVideoProcessor"} | {name: getattr(images, name) for name in _SHARED}
        return super().to_dict() | {"processor_class": Qwen2_5_VLProcessor.__name__, "video_processor": video}


def make_processor(tokenizer, path: str | None, limits: Mapping[str, int]) -> ImageProcessor:
    """Make a processor of a tokenizer and the settings of a folder.

    Args:
        path: the folder whose image settings are taken; None: the stock ones.
        limits: min_pixels and max_pixels, which replace those.
    """
    kind = Qwen2VLImageProcessorPil
    images = kind(**limits) if path is None else kind.from_pretrained(path, **limits)
    return ImageProcessor(images, tokenizer, chat_template=tokenizer.chat_template)
