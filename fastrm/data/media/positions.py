"""Rotary positions of one conversation, as the Qwen2-VL family defines them (M-RoPE).

A text token takes the next position on all three axes (time, height, width). The tokens of an image or
a video, planes of h x w, start at the next position p: token (row, column) of plane t takes
(p + time of plane t, p + row, p + column). The text after it continues at p + max(h, w), also where a video
reaches further than that in time. Each plane of a Qwen3-VL video is a span of its own, with text before it. Our
positions equal those of `get_rope_index` of transformers from 5.18 on (5.17 cuts the seconds between a video's planes
to whole numbers).
Source: Qwen2-VL (arXiv 2409.12191), section 2.1; Qwen2.5-VL (arXiv 2502.13923), section 2.1.2.
"""

from collections.abc import Sequence

import numpy as np

from fastrm.data.media.format import MediaSpan


def mrope_positions(num_tokens: int, spans: Sequence[MediaSpan], tokens_per_second: float | None) -> np.ndarray:
    """Return the rotary positions (3, num_tokens) int64 of a conversation.

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
