"""Rotary positions of one conversation, as the Qwen2-VL family defines them (M-RoPE).

A text token takes the next position on all three axes (time, height, width). The tokens of an image
with a grid of h x w merged patches start at the next position p and take (p, p + row, p + column);
the text after it goes on at p + max(h, w). Source: Qwen2-VL (arXiv 2409.12191), section 2.1.
"""

import numpy as np


def mrope_positions(num_tokens: int, images: list[tuple[int, int, int]]) -> np.ndarray:
    """Positions (3, num_tokens) int64.

    Args:
        num_tokens: length of the conversation, image tokens included.
        images: (start token, h, w) of each image in order, in merged patches; h * w tokens each.
    """
    positions = np.empty((3, num_tokens), dtype=np.int64)
    token = position = 0
    for start, height, width in images:
        text = start - token
        positions[:, token:start] = np.arange(position, position + text)
        position += text
        stop = start + height * width
        positions[0, start:stop] = position
        positions[1, start:stop] = position + np.repeat(np.arange(height), width)
        positions[2, start:stop] = position + np.tile(np.arange(width), height)
        position += max(height, width)
        token = stop
    positions[:, token:] = np.arange(position, position + num_tokens - token)
    return positions
