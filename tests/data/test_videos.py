"""From video files and folders of frames to sampled frames: which ones, how much of them, and what is refused."""

import io
import multiprocessing
import os
import re
import shutil
import struct
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastrm.data.media import videos
from fastrm.data.media.videos import VideoHeader, VideoSettings, frame_refs, open_video, sample
from fastrm.data.record import VideoRef
from fastrm.errors import ConfigError, RecordError
from fastrm.limits import MediaLimits
from tests.helpers.video_files import decode_all, encode_video, make_video, moving_frames, write_frames
from tests.helpers.waiting import PATIENCE

av = pytest.importorskip("av")

LIMITS = MediaLimits()


def header_of(ref, settings=None, limits=LIMITS):
    with open_video(ref, settings or VideoSettings(), limits) as video:
        return video.header


def frames_of(ref, num_frames, settings=None, limits=LIMITS):
    with open_video(ref, settings or VideoSettings(), limits) as video:
        return list(video.frames(num_frames))


def refusal(ref, settings=None, limits=LIMITS) -> RecordError:
    with pytest.raises(RecordError) as caught:
        frames_of(ref, 3, settings, limits)
    return caught.value


def test_sampled_frames_are_evenly_spaced_from_the_first_on():
    assert sample(172, 32)[:5] == [0, 5, 10, 16, 21]
    for total in range(1, 200):
        for count in (1, 2, 7, 32):
            steps = np.diff([*sample(total, count), total])
            assert len(steps) == count and steps.max() - steps.min() <= 1


def test_a_header_says_number_size_and_rate(tmp_path):
    data = encode_video(moving_frames(23, 90, 70), rate=Fraction(30000, 1001))
    (tmp_path / "clip.mp4").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "clips.zip", "w") as archive:
        archive.writestr("in/clip.mp4", data)
    (tmp_path / "joined").write_bytes(b"x" * 7 + data + b"y")
    for ref in (
        VideoRef(data=data),
        VideoRef(path=str(tmp_path / "clip.mp4")),
        VideoRef(path=str(tmp_path / "clips.zip"), member="in/clip.mp4"),
        VideoRef(path=str(tmp_path / "joined"), span=(7, len(data))),
    ):
        header = header_of(ref)
        assert header[:3] == (23, 90, 70) and header.fps == pytest.approx(30000 / 1001)
        assert np.array_equal(frames_of(ref, 23), decode_all(data))


def test_planning_decodes_no_frame(monkeypatch, tmp_path):
    ref = make_video(40, 64, 64)
    folder = write_frames(tmp_path / "clip", moving_frames(3, 20, 10))
    monkeypatch.setattr(videos._VideoFile, "_decode", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr(videos._VideoFile, "_shown", lambda *_: pytest.fail("read the whole file"))
    monkeypatch.setattr(videos, "decode_image", lambda *_: pytest.fail("decoded"))
    assert header_of(ref) == VideoHeader(40, 64, 64, 10.0)
    assert header_of(folder) == VideoHeader(3, 20, 10, 24.0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"g": "4"},
        {"g": "7", "bf": "3"},
        {"g": "1"},
        {"g": "6", "x264_params": "open-gop=1:bframes=3"},
        {"codec": "libx265", "g": "5"},
        {"codec": "mpeg4", "g": "5"},
        {"codec": "libvpx-vp9", "container": "webm", "g": "8"},
        {"codec": "libvpx", "container": "webm", "g": "8", "auto_alt_ref": "1", "lag_in_frames": "16"},
        {"codec": "libx264", "container": "matroska", "g": "9"},
        {"codec": "libsvtav1", "g": "8"},
    ],
    ids=lambda options: "-".join(options.values()) or "default",
)
def test_frames_are_those_of_decoding_everything(options):
    """Key frames are jumped to; the frames must not depend on it."""
    ref = make_video(61, 64, 48, 2, **options)
    expected = decode_all(ref.data)
    assert header_of(ref).num_frames == len(expected) == 61
    for count in (1, 2, 6, 32, 61):
        for ours, number in zip(frames_of(ref, count), sample(61, count), strict=True):
            assert np.array_equal(ours, expected[number]), (count, number)


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="this system has no scheduling policies")
def test_encoding_leaves_the_priority_of_the_tests_alone():
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    make_video(9, 64, 48, codec="libsvtav1")
    assert (os.sched_getscheduler(0), os.sched_getparam(0)) == before


def test_frames_between_key_frames_are_skipped(monkeypatch):
    ref, seen = make_video(400, 32, 32, g="10", bf="0"), 0
    decode = av.container.InputContainer.decode

    class Counted:
        def __init__(self, container):
            self._container = container

        def __getattr__(self, name):
            return getattr(self._container, name)

        def decode(self, *streams):
            nonlocal seen
            for frame in decode(self._container, *streams):
                seen += 1
                yield frame

    opened = av.open
    monkeypatch.setattr(av, "open", lambda *arguments, **options: Counted(opened(*arguments, **options)))
    frames_of(ref, 8)
    assert seen == 8  # every 50th, each a key frame


def test_a_folder_of_the_same_frames_gives_the_same_pixels(tmp_path):
    ref = make_video(50, 64, 48)
    folder = write_frames(tmp_path / "clip", decode_all(ref.data))
    assert header_of(folder)[:3] == header_of(ref)[:3]
    assert np.array_equal(frames_of(folder, 32), frames_of(ref, 32))
    assert all(frame.flags.writeable for video in (folder, ref) for frame in frames_of(video, 2))  # torch warns else


def test_frame_files_are_in_the_order_of_their_numbers(tmp_path):
    frames = moving_frames(12, 20, 10)
    folder = write_frames(tmp_path / "clip", frames)  # frame_1, ..., frame_12: 10 sorts before 2 as text
    (tmp_path / "clip" / "info.json").write_text("{}")
    assert np.array_equal(frames_of(folder, 12), frames)
    Image.fromarray(frames[0]).save(tmp_path / "clip" / "Frame_0.PNG")
    assert header_of(folder).num_frames == 13


def test_numbers_in_frame_names_have_any_length(tmp_path):
    names = ["a0.png", "a007.png", "a10.png", "a10b2.png", "a10b10.png", f"a{'9' * 5000}.png", f"a1{'0' * 5000}.png"]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in reversed(names):
            archive.writestr(f"clip/{name}", b"")
    frames = frame_refs(VideoRef(path=str(tmp_path / "a.zip"), member="clip"))
    assert [frame.member for frame in frames] == [f"clip/{name}" for name in names]


@pytest.mark.parametrize("suffix", ["zip", "tar"])
def test_a_folder_of_frames_in_an_archive_is_a_video(tmp_path, suffix):
    frames = moving_frames(12, 20, 10)
    folder = write_frames(tmp_path / "clip", frames)
    (tmp_path / "clip" / "._frame_3.png").write_bytes(b"what macOS adds")
    (tmp_path / "clip" / "more").mkdir()
    (tmp_path / "clip" / "more" / "0.png").write_bytes(b"no frame of this video")
    archive = shutil.make_archive(str(tmp_path / "video"), suffix, tmp_path, "clip")
    ref = VideoRef(path=archive, member="clip")
    assert header_of(ref) == header_of(folder)
    assert np.array_equal(frames_of(ref, 12), frames)
    assert frame_refs(VideoRef(path=archive, member="clip/frame_1.png")) is None
    for member, code in (("clip/nothing", "VIDEO_MISSING"), ("clip/frame_1.png", "VIDEO_FORMAT")):
        assert refusal(VideoRef(path=archive, member=member)).code == code


def test_a_bad_frame_in_an_archive_is_named_with_its_video(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("clip/1.png", b"x")
        archive.writestr("empty/", b"")
    path = str(tmp_path / "a.zip")
    error = refusal(VideoRef(path=path, member="clip"))
    assert error.code == "VIDEO_FORMAT"
    assert error.message.startswith(f'video "{path}!clip" has a bad frame: image "{path}!clip/1.png" is not a JPEG')
    error = refusal(VideoRef(path=path, member="empty"))
    assert error.code == "VIDEO_EMPTY" and f'video "{path}!empty" has no frames' in error.message


def test_a_short_video_is_counted_by_its_packets(tmp_path):
    """Frames before the start of an edit are in the header's count, and are not shown."""
    data = bytearray(make_video(20, 64, 48, bf="0").data)
    place = data.index(b"elst")
    # Version and flags, number of entries, duration, media time: begin 5 frames in.
    with av.open(io.BytesIO(bytes(data))) as file:
        ticks = int(5 / 10 / file.streams.video[0].time_base)
    struct.pack_into(">i", data, place + 16, ticks)
    ref = VideoRef(data=bytes(data))
    expected = decode_all(ref.data)
    assert len(expected) == 15
    assert header_of(ref, VideoSettings(num_frames=32)).num_frames == 15
    assert header_of(ref, VideoSettings(num_frames=8)).num_frames == 20  # as the container says
    for count in (3, 8, 15):
        chosen = [expected[number] for number in sample(15, count)]
        assert np.array_equal(frames_of(ref, count), chosen)


@pytest.mark.parametrize(
    ("data", "code", "message"),
    [
        (b"", "VIDEO_FORMAT", "is not an MP4, QuickTime, Matroska or WebM file; convert it to MP4"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "VIDEO_FORMAT", "is not an MP4"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "VIDEO_FORMAT", "is not an MP4"),
        (b"\0\0\0\x18ftypisom" + b"\0" * 100, "VIDEO_DAMAGED", "cannot be decoded"),
        (b"\x1a\x45\xdf\xa3" + b"\xff" * 100, "VIDEO_DAMAGED", "cannot be decoded"),
    ],
    ids=["empty", "playlist", "concat", "mp4", "matroska"],
)
def test_what_is_no_video_is_named(data, code, message):
    error = refusal(VideoRef(data=data))
    assert error.code == code and message in error.message
    assert error.message.startswith(f'video "<{len(data):,} bytes in the record>" ')


def test_files_that_are_not_there_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with zipfile.ZipFile(tmp_path / "clips.zip", "w") as archive:
        archive.writestr("a.mp4", b"x")
    for ref, code, message in (
        (VideoRef(path=str(tmp_path / "no.mp4")), "VIDEO_MISSING", "cannot be opened: No such file or directory"),
        (VideoRef(path="/dev/null"), "VIDEO_NOT_A_FILE", "is not a regular file; name a video file"),
        (VideoRef(path=str(tmp_path / "empty")), "VIDEO_EMPTY", "has no frames; wanted a folder of .jpg"),
        (VideoRef(path=str(tmp_path / "clips.zip"), member="b.mp4"), "VIDEO_MISSING", "is not in the archive"),
    ):
        error = refusal(ref)
        assert error.code == code and message in error.message and f'video "{ref}" ' in error.message


def test_limits_are_checked_before_decoding(monkeypatch, tmp_path):
    ref = make_video(40, 64, 48)
    folder = write_frames(tmp_path / "clip", moving_frames(50, 20, 10))
    monkeypatch.setattr(videos._VideoFile, "_decode", lambda *_: pytest.fail("decoded"))
    size = len(ref.data)
    error = refusal(ref, limits=MediaLimits(max_video_bytes=size - 1))
    assert error.code == "VIDEO_TOO_LARGE"
    assert f"has {size:,} bytes, limit {size - 1:,}; raise data.max_video_bytes" in error.message
    error = refusal(ref, limits=MediaLimits(max_image_pixels=64 * 48 - 1))
    assert error.code == "VIDEO_TOO_LARGE" and "is 64 x 48, limit 0.003071 MP a frame" in error.message
    for video, seconds in ((ref, 4), (folder, 50 / 24)):
        error = refusal(video, limits=MediaLimits(max_video_seconds=seconds - 0.01))
        assert error.code == "VIDEO_TOO_LONG" and "raise data.max_video_seconds or cut it" in error.message
        assert header_of(video, limits=MediaLimits(max_video_seconds=seconds))
    error = refusal(folder, limits=MediaLimits(max_image_pixels=199))
    assert error.code == "VIDEO_TOO_LARGE" and "has a bad frame: image " in error.message


def test_a_codec_that_is_not_allowed_is_named():
    error = refusal(make_video(4, 64, 48, codec="ffv1", container="matroska"))
    assert error.code == "VIDEO_FORMAT"
    assert "is coded as ffv1, wanted one of h264, hevc, vp8, vp9, av1, mpeg4; convert it" in error.message


def test_a_file_without_pictures_is_named():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    error = refusal(VideoRef(data=buffer.getvalue()))
    assert error.code == "VIDEO_DAMAGED" and "has no video stream" in error.message


def test_frames_of_different_sizes_are_refused(tmp_path):
    folder = write_frames(tmp_path / "clip", moving_frames(5, 20, 10))
    Image.fromarray(moving_frames(1, 10, 20)[0]).save(tmp_path / "clip" / "frame_3.png")
    with pytest.raises(RecordError, match=r"has a frame of 10 x 20 where others are 20 x 10; make it again") as caught:
        frames_of(folder, 5)
    assert caught.value.code == "VIDEO_DAMAGED"


def test_a_bad_frame_file_is_named_with_its_video(tmp_path):
    folder = write_frames(tmp_path / "clip", moving_frames(5, 20, 10))
    (tmp_path / "clip" / "frame_4.png").write_bytes(b"no picture")
    with pytest.raises(RecordError, match=r'clip" has a bad frame: image ".*frame_4.png" is not a JPEG') as caught:
        frames_of(folder, 5)
    assert caught.value.code == "VIDEO_FORMAT"


def test_a_title_that_is_no_utf_8_is_no_reason_to_refuse_a_video():
    data = encode_video(moving_frames(4, 64, 48), title="a title")
    assert data.count(b"a title") == 1
    ref = VideoRef(data=data.replace(b"a title", b"\xff\xfe\xfd ttl"))
    assert len(frames_of(ref, 4)) == 4


@pytest.mark.parametrize("version, knows", [("15.0.0", True), ("18.1.0", True), ("19.0.2", False), ("20.1", False)])
def test_videos_are_read_by_versions_of_pyav_with_and_without_metadata_errors(monkeypatch, version, knows):
    opened, seen = av.open, []

    def open_of_that_version(file, mode="r", **options):
        errors = options.pop("metadata_errors", None)
        if errors is not None and not knows:
            raise TypeError("open() got an unexpected keyword argument 'metadata_errors'")
        seen.append(errors)
        return opened(file, mode, **options)

    ref = make_video(5, 64, 48)
    monkeypatch.setattr(av, "__version__", version)
    monkeypatch.setattr(av, "open", open_of_that_version)
    assert len(frames_of(ref, 5)) == 5 and seen == ["ignore" if knows else None]


def test_a_pyav_that_cannot_be_called_as_we_do_is_named_and_no_video_is_called_damaged(monkeypatch):
    def changed(file, **options):
        raise TypeError("open() got an unexpected keyword argument 'options'")

    ref = make_video(5, 64, 48)
    monkeypatch.setattr(av, "open", changed)
    with pytest.raises(ConfigError, match=r"PyAV [\d.]+ cannot be called .*'options'; pip install av==18\.1"):
        frames_of(ref, 5)


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_damaged_files_give_frames_or_a_name(container):
    """Cut short at any place, or with random bytes: a refusal with a code, or frames; never another error."""
    data = make_video(30, 64, 48, g="10", container=container).data
    rng = np.random.default_rng(0)
    outcomes = set()
    for trial in range(150):
        broken = bytearray(data)
        if trial % 3 == 0:
            broken = broken[: rng.integers(len(data))]
        else:
            for place in rng.integers(len(data) if trial % 3 == 1 else 600, size=rng.integers(1, 30)):
                broken[place] = rng.integers(256)
        ref, limits = VideoRef(data=bytes(broken)), MediaLimits(max_image_pixels=10_000, max_video_seconds=600)
        try:
            shapes = {frame.shape for frame in frames_of(ref, 4, limits=limits)}
            assert len(shapes) == 1
            outcomes.add("frames")
        except RecordError as error:
            assert re.fullmatch(r"VIDEO_(DAMAGED|FORMAT|TOO_LARGE|TOO_LONG|EMPTY)", error.code), error
            outcomes.add(error.code)
    assert {"frames", "VIDEO_DAMAGED"} <= outcomes, outcomes


def test_reading_a_video_leaves_no_threads_behind():
    """A forked data worker would inherit their pool without them, and wait for them for ever."""
    threads = Path("/proc/self/task")
    before = {thread.name for thread in threads.iterdir()}
    assert len(frames_of(make_video(8, 640, 480), 8)) == 8
    assert {thread.name for thread in threads.iterdir()} - before == set()


def test_a_forked_worker_reads_videos_whatever_the_program_has_converted_before():
    """PyAV 19 keeps a converter for each thread, with its pool: a worker that takes it over waits for ever."""
    video = make_video(8, 640, 480)
    with av.open(io.BytesIO(video.data)) as file:
        for frame in file.decode(video=0):
            frame.to_ndarray(format="rgb24")  # by as many threads as the machine has cores, since version 17
    worker = multiprocessing.get_context("fork").Process(target=frames_of, args=(video, 8))
    worker.start()
    worker.join(PATIENCE)
    worker.kill()
    worker.join()
    assert worker.exitcode == 0


def test_no_file_stays_open(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(make_video(5, 64, 48).data)
    before = _open_files()
    for _ in range(5):
        frames_of(VideoRef(path=str(path)), 2)
        refusal(VideoRef(path=str(path)), limits=MediaLimits(max_video_seconds=0.1))
    assert _open_files() == before
    shutil.rmtree(tmp_path)


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
