"""Scoring through Python and through files: the same rewards, whatever is packed with them."""

import json

import pytest
from PIL import Image
from runs import colour_rows, fastrm, tiny_config, write_rows
from support import make_record

import fastrm as package
from fastrm.config import load_config
from fastrm.errors import ConfigError, DataError, StorageError
from fastrm.evaluate.pair_accuracy import PairAccuracy, wilson_interval
from fastrm.train.loop import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    train(load_config(tiny_config(folder, colour_rows(folder), run={"max_steps": 3})))
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return package.RewardModel.from_pretrained(folder / "run" / "model")


def groups_of(folder):
    rows = [json.loads(line) for line in (folder / "colours.jsonl").read_text().splitlines()]
    return [{**row, "images": [str(folder / name) for name in row["images"]]} for row in rows]


def test_alone_and_in_a_batch_give_the_same_rewards(folder, model):
    groups = groups_of(folder)
    together = model.score(groups)
    assert [len(rewards) for rewards in together] == [len(group["responses"]) for group in groups]
    for group, rewards in zip(groups[:6], together, strict=False):
        alone = model.score([group])[0]
        each = [model.score([{**group, "responses": [r], "preferences": None}])[0][0] for r in group["responses"]]
        assert max(abs(a - b) for a, b in zip(alone, rewards, strict=True)) <= 1e-5
        assert max(abs(a - b) for a, b in zip(each, rewards, strict=True)) <= 1e-5


def test_order_of_groups_does_not_matter(folder, model):
    groups = groups_of(folder)
    backwards = model.score(groups[::-1])[::-1]
    assert all(
        abs(a - b) <= 1e-5
        for x, y in zip(model.score(groups), backwards, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_paths_bytes_and_pil_images_are_the_same(folder, model):
    path = folder / "images" / "0.png"
    group = {"prompt": "Which colour?", "responses": ["red", "blue"]}
    scores = [
        model.score([{**group, "images": [image]}])[0] for image in (str(path), path.read_bytes(), Image.open(path))
    ]
    assert scores[0] == scores[1] == scores[2]
    assert model.score([group])[0] != scores[0]


def test_messages_and_a_plain_prompt_are_the_same(model):
    plain = {"prompt": "Which colour?", "responses": ["red"]}
    messages = {"prompt": [{"role": "user", "content": "Which colour?"}], "responses": ["red"]}
    assert model.score([plain]) == model.score([messages])


def test_a_group_that_cannot_be_scored_is_named(model):
    good = {"prompt": "a", "responses": ["b"]}
    with pytest.raises(DataError, match=r"group 1: .*IMAGE_MISSING"):
        model.score([good, {**good, "images": ["/nowhere.png"]}])
    with pytest.raises(DataError, match=r"group 0: the group has .* tokens, limit 8"):
        model.score([good], tokens_per_pack=8)


def test_files_give_one_line_per_row_in_order(folder):
    rows = [json.loads(line) for line in (folder / "colours.jsonl").read_text().splitlines()][:5]
    rows.insert(2, '{"id": "broken"')
    rows.insert(4, {"id": "empty", "prompt": "a", "responses": ["b", ""]})
    data = write_rows(folder / "score.jsonl", rows)
    result = fastrm("score", folder / "run" / "model", data, "--out", folder / "out.jsonl")
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines if "error" not in line] == ["c0", "c1", "c2", "c3", "c4"]
    assert [n for n, line in enumerate(lines) if line["rewards"] is None] == [2, 4]
    assert "BAD_JSON" in lines[2]["error"] and "EMPTY_RESPONSE" in lines[4]["error"]
    assert not (folder / "out.jsonl.part").exists()


def test_a_folder_that_is_no_reward_model_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="wanted the model/ folder of a run"):
        package.RewardModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ConfigError, match="not a fastrm reward model"):
        package.RewardModel.from_pretrained(tmp_path)


def test_a_damaged_model_is_refused(folder, tmp_path):
    import shutil

    shutil.copytree(folder / "run" / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(StorageError, match="cannot be loaded"):
        package.RewardModel.from_pretrained(tmp_path / "model")


def test_equal_rewards_are_wrong_and_ties_are_left_out():
    accuracy = PairAccuracy()
    accuracy.add(make_record(0, num_responses=3), [1.0, 1.0, 0.0])
    report = accuracy.report()
    assert (report["accuracy"], report["preferences"]) == (2 / 3, 3)


def test_the_interval_is_wilsons():
    """Reference values worked out by hand from the formula."""
    low, high = wilson_interval(8, 10)
    assert low == pytest.approx(0.4902, abs=5e-5) and high == pytest.approx(0.9433, abs=5e-5)
    assert wilson_interval(0, 10)[0] == 0.0 and wilson_interval(10, 10)[1] == pytest.approx(1.0)
