"""Images and videos as Qwen2-VL and Qwen2.5-VL read them; equal to the stock processors' values to the bit."""

import functools
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from packaging.version import Version
from PIL import Image

from fastrm.data.media.format import MediaSize, MediaSpan, Patches, PatchFormat, VisionFormat
from fastrm.data.media.images import decode_image, image_size, media_error
from fastrm.data.media.processor_files import VIDEO_FILE, ProcessorSettings, image_settings, video_settings
from fastrm.data.media.videos import VideoHeader, VideoSettings, open_video, sample
from fastrm.data.record import ImageRef, MediaRef, VideoRef
from fastrm.data.tokenizer import special_id
from fastrm.errors import ConfigError, RecordError
from fastrm.json_files import to_json
from fastrm.limits import MediaLimits

# Settings that videos and images must have in common here.
SHARED = (
    "patch_size", "temporal_patch_size", "merge_size", "do_rescale", "rescale_factor", "do_normalize", "image_mean",
    "image_std",
)  # fmt: skip
# Keys of a processor -> keys of a model's vision_config.
_PATCHES = {
    "patch_size": "patch_size", "merge_size": "spatial_merge_size", "temporal_patch_size": "temporal_patch_size",
}  # fmt: skip


class QwenFormat(VisionFormat):
    """The format of Qwen2-VL and Qwen2.5-VL: one token for a square of patches, M-RoPE, and the stock resizing.

    That of Qwen3-VL is derived from it.

    Images are resized by Pillow and videos by torch.

    Args:
        processor: a stock Qwen2-VL image processor, PIL variant. Its patches and its normalisation are those of
            videos too.
        placeholders: ids of <|image_pad|> and <|video_pad|>.
        video: how videos are sampled and resized.
        tokens_per_second: of the vision config of Qwen2.5-VL; None for Qwen2-VL.

    Raises:
        ConfigError: for a processor that does not resize.
    """

    def __init__(
        self,
        processor,
        placeholders: dict[type[MediaRef], int],
        video: VideoSettings | None = None,
        tokens_per_second: float | None = None,
    ):
        if not processor.do_resize or processor.resample not in tuple(Image.Resampling):
            raise ConfigError(
                f"image processor: do_resize is {processor.do_resize} and resample is {processor.resample!r}, wanted "
                "true and a filter, since sides must be multiples of a patch; correct preprocessor_config.json"
            )
        self.processor = processor
        self.placeholders = placeholders
        self.video = video or VideoSettings()
        self.tokens_per_second = tokens_per_second

    # The name of the stock video processor's class, what else its file says, and its rule for which frames it takes.
    video_class = "Qwen2VLVideoProcessor"
    video_extras: ClassVar = {}
    pick_frames = staticmethod(sample)

    @property
    def patch_format(self) -> PatchFormat:
        return PatchFormat.from_processor(self.processor)

    def part(self, ref: MediaRef) -> dict:
        return {"type": ref.noun}

    def measure(self, ref: MediaRef, limits: MediaLimits) -> MediaSize:
        if isinstance(ref, VideoRef):
            with open_video(ref, self.video, limits) as video:
                return self._video_size(video.header, ref)
        return self.image_tokens(*image_size(ref, limits), ref)

    def cut(self, ref: MediaRef, size: MediaSize, limits: MediaLimits) -> Patches:
        if isinstance(ref, VideoRef):
            return self._cut_video(ref, size, limits)
        image = decode_image(ref, limits)
        if self.image_tokens(*image.size, ref) != size:
            # The conversation was tokenised for the size that the file had when it was measured.
            raise media_error(ref, "CHANGED", "has another size than when it was first read")
        return self.cut_image(image, size)

    def image_tokens(self, width: int, height: int, ref: ImageRef) -> MediaSize:
        """Return the tokens of an image of this many pixels.

        Raises:
            RecordError: IMAGE_ASPECT.
        """
        limits = self.processor.size
        return MediaSize(1, *self._tokens(height, width, limits["shortest_edge"], limits["longest_edge"], ref))

    def cut_image(self, image: Image.Image, size: MediaSize) -> Patches:
        """Resize an RGB image to its tokens and cut it into patches."""
        height, width = self._pixels(size)
        # The stock processor resizes with the same call of Pillow.
        pixels = np.asarray(image.resize((width, height), Image.Resampling(self.processor.resample)))
        return Patches(*self.patch_format.cut(pixels[None]))

    def _cut_video(self, ref: VideoRef, size: MediaSize, limits: MediaLimits) -> Patches:
        num_stored = self.processor.temporal_patch_size
        shape = self._pixels(size)
        frames = np.empty((size.frames * num_stored, *shape, 3), dtype=np.uint8)
        with open_video(ref, self.video, limits) as video:
            if self._video_size(video.header, ref) != size:
                raise media_error(ref, "CHANGED", "has other frames than when it was first read")
            num_sampled = min(video.header.num_frames, self.video.num_frames)
            for number, frame in enumerate(video.frames(num_sampled, self.pick_frames)):
                frames[number] = resize_frame(frame, *shape)
        # The stock processor fills a last patch with its last frame.
        frames[num_sampled:] = frames[num_sampled - 1]
        return Patches(*self.patch_format.cut(frames, num_stored))

    def positions(self, num_tokens: int, spans: Sequence[MediaSpan]) -> np.ndarray:
        return mrope_positions(num_tokens, spans, self.tokens_per_second)

    @property
    def stock_reads_videos_alike(self) -> bool:
        return self.tokens_per_second is None or stock_keeps_video_seconds()

    def stock_times(self, spans: Sequence[MediaSpan]) -> dict[str, torch.Tensor]:
        if self.tokens_per_second is None:
            return {}
        return {"second_per_grid_ts": torch.tensor([span.size.seconds for span in spans])}

    def save(self, folder: Path) -> None:
        self.processor.save_pretrained(folder)
        stock = {
            "video_processor_type": self.video_class,
            "size": {"shortest_edge": self.video.min_pixels, "longest_edge": self.video.max_pixels},
            "num_frames": self.video.num_frames,
            "do_sample_frames": True,
            "frame_folder_fps": self.video.folder_fps,  # our own key; the stock class keeps keys that it does not know
        }
        stock |= {name: getattr(self.processor, name) for name in SHARED} | self.video_extras
        (folder / VIDEO_FILE).write_text(to_json(stock, indent=2, sort_keys=True) + "\n")

    def _video_size(self, header: VideoHeader, ref: VideoRef) -> MediaSize:
        num_frames, width, height, fps = header
        num_sampled = min(num_frames, self.video.num_frames)
        num_stored = self.processor.temporal_patch_size
        rows, columns = self._tokens(height, width, self.video.min_pixels, self.video.max_pixels, ref)
        # The stock processor computes `second_per_grid_ts` like this, from the frames that it has sampled.
        seconds = num_stored / (num_sampled / num_frames * fps)
        if self.tokens_per_second is not None and seconds % 1:
            _say_where_stock_differs()
        return MediaSize(-(-num_sampled // num_stored), rows, columns, seconds)

    def _tokens(self, height: int, width: int, min_pixels: int, max_pixels: int, ref: MediaRef) -> tuple[int, int]:
        """Return rows and columns of tokens of a picture of this many pixels."""
        factor = self.processor.patch_size * self.processor.merge_size
        # The rule of the stock processor itself, from the module that its class comes from; that of videos is the same.
        smart_resize = sys.modules[type(self.processor).__module__].smart_resize
        try:
            height, width = smart_resize(height, width, factor, min_pixels=min_pixels, max_pixels=max_pixels)
        except ValueError:
            raise self.wrong_aspect(ref, width, height) from None
        return height // factor, width // factor

    @staticmethod
    def wrong_aspect(ref: MediaRef, width: int, height: int) -> RecordError:
        """Return the error for a shape that the stock rule of sizes refuses."""
        return media_error(ref, "ASPECT", f"is {width} x {height}; the model accepts ratios up to 200; crop it")

    def _pixels(self, size: MediaSize) -> tuple[int, int]:
        factor = self.processor.patch_size * self.processor.merge_size
        return size.height * factor, size.width * factor


def resize_frame(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 to (height, width, 3) uint8, bicubic with antialiasing.

    torchvision resizes uint8 tensors on a CPU with this call of torch, so the values are the stock video
    processor's. They are not Pillow's: its filter is another, and rounds in between.
    """
    # Channels last, as the frame comes: the same values as from planes, in half the time.
    pixels = torch.from_numpy(frame).permute(2, 0, 1).unsqueeze(0)
    resized = torch.nn.functional.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def load_qwen_format(
    vision_config, tokenizer, folder: str | None, video: VideoSettings | None = None, *,
    min_pixels: int | None = None, max_pixels: int | None = None,
    image_mean: list[float] | None = None, image_std: list[float] | None = None,
) -> QwenFormat:  # fmt: skip
    """Load the format of a model folder, or of a vision config; an argument that is not None replaces its setting.

    The PIL variant of the stock image processor is used on every machine: the torchvision variant
    resizes with other rounding, and rewards should not depend on what is installed.

    Args:
        vision_config: of a stock Qwen2-VL or Qwen2.5-VL model.
        folder: where preprocessor_config.json is, a folder or a hub id; None: the class's defaults.

    Raises:
        ConfigError: if the tokenizer has no <|image_pad|>, if the settings of a processor are missing or cannot be
            read as the stock processor reads them, or the processor does not resize.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    if folder is not None:
        processor = load_image_processor(vision_config, folder, min_pixels, max_pixels)
    else:
        processor = Qwen2VLImageProcessorPil(
            patch_size=vision_config.patch_size,
            merge_size=vision_config.spatial_merge_size,
            temporal_patch_size=vision_config.temporal_patch_size,
        )
        processor.size = {"shortest_edge": min_pixels or processor.size["shortest_edge"],
                          "longest_edge": max_pixels or processor.size["longest_edge"]}  # fmt: skip
    processor.image_mean = image_mean or processor.image_mean
    processor.image_std = image_std or processor.image_std
    if video is None and folder is not None:
        usual = {name: getattr(Qwen2VLImageProcessorPil, name) for name in SHARED}  # the class for videos has them too
        usual["size"] = {"shortest_edge": VideoSettings.min_pixels, "longest_edge": VideoSettings.max_pixels}
        video = stored_video_settings(video_settings(folder), processor, QwenFormat.video_class, usual)
    placeholders = media_placeholders(tokenizer)
    return QwenFormat(processor, placeholders, video, getattr(vision_config, "tokens_per_second", None))


def load_image_processor(vision_config, folder: str, min_pixels: int | None, max_pixels: int | None):
    """Load the PIL variant of the stock image processor of a model folder; a limit that is not None replaces its own.

    Raises:
        ConfigError: if its settings are missing, of another model, or cannot be read as the stock processor reads them.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    settings = image_settings(folder)
    processor = settings.make(Qwen2VLImageProcessorPil)
    _check_patches(processor, vision_config, settings)
    processor.size = _limits(processor.size, min_pixels, max_pixels, settings)
    return processor


def media_placeholders(tokenizer) -> dict[type[MediaRef], int]:
    """Return the ids of <|image_pad|> and, if the tokenizer has it, <|video_pad|>.

    Raises:
        ConfigError: without <|image_pad|>.
    """
    ids = {kind: special_id(tokenizer, f"<|{kind.noun}_pad|>") for kind in (ImageRef, VideoRef)}
    if ids[ImageRef] is None:
        raise ConfigError("the tokenizer has no special token <|image_pad|>; wanted that of the model's family")
    return {kind: number for kind, number in ids.items() if number is not None}


def _limits(size, min_pixels: int | None, max_pixels: int | None, settings: ProcessorSettings) -> dict[str, int]:
    """Return the limits of an image's pixels: the arguments, else the file's."""
    found = {"shortest_edge": min_pixels or size.get("shortest_edge"),
             "longest_edge": max_pixels or size.get("longest_edge")}  # fmt: skip
    for (edge, pixels), beside in zip(found.items(), ("min_pixels", "max_pixels"), strict=True):
        if not isinstance(pixels, int) or pixels <= 0:
            got = settings.values.get("size")
            raise settings.refuse("size", f"is {got}, wanted {edge} in it, or {beside} beside it: a number of pixels")
    return found


def _check_patches(processor, vision_config, settings: ProcessorSettings) -> None:
    """Refuse patches of another shape than the tower's: a folder may hold another model's preprocessor_config.json."""
    for key, of_model in _PATCHES.items():
        found, wanted = getattr(processor, key), getattr(vision_config, of_model)
        if found != wanted:
            of_model = f"{of_model} of vision_config in config.json"
            raise settings.refuse(key, f"is {found!r}, but {of_model} is {wanted!r}; take the file of this model")


def stored_video_settings(
    settings: ProcessorSettings, processor, video_class: str, usual: Mapping[str, Any]
) -> VideoSettings:
    """Return the sampling and sizes of videos by the files of a model.

    The stock processor takes all frames that it is given unless `do_sample_frames` is true; its callers sample before,
    as fastrm does by its own default.

    Args:
        settings: of the video processor.
        processor: that of images. Its patches and normalisation are those of videos here.
        video_class: name of the stock class.
        usual: its size and the settings of SHARED, for those that the file has not.

    Raises:
        ConfigError: for settings that would be read as others.
    """
    settings.check_type("video_processor_type", video_class)
    values, kind = settings.values, type(processor)
    for key in SHARED:
        wanted, found = getattr(processor, key), values.get(key, usual[key])
        if not np.array_equal(found, wanted):
            raise settings.refuse(key, f"is {found!r}, that of images is {wanted!r}; only one for both is supported")
    for key, wanted in {"cap_pixels_per_frame": False, "do_resize": True, "resample": Image.Resampling.BICUBIC}.items():
        if (found := values.get(key)) is not None and found != wanted:
            raise settings.refuse(key, f"is {found!r}, which is not supported for videos; wanted {wanted!r}")
    # The class for images takes limits by the same rule as that for videos, which needs torchvision.
    sizes = {"size": dict(usual["size"])}
    sizes |= {key: values[key] for key in ("size", "min_pixels", "max_pixels") if values.get(key) is not None}
    limits = _limits(replace(settings, values=sizes).make(kind).size, None, None, settings)
    num_frames, depth = VideoSettings.num_frames, processor.temporal_patch_size
    if values.get("do_sample_frames") and values.get("num_frames") is not None:
        num_frames = values["num_frames"]
        if num_frames % depth and "frame_folder_fps" not in values:  # not written by fastrm
            raise settings.refuse("num_frames", f"is {num_frames}, wanted a multiple of temporal_patch_size, {depth}")
    elif values.get("do_sample_frames") and values.get("fps") is not None:
        raise settings.refuse("fps", f"is {values['fps']}: frames a second are not supported; wanted num_frames")
    fps = values.get("frame_folder_fps", VideoSettings.folder_fps)
    return VideoSettings(num_frames, limits["shortest_edge"], limits["longest_edge"], fps)


def stock_keeps_video_seconds() -> bool:
    """Return whether transformers gives frames of Qwen2.5-VL videos our positions, as from 5.18 on."""
    import transformers

    return Version(transformers.__version__) >= Version("5.18")


@functools.cache
def _say_where_stock_differs() -> None:
    """Warn, once in each process, that this transformers gives the frames of a video other times."""
    import transformers

    if not stock_keeps_video_seconds():
        warnings.warn(
            f"transformers {transformers.__version__} rounds the seconds between the frames of Qwen2.5-VL videos down; "
            "fastrm does as 5.18 and newer, so that version's own rewards of videos are others: use 5.18 or newer",
            stacklevel=2,
        )


def mrope_positions(num_tokens: int, spans: Sequence[MediaSpan], tokens_per_second: float | None) -> np.ndarray:
    """Return the rotary positions (3, num_tokens) int64 of a conversation as Qwen2-VL defines them (M-RoPE).

    A text token takes the next position on all three axes (time, height, width). The tokens of an image or a video,
    planes of h x w, start at the next position p: token (row, column) of plane t takes
    (p + time of plane t, p + row, p + column). The text after it continues at p + max(h, w), also where a video reaches
    further than that in time. Each plane of a Qwen3-VL video is a span of its own, with text before it. Our positions
    equal those of `get_rope_index` of transformers from 5.18 on (5.17 cuts the seconds between a video's planes to
    whole numbers).
    Source: Qwen2-VL (arXiv 2409.12191), section 2.1; Qwen2.5-VL (arXiv 2502.13923), section 2.1.2.

    Args:
        num_tokens: length of the conversation, tokens of media included.
        spans: of its media, in order.
        tokens_per_second: a second's length on the time axis (Qwen2.5-VL); None: a plane's is 1 (Qwen2-VL).
    """
    positions = np.empty((3, num_tokens), dtype=np.int64)
    token = position = 0
    for span in spans:
        text = span.start - token
        positions[:, token : span.start] = np.arange(position, position + text)
        position += text
        _, height, width, seconds, _ = span.size
        planes = np.empty((3, span.num_planes, height, width), dtype=np.int64)
        planes[0] = position + _times(span.num_planes, seconds, tokens_per_second)[:, None, None]
        planes[1] = position + np.arange(height)[:, None]
        planes[2] = position + np.arange(width)
        positions[:, span.start : span.stop] = planes.reshape(3, -1)
        position += max(height, width)
        token = span.stop
    positions[:, token:] = np.arange(position, position + num_tokens - token)
    return positions


def _times(frames: int, seconds: float, tokens_per_second: float | None) -> np.ndarray:
    """Return the places (frames,) int64 of planes on the time axis: float32 as in the stock model, then cut."""
    if tokens_per_second is None or not seconds:
        return np.arange(frames)
    interval = np.float32(tokens_per_second) * np.float32(seconds)
    return (np.arange(frames, dtype=np.float32) * interval).astype(np.int64)
