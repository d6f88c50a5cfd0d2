"""Videos through the commands: trained on, exported and scored, from mp4 files and from folders of frames."""

import inspect
import json
from pathlib import Path

import pytest
from transformers import AutoConfig

import fastrm as fastrm_package
from fastrm.commands import rewards as commands
from fastrm.config import load_config
from fastrm.data.media.format import MediaSize
from fastrm.data.record import VideoRef
from fastrm.data_config import DataConfig
from fastrm.errors import ConfigError, DataError, RecordError
from fastrm.limits import MediaLimits
from fastrm.train.encoder import make_data_encoder
from fastrm.train.loop import train
from tests.helpers.project import PROJECT
from tests.helpers.runs import fastrm, tiny_config, write_rows
from tests.helpers.support import make_tokenizer
from tests.helpers.video_files import clip_rows, decode_all, moving_frames, write_frames

DATA = PROJECT.parent / "shared" / "data" / "prefixgrouper_videos"
SMALL = {"video_frames": 8, "video_min_pixels": 784, "video_max_pixels": 28 * 28 * 12}


def _rewards(file: Path) -> list[list[float]]:
    return [json.loads(line)["rewards"] for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with clips.jsonl, its clips, and a run on them."""
    folder = tmp_path_factory.mktemp("videos")
    rows = write_rows(folder / "clips.jsonl", clip_rows(folder))
    summary = train(
        load_config(
            tiny_config(folder, rows, run={"max_steps": 4}, data={**SMALL, "num_workers": 1, "frame_folder_fps": 4.0})
        )
    )
    return folder, summary


def test_training_on_videos_uses_every_row(trained):
    folder, summary = trained
    assert summary["quarantined"] == 0 and summary["steps"] == 4
    losses = [json.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) >= 4 and losses[-1] < losses[0]
    # Two questions about each clip, of two or three answers: one tree, its video once.
    assert summary["tokens_unshared"] > 1.5 * summary["tokens_processed"]


def test_a_bad_video_is_named_and_the_rest_is_scored(trained, tmp_path):
    folder, _ = trained
    rows = [json.loads(line) for line in (folder / "clips.jsonl").read_text().splitlines()]
    (folder / "broken.mp4").write_bytes((folder / "0.mp4").read_bytes()[:500])
    rows[3]["videos"], rows[5]["videos"] = ["broken.mp4"], ["absent.mp4"]
    data = write_rows(folder / "some.jsonl", rows)
    done = fastrm("score", folder / "run" / "model", data, "--out", tmp_path / "rewards.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "rewards.jsonl").read_text().splitlines()]
    assert len(lines) == len(rows)
    assert "VIDEO_DAMAGED" in json.dumps(lines[3]) and "VIDEO_MISSING" in json.dumps(lines[5]), done.stderr
    assert all(lines[n]["rewards"] for n in range(len(rows)) if n not in (3, 5))


def test_files_and_folders_of_their_frames_are_packed_alike(trained):
    """With the file's rate as the folders', which the export remembers, they get the same rewards, bit by bit."""
    folder, _ = trained
    files = [json.loads(line) for line in (folder / "clips.jsonl").read_text().splitlines()]
    for number in range(6):
        write_frames(folder / f"frames_{number}", decode_all((folder / f"{number}.mp4").read_bytes()))
    folders = [{**row, "videos": [f"frames_{row['videos'][0].removesuffix('.mp4')}"]} for row in files]
    model = fastrm_package.RewardModel.from_pretrained(folder / "run" / "model")
    ours, theirs = (
        model.score([{**row, "videos": [str(folder / name) for name in row["videos"]]} for row in rows])
        for rows in (files, folders)
    )
    assert ours == theirs


def test_limits_of_videos_can_be_set_where_scores_are_made(trained):
    folder, _ = trained
    group = {"prompt": "What moves?", "videos": [str(folder / "3.mp4")], "responses": ["up", "down"]}
    for limit, code in (({"max_video_bytes": 100}, "VIDEO_TOO_LARGE"), ({"max_video_seconds": 2.9}, "VIDEO_TOO_LONG")):
        model = fastrm_package.RewardModel.from_pretrained(folder / "run" / "model", limits=MediaLimits(**limit))
        with pytest.raises(DataError, match=f"raise data.{next(iter(limit))}.*{code}"):
            model.score([group])
    for command in (commands.score, commands.evaluate):
        defaults = {name: parameter.default for name, parameter in inspect.signature(command).parameters.items()}
        assert defaults["max_video_bytes"] == MediaLimits.max_video_bytes == DataConfig().max_video_bytes
        assert defaults["max_video_seconds"] == MediaLimits.max_video_seconds == DataConfig().max_video_seconds


@pytest.mark.parametrize(
    ("key", "value", "change"),
    [
        ("video_frames", 4, lambda size: size._replace(frames=2, seconds=1.5)),
        ("video_min_pixels", 28 * 28 * 8, lambda size: size._replace(height=3, width=4)),
        ("video_max_pixels", 28 * 28 * 2, lambda size: size._replace(height=1, width=1)),
        ("frame_folder_fps", 2.0, lambda size: size._replace(seconds=1.5)),
        ("max_video_seconds", 2.9, lambda size: "VIDEO_TOO_LONG"),
        ("max_video_bytes", 100, lambda size: "VIDEO_TOO_LARGE"),
    ],
)
def test_every_setting_of_videos_counts(key, value, change, trained):
    folder, _ = trained
    on_folder = key == "frame_folder_fps"
    if on_folder and not (folder / "setting").exists():
        write_frames(folder / "setting", moving_frames(12, 64, 48))
    ref = VideoRef(path=str(folder / ("setting" if on_folder else "3.mp4")))
    network_config = AutoConfig.from_pretrained(folder / "run" / "model")
    found = []
    for overrides in ((), (f"data.{key}={value}",)):
        config = load_config(folder / "config.yaml", overrides)
        try:
            found.append(make_data_encoder(config, network_config, make_tokenizer()).measure(ref))
        except RecordError as error:
            found.append(error.code)
    assert found[0] == MediaSize(4, 2, 2, 0.75)
    assert found[1] == change(found[0])


def test_pixel_limits_of_videos_that_exclude_each_other_are_refused(trained):
    folder, _ = trained
    with pytest.raises(ConfigError, match=r"data\.video_min_pixels 10000 is above data\.video_max_pixels 9408"):
        load_config(folder / "config.yaml", ["data.video_min_pixels=10000"])


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the folder shared/data beside the project")
def test_real_clips_train_and_score(tmp_path):
    rows = []
    for number in (1, 2):
        captions = json.loads((DATA / "captions" / f"video{number}.json").read_text())
        responses = captions["responses"]
        rows.append(
            {
                "id": f"video{number}", "prompt": captions["instruction"], "videos": [f"video{number}.mp4"],
                "responses": responses, "preferences": [[0, n] for n in range(1, len(responses))],
            }
        )  # fmt: skip
    data = write_rows(tmp_path / "clips.jsonl", rows)
    config = tiny_config(
        tmp_path, data, run={"max_steps": 2}, optim={"batch_pairs": 3, "tokens_per_pack": 16384},
        data={"max_tokens_per_group": 16384, "video_min_pixels": 784, "video_max_pixels": 28 * 28 * 24},
    )  # fmt: skip
    tree = load_config(config, [f"data.train.0.images={DATA / 'videos'}"])
    summary = train(tree)
    assert summary["quarantined"] == 0 and summary["preferences"] >= 3
    done = fastrm(
        "score", tmp_path / "run" / "model", data, "--images", DATA / "videos", "--out", tmp_path / "rewards.jsonl"
    )
    assert done.returncode == 0, done.stderr
    rewards = _rewards(tmp_path / "rewards.jsonl")
    assert [len(found) for found in rewards] == [len(row["responses"]) for row in rows] == [3, 2]
    assert len({round(reward, 6) for found in rewards for reward in found}) == 5
