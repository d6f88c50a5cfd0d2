"""What a loaded model offers besides lists of rewards: tensors, ranks, the best of N, and one call for a chat."""

import datasets
import pandas
import pytest
import torch
from PIL import Image

import fastrm
from fastrm.errors import ConfigError, DataError
from fastrm.evaluate.ensemble import Ensemble
from fastrm.evaluate.reward_model import RewardModel
from tests.helpers.support import make_model

GROUP = {"prompt": "Which digit?", "responses": ["seven", "two", "seven", "a much longer answer"]}
PAIRS = [{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, {"prompt": "Sky?", "chosen": "blue", "rejected": "red"}]


@pytest.fixture(scope="module")
def model():
    return RewardModel(make_model("qwen2_5_vl"))


@pytest.fixture(scope="module")
def both(model):
    return Ensemble([model, RewardModel(make_model("qwen2_5_vl", seed=1))])


def chat(answer, prompt=GROUP["prompt"]):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def test_tensors_are_the_lists(model, both):
    for scorer in (model, both):
        (rewards,), (tensor,) = scorer.score([GROUP]), scorer.score([GROUP], convert_to_tensor=True)
        assert tensor.dtype is torch.float32 and torch.equal(tensor, torch.tensor(rewards))
    good, bad = model.score([GROUP, {"prompt": "?"}], on_error="return", convert_to_tensor=True)
    assert good.shape == (4,) and isinstance(bad, fastrm.GroupError)


def test_ranks_and_the_best_follow_the_rewards(model, both):
    for scorer in (model, both):
        (rewards,) = scorer.score([GROUP])
        best = scorer.best_of_n(GROUP)
        assert rewards[0] == rewards[2] and len(set(rewards)) == 3
        order = sorted(set(rewards), reverse=True)
        places = {reward: sum(rewards.count(larger) for larger in order if larger > reward) for reward in order}
        assert scorer.rank(GROUP) == [places[reward] for reward in rewards]
        assert best == (rewards.index(max(rewards)), GROUP["responses"][best.index], max(rewards), rewards)
        assert [one.index for one in scorer.best_of_n([GROUP, GROUP])] == [best.index] * 2


def test_two_responses_are_compared_by_their_rewards(model):
    pair = {"prompt": "2 + 2?", "responses": ["4", "5"]}
    first, second = model.score([pair])[0]
    assert model.compare(pair) is (first > second)
    assert model.compare({**pair, "responses": ["5", "4"]}) is (second > first)
    assert model.compare({**pair, "responses": ["4", "4"]}) is False
    with pytest.raises(DataError, match="the group has 4 responses, wanted 2"):
        model.compare(GROUP)


def test_chats_have_the_rewards_of_their_group(model):
    """As IXC-2.5-Reward's users call it: (chat, images), and for ranks 0 for the best."""
    (rewards,) = model.score([GROUP])
    chats = [chat(answer) for answer in GROUP["responses"]]
    assert model.get_scores(chats) == pytest.approx(rewards, abs=1e-5)
    assert model.get_score(chats[1]) == pytest.approx(rewards[1], abs=1e-5)
    assert model.rank(chats) == model.rank(GROUP)
    assert model.compare(chats[0], None, chats[1], None) is (rewards[0] > rewards[1])
    assert model.compare(chats[1], None, chats[0]) is (rewards[1] > rewards[0])


def test_chats_take_an_image_each(model, tmp_path):
    files = []
    for colour in ("red", "blue"):
        files.append(tmp_path / f"{colour}.png")
        Image.new("RGB", (60, 60), colour).save(files[-1])
    groups = [{**GROUP, "images": [file], "responses": ["seven"]} for file in files]
    expected = [rewards[0] for rewards in model.score(groups)]
    found = model.get_scores([chat("seven"), chat("seven")], [[file] for file in files])
    assert found == pytest.approx(expected, abs=1e-5) and abs(expected[0] - expected[1]) > 1e-4
    with pytest.raises(DataError, match="got 1 entries for 2 chats"):
        model.get_scores([chat("seven"), chat("two")], [files])


def test_calls_of_ixc_are_taken_as_its_readme_writes_them(model, tmp_path):
    """Its quick start, with other texts: a list of images for each chat, an empty one without any."""
    image = [str(tmp_path / "cars1.jpg")]
    Image.new("RGB", (60, 40), "red").save(image[0])
    asked = "I want to buy a car from the input image, analyze the advantages and weaknesses."
    chat_1 = [{"role": "user", "content": asked}, {"role": "assistant", "content": "It is roomy, and costs a lot."}]
    chat_2 = [{"role": "user", "content": asked}, {"role": "assistant", "content": "It is a boat."}]
    answers = [chat[1]["content"] for chat in (chat_1, chat_2)]
    (expected,) = model.score([{"prompt": asked, "images": image, "responses": answers}])
    scores = model.get_scores([chat_1, chat_2], [image, image])
    assert scores == pytest.approx(expected, abs=1e-5) and scores[0] != scores[1]
    assert model.get_score(chat_2, image) == pytest.approx(scores[1], abs=1e-5)
    assert model.compare(chat_1, image, chat_2, image) is (scores[0] > scores[1])
    assert model.rank([chat_1, chat_2], [image, image]) == [int(scores[0] < scores[1]), int(scores[0] > scores[1])]
    without = model.get_scores([chat_1, chat_2], [[]] * 2)
    assert without == model.get_scores([chat_1, chat_2]) and without != scores


def test_images_of_a_chat_stand_where_image_here_says(model, tmp_path):
    files = []
    for colour in ("red", "blue"):
        files.append(str(tmp_path / f"{colour}.png"))
        Image.new("RGB", (60, 60), colour).save(files[-1])
    wanted, asked = (f"Image1 {place}; Image2 {place}; which is red?" for place in ("<image>", "<ImageHere>"))
    expected = model.score([{"prompt": wanted, "images": files, "responses": ["the first"]}])[0][0]
    assert model.get_score(chat("the first", asked), files) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(fastrm.GroupError, match="IMAGE_COUNT"):
        model.get_score(chat("the first", asked), files[:1])


@pytest.mark.parametrize("name", ["hd_num", "max_length"])
def test_settings_of_ixc_are_refused_by_name(model, name):
    one, setting = chat("seven"), {name: 9}
    calls = [
        lambda: model.get_score(one, [], **setting),
        lambda: model.get_scores([one], [[]], **setting),
        lambda: model.compare(one, [], one, [], **setting),
        lambda: model.rank([one], [[]], **setting),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=f"{name}: got 9.*leave it out"):
            call()
    with pytest.raises(ConfigError, match="max_length: got 16384"):
        model.rank([one], [[]], 16384, 9)


def test_chats_of_one_prompt_are_computed_together(model, monkeypatch):
    sizes = []
    score = model._score
    monkeypatch.setattr(model, "_score", lambda records, *rest: sizes.append(len(records)) or score(records, *rest))
    model.get_scores([chat("seven"), chat("two"), chat("four"), chat("seven", "Another?")])
    assert sizes == [2]


@pytest.mark.parametrize(
    "hold", [list, pandas.DataFrame, datasets.Dataset.from_list], ids=["list", "pandas", "datasets"]
)
def test_rows_in_the_layouts_of_files_are_scored(model, hold):
    expected = model.score([{"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"]]} for row in PAIRS])
    assert model.score(hold(PAIRS)) == expected


def test_a_bad_row_of_a_table_is_named_and_costs_no_other(model):
    table = pandas.DataFrame([{"id": "first", **PAIRS[0]}, {"id": "second", "prompt": "x", "chosen": "y"}])
    good, bad = model.score(table, on_error="return")
    assert good == model.score(PAIRS[:1])[0] and (bad.index, bad.id, bad.code) == (1, "second", "BAD_ROW")
    with pytest.raises(fastrm.GroupError, match=r'group 1 \("second"\)'):
        model.score(table)
    with pytest.warns(UserWarning, match="url"):
        model.score(pandas.DataFrame([{**PAIRS[0], "url": "there"}]))


def test_progress_is_shown_when_asked_for(model, capsys):
    model.score([GROUP] * 3, progress=True)
    assert "scoring: 3/3" in capsys.readouterr().err
    model.score([GROUP])
    assert capsys.readouterr() == ("", "")


def test_what_the_model_is_can_be_asked(model):
    assert (model.device, model.dtype, model.max_tokens) == (torch.device("cpu"), torch.float32, 4096)
