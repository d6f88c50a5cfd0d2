"""Scoring takes what a policy produces, and a group that cannot be scored costs no other group anything."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import fastrm as package
from fastrm.data.group import GroupSize, encode_group
from fastrm.data.sources import read_source
from fastrm.data.sources.layouts.groups import group_record
from fastrm.errors import ConfigError, DataError, GroupError
from fastrm.evaluate.ensemble import Ensemble
from fastrm.evaluate.reading import read_in_order
from fastrm.evaluate.reward_model import RewardModel
from tests.helpers.runs import write_rows
from tests.helpers.stock import stock_rewards
from tests.helpers.support import make_image, make_model

GOOD = {"prompt": "Is this a cat?", "responses": ["yes", "no it is a dog"]}
MISSING = {**GOOD, "id": "seen", "images": ["/nowhere.png"]}


@pytest.fixture(scope="module")
def model():
    return RewardModel(make_model("qwen2_5_vl"))


@pytest.fixture(scope="module")
def text_model():
    return RewardModel(make_model("qwen2"))


def close(a, b):
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) <= 1e-5


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen2_5_vl", "internvl"])
def test_an_empty_response_has_the_reward_of_the_stock_model(family):
    network = make_model(family)
    group = {"prompt": "a cat", "responses": ["", "yes", " \n", ""]}
    if network.is_vision:
        group["images"] = [make_image(56, 84).data]
    (rewards,) = RewardModel(network).score([group])
    with torch.no_grad():
        assert close(rewards, stock_rewards(network, [group_record(group, 0)]).tolist())


def test_responses_may_be_equal_one_alone_and_many(model):
    image = make_image(56, 56).data
    texts = ["yes", "", "yes", "no", "", "yes no", "yes"] + [f"{n}" for n in range(20)]
    for extra in ({}, {"images": [image]}):
        (together,) = model.score([{"prompt": "a", "responses": texts, **extra}])
        alone = [model.score([{"prompt": "a", "responses": [text], **extra}])[0][0] for text in texts]
        assert close(together, alone)
        assert together[0] == together[2] == together[6] and together[1] == together[4]


def test_preferences_are_not_asked_for_where_none_are_needed(model):
    """A label that cannot be read, or that prefers a response to its equal, is training's business."""
    odd = [[[0, 0]], [[0, 7]], [[0, 1]], [[0, 1, 1e300]], "best first"]
    groups = [{"prompt": "a", "responses": ["b", "b"], "preferences": given} for given in odd]
    assert model.score(groups) == model.score([{"prompt": "a", "responses": ["b", "b"]}] * len(groups))


# A row of each layout in which nothing is missing but a usable label, or in which responses are empty or equal.
UNLABELLED = {
    "flat": {"prompt": "p", "chosen": "", "rejected": ""},
    "margin": {"prompt": "p", "chosen": "a", "rejected": "a", "margin": "much"},
    "trl": {"prompt": [{"role": "user", "content": "p"}], "chosen": [{"role": "assistant", "content": ""}],
            "rejected": [{"role": "assistant", "content": ""}]},
    "llamafactory": {"instruction": "p", "chosen": "a", "rejected": ""},
    "swift": {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}],
              "rejected_response": ""},
    "groups": {"prompt": "p", "responses": ["a", "", "a"], "preferences": [[2, 0]]},
    "scores": {"prompt": "p", "responses": ["a", ""], "scores": [1, None]},
    "rated": {"prompt": "p", "responses": [{"text": "a", "score": 1}, {"text": "", "score": "good"}]},
    "completions": {"instruction": "p", "completions": [{"response": ""}, {"response": "a"}, {"response": "a"}]},
    "arena": {"conversation_a": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}],
              "conversation_b": [{"role": "user", "content": "p"}, {"role": "assistant", "content": ""}],
              "winner": "nobody"},
    "labelled": {"history": "p", "human_ref_A": "a", "human_ref_B": "", "labels": 3},
    "helpsteer": {"prompt": "p", "response": "", "helpfulness": "very"},
}  # fmt: skip


@pytest.mark.parametrize("layout", UNLABELLED)
def test_every_layout_is_scored_without_a_usable_label(tmp_path, layout):
    path = write_rows(tmp_path / "rows.jsonl", [UNLABELLED[layout]])
    (record,) = read_in_order(str(path), None, "auto", require_preferences=False)
    assert not isinstance(record, tuple), record
    assert not record.preferences and all(response.text in ("", "a") for response in record.responses)
    (refused,) = read_in_order(str(path), None, "auto", require_preferences=True)
    assert isinstance(refused, tuple), refused  # training still refuses the row


def test_what_training_leaves_out_refuses_no_row(tmp_path):
    """An unrated completion that quotes a placeholder: scored as text, and no reason to refuse the others."""
    scored = (("a", 1), ("b", 2), ("an <image>", None))
    rated = [{"response": text, "fine-grained_score": score} for text, score in scored]
    path = write_rows(tmp_path / "rows.jsonl", [{"instruction": "p", "completions": rated}])
    texts = {}
    for wanted in (True, False):
        (record,) = read_in_order(str(path), None, "auto", require_preferences=wanted)
        texts[wanted] = [response.text for response in record.responses]
    assert texts == {True: ["a", "b"], False: ["a", "b", "an <image>"]}


def test_training_still_refuses_and_names_an_empty_response(tmp_path):
    rows = [{"prompt": "p", "chosen": "a", "rejected": " "}, {"prompt": "p", "responses": ["", "a"],
            "preferences": [[1, 0]]}]  # fmt: skip
    refused = []

    class Named:
        def add(self, *, code, message, **_):
            refused.append((code, message.split(" is empty")[0]))

    assert not list(read_source(str(write_rows(tmp_path / "r.jsonl", rows)), quarantine=Named()))
    assert refused == [("EMPTY_RESPONSE", '"rejected"'), ("EMPTY_RESPONSE", '"responses[0]"')]


class Torn(Image.Image):
    """A picture whose decoder fails with what is no OSError, as Pillow's for PNG does."""

    def load(self):
        raise SyntaxError("broken PNG file")


def test_an_error_stands_in_the_place_of_a_group_and_costs_no_other_anything(model):
    long = {"prompt": "cat " * 400, "responses": ["yes"]}
    damaged = {**GOOD, "images": [b"\x89PNG\r\n\x1a\n broken"]}
    odd, torn = {**GOOD, "responses": ["yes", 5]}, {**GOOD, "images": [Torn()]}
    groups = [GOOD, MISSING, {"responses": ["a"]}, GOOD, damaged, long, "text", odd, GOOD, torn]
    found = model.score(groups, on_error="return", tokens_per_pack=300)
    wanted = model.score([GOOD])[0]
    assert [close(found[n], wanted) for n in (0, 3, 8)] == [True] * 3
    errors = {n: found[n] for n in (1, 2, 4, 5, 6, 7, 9)}
    codes = ["IMAGE_MISSING", "BAD_ROW", "IMAGE_DAMAGED", "TOO_LONG", "BAD_ROW", "BAD_ROW", "IMAGE_DAMAGED"]
    assert [(error.index, error.code) for error in errors.values()] == list(zip(errors, codes, strict=True))
    assert found[1].id == "seen" and str(found[1]).startswith('group 1 ("seen"): image "/nowhere.png"')


def test_there_may_be_no_group_or_none_that_can_be_scored(model):
    assert model.score([]) == []
    refused = model.score([MISSING, "text"], on_error="return")
    assert [error.code for error in refused] == ["IMAGE_MISSING", "BAD_ROW"]
    assert [error.code for error in model.score(iter([MISSING]), on_error="return", num_workers=1)] == ["IMAGE_MISSING"]


def test_without_asking_for_it_the_first_error_is_raised(model):
    with pytest.raises(GroupError, match=r'group 1 \("seen"\): .*IMAGE_MISSING') as caught:
        model.score([GOOD, MISSING, {**GOOD, "images": ["/other.png"]}])
    assert isinstance(caught.value, DataError) and caught.value.index == 1
    with pytest.raises(ConfigError, match="on_error: got 'ignore', wanted one of raise, return"):
        model.score([GOOD], on_error="ignore")


@pytest.mark.parametrize(
    "use",
    [list, sum, max, len, float, np.array, np.mean, torch.tensor, json.dumps, lambda e: e[0], lambda e: e > 0,
     lambda e: dict(zip("ab", e, strict=True))],
    ids=["list", "sum", "max", "len", "float", "array", "mean", "tensor", "json", "index", "compare", "zip"],
)  # fmt: skip
def test_an_error_cannot_be_taken_for_rewards(use):
    error = GroupError(3, "x", "IMAGE_MISSING", "image is missing")
    with pytest.raises((GroupError, TypeError)):
        use(error)


def test_an_error_is_an_ordinary_exception():
    error = pickle.loads(pickle.dumps(GroupError(3, None, "TOO_LONG", "long")))
    assert error and (str(error), error.id, error.code) == ("group 3: long (TOO_LONG)", None, "TOO_LONG")
    assert package.GroupError is GroupError and error.exit_code == 65


def test_an_ensemble_returns_the_error_of_the_member_that_has_one(model, text_model):
    ensemble = Ensemble([model, text_model])
    seen = {**GOOD, "images": [make_image(56, 56).data]}
    good, refused = ensemble.score([GOOD, seen], on_error="return")
    assert len(good) == 2 and refused.code == "IMAGE_UNSUPPORTED"
    with pytest.raises(GroupError, match="group 1"):
        ensemble.score([GOOD, seen])


def test_a_response_beyond_what_dynamic_rope_is_exact_for_is_refused_alone():
    network = make_model("internvl")
    text = network.model.config.get_text_config()
    text.rope_parameters = {**text.rope_parameters, "rope_type": "dynamic"}
    text.max_position_embeddings = 60
    model = RewardModel(network)
    long = {"prompt": "cat " * 80, "responses": ["yes"]}
    good, refused = model.score([GOOD, long], on_error="return")
    assert close(good, model.score([GOOD])[0])
    assert refused.code == "TOO_LONG" and "exact up to 60" in refused.message


def test_texts_far_over_the_budget_are_refused_before_all_of_them_is_tokenised(monkeypatch):
    model, seen = RewardModel(make_model("qwen2")), []

    class Counting:
        """The tokenizer, with a count of the characters that it is given."""

        def encode(self, text, **options):
            seen.append(len(text))
            return backend.encode(text, **options)

        def encode_batch_fast(self, texts, **options):
            seen.extend(map(len, texts))
            return backend.encode_batch_fast(texts, **options)

    backend = model.network.encoder._backend
    monkeypatch.setattr(model.network.encoder, "_backend", Counting())
    long = {"prompt": "a cat, " * 10**5, "responses": ["yes", "no"]}
    many = {"prompt": "a", "responses": [f"{number} " + "dog sits " * 50 for number in range(1000)]}
    for group in (long, many):
        seen.clear()
        [refused] = model.score([group], on_error="return", tokens_per_pack=256)
        assert refused.code == "TOO_LONG" and "more than 256 tokens" in refused.message
        assert 0 < sum(seen) < 20_000


@pytest.mark.parametrize("spread", [1, 7])
def test_responses_that_share_most_of_their_text_are_scored_within_the_budget_of_their_tokens(spread):
    model = RewardModel(make_model("qwen2"))
    shared = ["the cat sits on the dog " * 40, "Is this? " * 80]
    group = {"prompt": "a", "responses": [f"{shared[n // spread % 2]}{n}" for n in range(60)]}
    size = GroupSize.of(encode_group(group_record(group, 0), model.network.encoder)).num_tokens
    assert sum(map(len, group["responses"])) > 20 * size
    assert model.score([group], tokens_per_pack=size) == model.score([group])
