"""What a loaded model offers besides lists of rewards: tensors, ranks, the best of N, and one call for a chat."""

import datasets
import pandas
import pytest
import torch
from PIL import Image

import fastrm
from fastrm.errors import DataError
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
