"""Decoding of a `VideoRef` to evenly spaced frames, from a video file or a folder of pictures.

Videos come from strangers. Only MP4, QuickTime, Matroska and WebM containers are parsed, with the codecs of CODECS;
bytes, pixels and seconds are compared with their limits before a frame is decoded. The file is handed to FFmpeg
as an open object: no name in it is ever opened. Planning reads the container's header, or lists the folder.

A frame's pixels are those of PyAV's `to_ndarray`, which is the stock PyAV reader's too; like it, a rotation that
the container asks for is not applied.
"""

import os
import posixpath
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
from packaging.version import Version

from fastrm.data.media.archives import folder_members
from fastrm.data.media.images import (
    decode_image,
    image_size,
    media_error,
    naming_archive,
    naming_damage,
    naming_missing,
    open_bytes,
)
from fastrm.data.record import ImageRef, VideoRef
from fastrm.errors import ConfigError, RecordError
from fastrm.limits import MediaLimits

CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4")
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
HEADER_BYTES = 12
# (frames of a video, frames that are wanted) -> their numbers, rising
Pick = Callable[[int, int], Sequence[int]]


@dataclass(frozen=True)
class VideoSettings:
    """Settings for the frames of a video.

    Attributes:
        num_frames: evenly spaced frames of a video; one that has fewer gives all.
        min_pixels, max_pixels: frames are resized to this many (the stock video processor's limits and rule).
        folder_fps: frames per second of a folder, which does not say (the stock processor's assumption).
    """

    num_frames: int = 32
    min_pixels: int = 128 * 28 * 28
    max_pixels: int = 768 * 28 * 28
    folder_fps: float = 24.0


class VideoHeader(NamedTuple):
    """The header of a video, as counting needs it; `fps` are frames per second."""

    num_frames: int
    width: int
    height: int
    fps: float


def sample(total: int, num_frames: int) -> list[int]:
    """Return the numbers of `num_frames` evenly spaced frames out of `total`, from the first on.

    It is the stock processor's rule for a given number of frames: the floor of n * total / num_frames.
    """
    return [number * total // num_frames for number in range(num_frames)]


class Video(Protocol):
    """An open video: `header` is known, and `frames` decodes the sampled ones in order, one at a time in memory."""

    header: VideoHeader

    def frames(self, num_frames: int, pick: Pick = sample) -> Iterator[np.ndarray]:
        """Yield frames (H, W, 3) uint8 RGB: of all, those that `pick` says."""


@contextmanager
def open_video(ref: VideoRef, settings: VideoSettings, limits: MediaLimits) -> Iterator[Video]:
    """Open a video: its header is read and within its limits; nothing is decoded yet.

    Args:
        limits: limits of a video, and of a frame.

    Raises:
        RecordError: VIDEO_MISSING, VIDEO_NOT_A_FILE, VIDEO_TOO_LARGE (bytes or pixels), VIDEO_TOO_LONG, VIDEO_FORMAT,
            VIDEO_DAMAGED, VIDEO_EMPTY for a folder without frames. `frames`: VIDEO_DAMAGED too if one cannot be
            decoded or has another size than the header's.
        ConfigError: if PyAV is not installed.
    """
    frames = frame_refs(ref)
    if frames is not None:
        video = _FrameFolder(ref, frames, settings, limits)
        _check_seconds(ref, video.header, limits)
        yield video
        return
    with open_bytes(ref, limits) as file:
        video = _VideoFile(ref, file, settings, limits)
        try:
            _check_seconds(ref, video.header, limits)
            yield video
        finally:
            video.close()


def frame_refs(ref: VideoRef) -> list[ImageRef] | None:
    """Return the pictures of a folder of frames, on disk or in an archive; None for a video that is no folder.

    They are in the order of their names, in which numbers count as numbers. Files that are no pictures by their suffix,
    and hidden ones (such as the ``._1.jpg`` that macOS puts into archives), are no frames.

    Raises:
        RecordError: VIDEO_EMPTY if the folder has no frames; VIDEO_MISSING or VIDEO_DAMAGED if it, or its archive,
            cannot be read.
    """
    if ref.path is None or ref.span is not None:
        return None
    with naming_missing(ref), naming_archive(ref):
        if ref.member is not None:
            names = folder_members(ref.path, ref.member)
        else:
            names = os.listdir(ref.path) if os.path.isdir(ref.path) else None
    if names is None:
        return None
    names = [name for name in names if name.lower().endswith(FRAME_SUFFIXES) and posixpath.basename(name)[0] != "."]
    if not names:
        raise media_error(ref, "EMPTY", f"has no frames; wanted a folder of {', '.join(FRAME_SUFFIXES)} files")
    names.sort(key=lambda name: (_natural(name), name))
    if ref.member is not None:
        return [ImageRef(path=ref.path, member=name) for name in names]
    return [ImageRef(path=os.path.join(ref.path, name)) for name in names]


@contextmanager
def naming_frame(ref: VideoRef):
    """Report an error of a frame in a folder as one of the video."""
    try:
        yield
    except RecordError as error:
        problem = error.code.removeprefix("IMAGE_")
        raise media_error(ref, problem, f"has a bad frame: {error.message}") from error


def _check_seconds(ref: VideoRef, header: VideoHeader, limits: MediaLimits) -> None:
    seconds, limit = header.num_frames / header.fps, limits.max_video_seconds
    if seconds > limit:
        text = f"is {seconds:,.1f} s long, limit {limit:,.1f} s; raise data.max_video_seconds or cut it"
        raise media_error(ref, "TOO_LONG", text)


def _check_shape(ref: VideoRef, header: VideoHeader, frame: np.ndarray) -> np.ndarray:
    height, width = frame.shape[:2]
    if (width, height) != (header.width, header.height):
        raise media_error(
            ref,
            "DAMAGED",
            f"has a frame of {width} x {height} where others are {header.width} x {header.height}; make it again",
        )
    return frame


class _FrameFolder:
    """A video whose frames are separate pictures."""

    def __init__(self, ref: VideoRef, frames: list[ImageRef], settings: VideoSettings, limits: MediaLimits):
        self._ref, self._frames, self._limits = ref, frames, limits
        with naming_frame(ref):
            self.header = VideoHeader(len(frames), *image_size(frames[0], limits), settings.folder_fps)

    def frames(self, num_frames: int, pick: Pick = sample) -> Iterator[np.ndarray]:
        for number in pick(len(self._frames), num_frames):
            with naming_frame(self._ref):
                # Copied, since torch warns of read-only arrays such as Pillow's.
                frame = np.array(decode_image(self._frames[number], self._limits))
            yield _check_shape(self._ref, self.header, frame)


def _natural(name: str) -> list[str | tuple[int, str]]:
    """Split a name into texts and numbers; a number is kept as its digits, which may be thousands."""
    parts = re.split(r"0*([0-9]+)", name)
    return [(len(part), part) if number % 2 else part for number, part in enumerate(parts)]


class _VideoFile:
    """The video stream of a container, read by PyAV in this thread alone."""

    def __init__(self, ref: VideoRef, file: BinaryIO, settings: VideoSettings, limits: MediaLimits):
        try:
            import av
            from av.video.reformatter import VideoReformatter
        except ImportError:
            raise ConfigError('videos need PyAV; pip install "fastrm[video]"') from None
        self._ref = ref
        start = file.read(HEADER_BYTES)
        file.seek(0)
        # FFmpeg would guess the format from the content, and some formats are lists of other files to open.
        container_format = _container_format(start)
        if container_format is None:
            raise media_error(ref, "FORMAT", "is not an MP4, QuickTime, Matroska or WebM file; convert it to MP4")
        # FFmpeg decodes first frames to fill gaps of the header, and none with more pixels than this.
        self._options = {"max_pixels": str(limits.max_image_pixels)}
        # From version 17 on a conversion keeps a pool of threads. A forked data worker inherits it without its threads,
        # and waits for them for ever when it converts a frame, or only ends. So conversions of ours have no pool; and a
        # converter of ours, since from version 19 on `VideoFrame.to_ndarray` takes the thread's one, with the pool that
        # any other caller in this program has given it.
        self._converter = VideoReformatter()
        self._one_thread = {"threads": 1} if Version(av.__version__).major >= 17 else {}
        with _ffmpeg_named(ref):
            self._container = _open_container(av, file, container_format, self._options)
            self._stream = next(iter(self._container.streams.video), None)
        try:
            with _ffmpeg_named(ref):
                self.header = self._read_header(settings, limits)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._container.close()

    def _read_header(self, settings: VideoSettings, limits: MediaLimits) -> VideoHeader:
        ref, stream = self._ref, self._stream
        if stream is None:
            raise media_error(ref, "DAMAGED", "has no video stream; fix or remove the file")
        codec = stream.codec_context.codec.canonical_name
        if codec not in CODECS:
            raise media_error(ref, "FORMAT", f"is coded as {codec}, wanted one of {', '.join(CODECS)}; convert it")
        if not (stream.width > 0 and stream.height > 0 and stream.average_rate):
            raise media_error(ref, "DAMAGED", "does not say its size or frame rate; make it again")
        if stream.width * stream.height > limits.max_image_pixels:
            raise media_error(
                ref,
                "TOO_LARGE",
                f"is {stream.width:,} x {stream.height:,}, limit {limits.max_image_pixels / 1e6:g} MP a frame; "
                "raise data.max_image_pixels or fix the file",
            )
        num_frames = stream.frames
        # A count is not in every container, and may include frames that are not shown: few are counted exactly.
        if num_frames < settings.num_frames:
            num_frames = len(self._shown()[0])
        if num_frames == 0:
            raise media_error(ref, "EMPTY", "has no frames; fix or remove the file")
        return VideoHeader(num_frames, stream.width, stream.height, float(stream.average_rate))

    def frames(self, num_frames: int, pick: Pick = sample) -> Iterator[np.ndarray]:
        with _ffmpeg_named(self._ref):
            shown, keys = self._shown()
            self._stream.thread_type = "NONE"
            self._stream.codec_context.options = self._options
            for frame in self._decode([shown[number] for number in pick(len(shown), num_frames)], keys):
                rgb = self._converter.reformat(frame, format="rgb24", **self._one_thread)
                yield _check_shape(self._ref, self.header, rgb.to_ndarray())

    def _shown(self) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the times of all shown frames, in order, and (time, decoding time) of key frames.

        They are read from the packets' headers: the file is read, and nothing decoded.
        """
        self._container.seek(0)
        shown, keys = [], []
        for packet in self._container.demux(self._stream):
            if packet.pts is None:
                continue
            if not packet.is_discard:
                shown.append(packet.pts)
            if packet.is_keyframe or not keys:
                keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
        return sorted(shown), sorted(keys)

    def _decode(self, times: list[int], keys: list[tuple[int, int]]):
        """Yield the frames shown at these rising times; what lies between is skipped where a key frame allows it."""
        frames, frame = None, None
        for time in times:
            key = keys[max(bisect_right(keys, (time, float("inf"))) - 1, 0)]
            if frame is None or key[0] > frame.pts:
                self._container.seek(key[1], stream=self._stream)
                frames = self._container.decode(self._stream)
                frame = next(frames, None)
            while frame is not None and frame.pts < time:
                frame = next(frames, None)
            if frame is None:
                raise media_error(self._ref, "DAMAGED", "ends before its last frame; fix or remove the file")
            yield frame


def _open_container(av, file: BinaryIO, container_format: str, options: dict[str, str]):
    # A file is not refused for titles that are no UTF-8: PyAV had to be told so up to version 18.
    lenient = {"metadata_errors": "ignore"} if Version(av.__version__).major < 19 else {}
    try:
        return av.open(file, format=container_format, options=options, **lenient)
    except TypeError as error:  # without this every video would be called damaged
        raise ConfigError(
            f"PyAV {av.__version__} cannot be called as fastrm does: {error}; pip install av==18.1"
        ) from error


@contextmanager
def _ffmpeg_named(ref: VideoRef):
    """Name the video in any error of FFmpeg, also in lack of memory for a size that the file makes up."""
    from av.error import FFmpegError

    with naming_damage(ref):
        try:
            yield
        except FFmpegError as error:
            raise media_error(ref, "DAMAGED", f"cannot be decoded: {error}; fix or remove the file") from error


def _container_format(start: bytes) -> str | None:
    """Return FFmpeg's name of the container by the first bytes of a file."""
    if start[4:8] == b"ftyp":
        return "mp4"
    return "matroska" if start.startswith(b"\x1a\x45\xdf\xa3") else None
