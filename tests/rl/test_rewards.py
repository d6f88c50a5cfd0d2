"""The schemes, and that a prompt is asked about once for all its rollouts."""

import asyncio
import io

import numpy as np
import pytest
from PIL import Image

from fastrm.errors import ConfigError, DataError
from fastrm.evaluate.reward_model import RewardModel
from fastrm.rl import Client, JudgeReward, Rewards, Sample
from fastrm.rl.client import ServerError
from fastrm.rl.functions import areal_function
from fastrm.rl.rewards import sigmoid
from fastrm.rl.samples import group_samples
from fastrm.rl.trl import read_rollouts, reward_function
from tests.helpers.reward_server import CountingScorer, Reply, reward_of, reward_server
from tests.helpers.support import make_image, make_model

MESSAGES = [{"role": "user", "content": "2 + 2?"}]
SAMPLES = [Sample("2 + 2?", text, truth="4") for text in ("4", "It is 4.", "5", "four", "4")]


def picture(seed=0, mode="RGB"):
    return Image.open(io.BytesIO(make_image(30, 20, seed).data)).convert(mode)


def by_both(rewards, samples):
    found = rewards(samples)
    assert asyncio.run(rewards.compute_async(samples)) == found
    return found


def test_schemes_are_those_of_the_paper():
    model = [reward_of(MESSAGES, (), sample.response) for sample in SAMPLES]
    right = [True, True, False, False, True]
    assert by_both(Rewards(scheme="rule"), SAMPLES) == [float(one) for one in right]
    assert by_both(Rewards(CountingScorer()), SAMPLES) == model
    hybrid = by_both(Rewards(CountingScorer(), scheme="hybrid"), SAMPLES)
    assert hybrid == [1.0 if one else 1 / (1 + np.exp(-r)) for one, r in zip(right, model, strict=True)]


def test_hybrid_asks_only_about_wrong_answers():
    scorer = CountingScorer()
    Rewards(scorer, scheme="hybrid")(SAMPLES)
    assert scorer.groups == [{"messages": MESSAGES, "responses": ["5", "four"]}]
    Rewards(scorer, scheme="hybrid")(SAMPLES[:2])
    assert len(scorer.groups) == 1, "with all answers right, nothing is asked"


def test_sigmoid_of_any_reward_is_a_number():
    assert [sigmoid(value) for value in (-1e4, 0.0, 1e4)] == [0.0, 0.5, 1.0]


def test_equal_prompts_and_images_are_asked_about_once(tmp_path):
    """Trainers give each rollout copies of its prompt and images, here in every form that they use."""
    image = picture()
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    (tmp_path / "a.png").write_bytes(file.getvalue())
    parts = [{"type": "image", "image": image.copy(), "text": None}, {"type": "text", "text": "So?", "image": None}]
    forms = [
        ([{"role": "user", "content": parts}], None),
        (np.array([{"role": "user", "content": np.array(parts)}]), [image]),
        ([{"role": "user", "content": [{"type": "image"}, parts[1]]}], [image.copy()]),
    ]
    found = group_samples(Sample(prompt, f"answer {n}", images) for n, (prompt, images) in enumerate(forms))
    assert not found.errors and found.places == [(0, 0), (0, 1), (0, 2)] and len(found.groups) == 1
    other = [Sample("So?", "x", [one]) for one in (image, picture(1), {"bytes": b"\x89PNG", "path": None}, "a.png")]
    assert len(group_samples(other).groups) == 4


def test_pictures_that_only_look_alike_are_not_one():
    indexed = picture().convert("P")
    recoloured = indexed.copy()
    recoloured.putpalette(bytes(range(256)) * 3)
    clear = indexed.copy()
    clear.info["transparency"] = indexed.getpixel((0, 0))
    turned = picture()
    turned.info["exif"] = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    pictures = [indexed, recoloured, clear, picture(), turned, picture(mode="L")]
    assert len(group_samples(Sample("So?", "x", [one]) for one in pictures).groups) == len(pictures)


def test_a_placeholder_in_text_stays_text():
    model = RewardModel(make_model("qwen2_5_vl"))
    samples = [Sample("What does <image> mean?", "<image> is a <<video>>"), Sample("So <image>?", "yes", [picture()])]
    escaped = {"prompt": "What does <<image>> mean?", "responses": ["<<image>> is a <<<video>>>"]}
    placed = {"prompt": "So <image>?", "images": [picture()], "responses": ["yes"]}
    assert Rewards(model)(samples) == [rewards[0] for rewards in model.score([escaped, placed])]


@pytest.mark.parametrize("scheme", ["rule", "model"])
@pytest.mark.parametrize("row", [{"prompt": "2 + 2?", "response": "4"}, "4", None])
def test_a_row_that_is_no_sample_is_named(scheme, row):
    rewards = Rewards(CountingScorer(), scheme=scheme)
    said = rf"samples\[1\] is a {type(row).__name__}, wanted a fastrm.rl.Sample: Sample\(prompt, response"
    with pytest.raises(DataError, match=said):
        rewards([SAMPLES[0], row])
    with pytest.raises(DataError, match=said):
        asyncio.run(rewards.compute_async([SAMPLES[0], row]))


def test_an_array_of_pixels_is_refused_with_what_to_do(caplog):
    assert by_both(Rewards(CountingScorer()), [Sample("x", "y", np.zeros((8, 8, 3), np.uint8))]) == [None]
    assert "PIL.Image.fromarray" in caplog.text


def test_a_marker_of_a_trainer_is_the_place_of_an_image_that_is_lost():
    rewards = Rewards(RewardModel(make_model("qwen2_5_vl")))
    samples = [Sample("So <image>?", "yes", has_markers=marked) for marked in (True, False)]
    lost, text = by_both(rewards, samples)
    assert lost is None and text is not None and rewards.num_failed == {"IMAGE_COUNT": 2}


def test_one_bad_response_does_not_cost_its_group_the_rewards(caplog):
    samples = [Sample("2 + 2?", text) for text in ("4", "a NUL \0", "unscorable", "\ud800", "5")]
    samples += [Sample("x", "y", ["no such file"]), Sample([3], "y"), Sample("x", 3)]
    rewards = Rewards(CountingScorer())
    found = by_both(rewards, samples)
    assert found == [reward_of(MESSAGES, (), "4"), None, None, None, reward_of(MESSAGES, (), "5"), None, None, None]
    assert rewards.num_failed == {"BAD_TEXT": 4, "TOO_LONG": 2, "BAD_ROW": 4, "IMAGE_MISSING": 2}  # of two calls
    assert "rollout 1 of a batch has no reward: a response holds a NUL character" in caplog.text


def test_without_a_true_answer_only_the_model_can_tell():
    missing = (None, " ", [], [None], np.array([]), float("nan"))
    samples = [Sample("2 + 2?", "4", truth=truth) for truth in (*missing, "4", np.array(["4", "four"], dtype=object))]
    reward = reward_of(MESSAGES, (), "4")
    assert by_both(Rewards(scheme="rule"), samples) == [None] * len(missing) + [1.0] * 2
    assert by_both(Rewards(CountingScorer(), scheme="hybrid"), samples) == [sigmoid(reward)] * len(missing) + [1.0] * 2
    with pytest.raises(DataError, match=r"true answer: got dict \{'target': '4'\}, wanted text"):
        Rewards(scheme="rule")([Sample("2 + 2?", "4", truth={"target": "4"})])


def test_by_url_and_in_process_give_the_same():
    model = RewardModel(make_model("qwen2_5_vl"))
    samples = [Sample("What is it?", text, [picture()], "7") for text in ("7", "8", "a cat")] + SAMPLES
    with reward_server(model) as (url, bodies):
        for scheme in ("model", "hybrid"):
            assert by_both(Rewards(url, scheme=scheme), samples) == by_both(Rewards(model, scheme=scheme), samples)
        assert len(bodies[0]["groups"]) == 2 and len(bodies[0]["groups"][0]["images"]) == 1


def test_a_server_that_is_gone_stops_the_trainer():
    """With no reward for anything, training would go on with nothing to learn from."""
    with reward_server(CountingScorer(), [Reply(502)] * 2) as (url, _), pytest.raises(ServerError, match="in 2 tries"):
        Rewards(Client(url, tries=2))(SAMPLES)


def test_no_rollouts_get_no_rewards():
    assert by_both(Rewards(CountingScorer()), []) == [] and by_both(Rewards(scheme="rule"), []) == []


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"scheme": "paper"}, "scheme: got 'paper', wanted one of rule, model, hybrid, judge"),
        ({"scheme": "judge"}, 'judge: belongs to the scheme "judge", which needs it'),
        ({"scheme": "rule", "judge": JudgeReward("r1_reward")}, 'judge: belongs to the scheme "judge"'),
        ({"scheme": "hybrid"}, "scheme 'hybrid' needs a reward model: name a URL or a folder"),
        ({"scheme": "rule", "answers": "maths"}, "answers: got 'maths'"),
        ({"model": 7}, "model: got int, wanted a URL, a folder"),
        ({"model": "no/such/folder"}, "no/such/folder"),
        ({"model": "http://localhost:abc"}, "url: got 'http://localhost:abc', wanted one such as"),
        ({"model": "localhost:8000"}, "'localhost:8000', no folder here; a server's URL begins with http:// or https://"),
        ({"model": "http://localhost:8000/get_reward"}, "wanted it without /get_reward: this client asks /v1/rewards"),
    ],
)
def test_settings_that_cannot_be_are_named(arguments, said):
    with pytest.raises(ConfigError, match=said):
        Rewards(**arguments)


@pytest.mark.parametrize("form", ["picture", "path", "bytes", "object"])
def test_one_image_needs_no_list(form, tmp_path):
    """Data sets with one image a row hold it without a list. Text is no list of letters, and an object none of keys."""
    red, path = Image.new("RGB", (8, 8), "red"), tmp_path / "a.png"
    red.save(path)
    data = path.read_bytes()
    one = {"picture": red, "path": str(path), "bytes": data, "object": {"bytes": data, "path": None}}[form]
    asked = group_samples([Sample("So?", "a", images=one), Sample("So?", "b", images=[one])])
    assert not asked.errors and len(asked.groups) == 1 and len(asked.groups[0]["images"]) == 1
    assert asked.groups[0]["responses"] == ["a", "b"]


def test_an_image_that_the_parts_lack_is_not_left_out():
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    prompt = [{"role": "user", "content": [{"type": "image", "image": red}, {"type": "text", "text": "So?"}]}]
    asked = group_samples([Sample(prompt, "a", images=[red, blue]), Sample(prompt, "a", images=[red])])
    assert {number: error.code for number, error in asked.errors.items()} == {0: "IMAGE_COUNT"}


@pytest.mark.parametrize("prompt", [None, {"role": "user", "content": "So?"}, 5])
def test_a_prompt_that_is_none_costs_its_own_rollout_the_reward(prompt):
    asked = group_samples([Sample(prompt, "a"), Sample("So?", "b")])
    assert asked.errors[0].code == "BAD_ROW" and "the prompt is a" in asked.errors[0].message
    assert [group["responses"] for group in asked.groups] == [["b"]]


@pytest.mark.parametrize("scheme", ["rule", "hybrid"])
def test_a_column_of_true_answers_that_is_missing_is_no_reward_of_the_model_alone(scheme):
    rewards = Rewards(CountingScorer(), scheme=scheme)
    calls = [
        lambda: reward_function(rewards, truth="answr")(prompts=["So?"], completions=["a"], answer=["a"]),
        lambda: areal_function(rewards, truth="answr")("So?", "a", answer="a"),
    ]
    for call in calls:
        with pytest.raises(DataError, match=r"needs a column of true answers: got no 'answr' among 'answer'"):
            call()


def test_a_tools_message_is_not_the_answer_of_the_policy():
    tool = {"role": "tool", "content": "42", "name": "add"}
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    answer = {"role": "assistant", "content": "4"}
    found = read_rollouts(["So?"] * 3, [[called, tool], [called], [called, tool, answer]])
    assert [one.response for one in found] == ["", "", "4"]


def test_messages_in_an_array_reach_areal():
    prompt = np.array([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], dtype=object)
    found = areal_function(Rewards(CountingScorer()))("rendered", "c", messages=prompt)
    assert found == reward_of(list(prompt), (), "c")
