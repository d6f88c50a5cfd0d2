"""Small videos for the tests: encoded by PyAV, without which a test that asks for one is skipped, or as folders."""

import io
import os
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from packaging.version import Version
from PIL import Image

from fastrm.data.record import VideoRef


def moving_frames(num_frames: int, width: int, height: int, seed: int = 0) -> np.ndarray:
    """(num_frames, height, width, 3) uint8: a smooth random picture that moves and changes its brightness."""
    coarse = np.random.default_rng(seed).integers(0, 200, (9, 13, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(coarse).resize((2 * width, 2 * height), Image.Resampling.BICUBIC))
    steps = range(num_frames)
    return np.stack([np.roll(picture, (3 * n, 5 * n), (0, 1))[:height, :width] + np.uint8(n % 50) for n in steps])


def encode_video(
    frames: np.ndarray, *, rate: Fraction | int = 10, codec: str = "libx264", container: str = "mp4", title: str = "",
    **options: str,
) -> bytes:  # fmt: skip
    """A video file of frames (T, H, W, 3) uint8; sides must be even."""
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with ordinary_priority(), av.open(buffer, "w", format=container) as file:
        if title:
            file.metadata["title"] = title
        stream = file.add_stream(codec, rate=rate, options={name.replace("_", "-"): v for name, v in options.items()})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        file.mux(stream.encode())
    return buffer.getvalue()


@contextmanager
def ordinary_priority():
    """Undo what SVT-AV1 does to the thread that encodes, where it runs as root: real-time priority, 99 of 99.

    All later work of this test process, and of what it starts, would come before everything else on the machine.
    """
    tells = hasattr(os, "sched_getscheduler")  # of Linux
    before = tells and (os.sched_getscheduler(0), os.sched_getparam(0))
    try:
        yield
    finally:
        if tells:
            os.sched_setscheduler(0, *before)


def make_video(num_frames: int, width: int, height: int, seed: int = 0, **options) -> VideoRef:
    """A VideoRef with the bytes of an mp4 file."""
    return VideoRef(data=encode_video(moving_frames(num_frames, width, height, seed), **options))


def decode_all(data: bytes) -> list[np.ndarray]:
    """All frames of a video, (H, W, 3) uint8 each."""
    av = pytest.importorskip("av")
    # As in fastrm/data/media/videos.py: no threads that a forked worker would wait for.
    options = {"threads": 1} if Version(av.__version__).major >= 17 else {}
    with av.open(io.BytesIO(data)) as file:
        return [frame.to_ndarray(format="rgb24", **options) for frame in file.decode(video=0)]


def write_frames(folder: Path, frames, name: str = "frame_{}.png") -> VideoRef:
    """A folder of frames as PNG files, numbered from 1 without leading zeros."""
    folder.mkdir()
    for number, frame in enumerate(frames, start=1):
        Image.fromarray(frame).save(folder / name.format(number))
    return VideoRef(path=str(folder))


def clip_rows(folder: Path) -> list[dict]:
    """Rows about six short clips; the better answer depends on which clip it is."""
    rows = []
    for number in range(6):
        data = encode_video(moving_frames(9 + number, 64, 48, number), rate=4)
        (folder / f"{number}.mp4").write_bytes(data)
        for question in ("What moves?", "Where does it go?"):
            rows.append(
                {
                    "id": f"{number} {question}", "prompt": question, "videos": [f"{number}.mp4"],
                    "responses": ["up and away", "down and back", "nothing"][: 2 + number % 2],
                    "preferences": [[number % 2, 1 - number % 2]],
                }
            )  # fmt: skip
    return rows
