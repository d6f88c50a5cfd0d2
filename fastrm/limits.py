"""Limits on images and videos, and their defaults, for configurations and the command line; needs no other package."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MediaLimits:
    """Limits of size for one image or video.

    Attributes:
        max_image_bytes: of an encoded image, also of one that is a frame in a folder of frames.
        max_image_pixels: of a decoded image or frame.
        max_video_bytes: of an encoded video.
        max_video_seconds: of a video, from its header.
    """

    max_image_bytes: int = 64 * 2**20
    max_image_pixels: int = 50_000_000
    max_video_bytes: int = 512 * 2**20
    max_video_seconds: float = 3600.0
