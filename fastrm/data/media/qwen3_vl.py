"""Images and videos as Qwen3-VL reads them; equal to the stock processors' values to the bit.

Images are read as by Qwen2-VL. A video stands in the conversation plane by plane, each behind the time that it shows,
in tokens of text: `<1.5 seconds>`; so positions know no times. Its limits of pixels are of all frames together.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from fastrm.data.media.format import FormatSettings, MediaRun, MediaSize
from fastrm.data.media.images import media_error
from fastrm.data.media.processor_files import video_settings
from fastrm.data.media.qwen2_vl import (
    SHARED,
    QwenFormat,
    load_image_processor,
    media_placeholders,
    stored_video_settings,
)
from fastrm.data.media.videos import VideoHeader, VideoSettings
from fastrm.data.record import MediaRef, VideoRef
from fastrm.data.tokenizer import special_id
from fastrm.errors import ConfigError

# What the published models' processor files say. Source: the model cards' files, and transformers' class for videos.
PUBLISHED_SIZE = {"shortest_edge": 256 * 256, "longest_edge": 4096 * 4096}
PUBLISHED_MEAN = PUBLISHED_STD = [0.5, 0.5, 0.5]
# The size of the stock class for videos, whose files have another.
CLASS_VIDEO_SIZE = {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32}


def spread(total: int, num_frames: int) -> list[int]:
    """Return the numbers of `num_frames` evenly spaced frames out of `total`, from the first to the last.

    It is the rule of the stock Qwen3-VL video processor.
    """
    return np.linspace(0, total - 1, num_frames).round().astype(int).tolist()


class Qwen3VLFormat(QwenFormat):
    """The format of Qwen3-VL.

    Args:
        processor: a stock Qwen2-VL image processor, PIL variant, which Qwen3-VL has too.
        placeholders: ids of <|image_pad|> and <|video_pad|>.
        video: how videos are sampled and resized; its limits of pixels are of all frames together, as stock's are.
        opening, closing: ids of <|vision_start|> and <|vision_end|>, which stand around each plane of a video.

    Raises:
        ConfigError: for a processor that does not resize.
    """

    video_class = "Qwen3VLVideoProcessor"
    video_extras: ClassVar = {"fps": None}  # the class samples frames a second unless it is told not to
    pick_frames = staticmethod(spread)

    def __init__(
        self, processor, placeholders: dict[type[MediaRef], int], video: VideoSettings, opening: int, closing: int
    ):
        super().__init__(processor, placeholders, video)
        self._around = (opening,), (closing,)

    def runs(self, ref: MediaRef, size: MediaSize) -> Sequence[MediaRun]:
        if not isinstance(ref, VideoRef):
            return super().runs(ref, size)
        planes = enumerate(size.times)
        return [MediaRun(f"<{time:.1f} seconds>", *self._around, range(plane, plane + 1)) for plane, time in planes]

    def _video_size(self, header: VideoHeader, ref: VideoRef) -> MediaSize:
        from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

        total, width, height, fps = header
        depth, factor = self.processor.temporal_patch_size, self.processor.patch_size * self.processor.merge_size
        numbers = spread(total, min(total, self.video.num_frames))
        if len(numbers) < depth:
            raise media_error(
                ref, "TOO_SHORT", f"has {total} frames, the model reads videos of at least {depth}; give it as an image"
            )
        limits = {"min_pixels": self.video.min_pixels, "max_pixels": self.video.max_pixels}
        try:
            rows, columns = smart_resize(len(numbers), height, width, depth, factor, **limits)
        except ValueError:
            raise self.wrong_aspect(ref, width, height) from None
        numbers += numbers[-1:] * (-len(numbers) % depth)
        seconds = [number / fps for number in numbers]
        # A plane's time is the middle of its first and its last frame's.
        times = tuple((seconds[n] + seconds[n + depth - 1]) / 2 for n in range(0, len(seconds), depth))
        return MediaSize(len(times), rows // factor, columns // factor, times=times)


def load_qwen3_vl_format(vision_config, tokenizer, folder: str | None, settings: FormatSettings) -> Qwen3VLFormat:
    """Load the format of a model folder, or of a vision config; a setting that is not None replaces the folder's.

    As for Qwen2-VL, the PIL variant of the stock image processor is used on every machine. Limits of a video's pixels
    in `settings` are for a frame of a video that has all its frames, as for other families.

    Args:
        vision_config: of a stock Qwen3-VL model.
        folder: where preprocessor_config.json is, a folder or a hub id; None: the published settings.

    Raises:
        ConfigError: if the tokenizer lacks <|image_pad|>, <|vision_start|> or <|vision_end|>, or as `load_qwen_format`.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    usual = {
        "patch_size": vision_config.patch_size, "merge_size": vision_config.spatial_merge_size,
        "temporal_patch_size": vision_config.temporal_patch_size, "image_mean": PUBLISHED_MEAN,
        "image_std": PUBLISHED_STD,
    }  # fmt: skip
    if folder is not None:
        processor = load_image_processor(vision_config, folder, settings.min_pixels, settings.max_pixels)
    else:
        processor = Qwen2VLImageProcessorPil(**usual)
        processor.size = {"shortest_edge": settings.min_pixels or PUBLISHED_SIZE["shortest_edge"],
                          "longest_edge": settings.max_pixels or PUBLISHED_SIZE["longest_edge"]}  # fmt: skip
    processor.image_mean = settings.image_mean or processor.image_mean
    processor.image_std = settings.image_std or processor.image_std
    video = settings.video
    if video is None and folder is not None:
        usual = {name: getattr(Qwen2VLImageProcessorPil, name) for name in SHARED} | usual | {"size": CLASS_VIDEO_SIZE}
        video = stored_video_settings(video_settings(folder), processor, Qwen3VLFormat.video_class, usual)
    else:
        video = _of_all_frames(video or VideoSettings())
    around = [special_id(tokenizer, f"<|vision_{name}|>") for name in ("start", "end")]
    if None in around:
        raise ConfigError(
            "the tokenizer has no special token <|vision_start|> or <|vision_end|>; wanted that of the model's family"
        )
    return Qwen3VLFormat(processor, media_placeholders(tokenizer), video, *around)


def _of_all_frames(video: VideoSettings) -> VideoSettings:
    """Return settings whose limits of pixels are of all frames together."""
    number = video.num_frames
    return replace(video, min_pixels=number * video.min_pixels, max_pixels=number * video.max_pixels)
