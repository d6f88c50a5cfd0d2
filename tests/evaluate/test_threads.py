"""One model, many threads: the rewards of one thread, to the bit."""

import io
import itertools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from fastrm.data.record import Message, Response
from fastrm.data.rendering import Latest
from fastrm.evaluate.ensemble import Ensemble
from fastrm.evaluate.reward_model import RewardModel
from tests.helpers.own_process import run_alone
from tests.helpers.pool_jobs import score_in_threads
from tests.helpers.support import make_image, make_model

NUM_THREADS = 8


@pytest.fixture(scope="module")
def model():
    return RewardModel(make_model("qwen2_5_vl"))


@pytest.fixture(autouse=True)
def threads_that_alternate():
    """Python changes threads after microseconds, not milliseconds: what can go wrong does so at once."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


def in_threads(function, items):
    """Results of the items by `NUM_THREADS` threads that begin together, in order."""
    num_threads = min(NUM_THREADS, len(items))
    start = threading.Barrier(num_threads)
    with ThreadPoolExecutor(num_threads, initializer=start.wait) as pool:
        return list(pool.map(function, items))


def make_calls(folder):
    """Calls of four groups: special tokens and breakers typed in the text, images as bytes and as files, long lists."""
    path = folder / "picture.png"
    path.write_bytes(make_image(84, 56, seed=9).data)
    calls = []
    for number in range(12):
        typed = "<|im_end|>" if number % 2 else "\ue000 <|im_start|>"
        calls.append([
            {"prompt": f"Is this {number}?", "responses": ["yes", f"{typed} no", "<|image_pad|>"]},
            {"prompt": f"the cat {typed}", "images": [make_image(56, 84, number).data], "responses": ["red", "blue"]},
            {"prompt": "a dog", "images": [str(path)], "responses": [f"{typed} so {n}" for n in range(8)]},
            {"prompt": "on \ue000", "responses": [f"{number} {n}" for n in range(8)]},
        ])  # fmt: skip
    return calls


def test_eight_threads_score_as_one_does(model, tmp_path):
    calls = make_calls(tmp_path)
    wanted = [model.score(call) for call in calls]
    assert in_threads(model.score, calls * 3) == wanted * 3


def test_eight_threads_score_with_an_ensemble_as_one_does(model, tmp_path):
    ensemble = Ensemble([model, RewardModel(make_model("qwen2_5_vl", seed=1)), RewardModel(make_model("qwen2_vl"))])
    calls = make_calls(tmp_path)[:4]
    wanted = [ensemble.score(call) for call in calls]
    assert in_threads(ensemble.score, calls * 3) == wanted * 3


def test_threads_with_data_workers_score_as_one_does(tmp_path):
    wanted, found = run_alone(score_in_threads, make_calls(tmp_path)[:4]).value
    assert found == wanted


def test_threads_may_share_a_picture_that_pillow_has_not_read_yet(model):
    data = make_image(400, 300).data
    wanted = model.score([{"prompt": "a", "images": [data], "responses": ["b"]}])
    for _ in range(5):
        picture = Image.open(io.BytesIO(data))
        group = {"prompt": "a", "images": [picture], "responses": ["b"]}
        assert in_threads(model.score, [[group]] * NUM_THREADS) == [wanted] * NUM_THREADS


def test_one_encoder_encodes_in_eight_threads_as_in_one(model):
    encoder = model.network.encoder
    texts = [f"{word} <|im_end|> {number}" for word, number in itertools.product(("\ue000", "cat", "dog"), range(40))]
    responses = [Response((Message("user", (text,)), Message("assistant", (text[::-1],)))) for text in texts]
    wanted = [encoder.encode(response).tokens.tolist() for response in responses]
    found = in_threads(lambda response: encoder.encode(response).tokens.tolist(), responses * 5)
    assert found == wanted * 5


def test_using_the_models_tokenizer_meanwhile_changes_nothing(model):
    """transformers switches special tokens in texts on and off in its tokenizer, and sets its truncation."""
    encoder = model.network.encoder
    text = "<|im_end|> the cat " * 20
    response = Response((Message("user", (text,)), Message("assistant", ("yes",))))
    wanted = encoder.encode(response).tokens.tolist()
    stock = threading.Lock()  # transformers' own calls are not made for threads

    def use(number):
        if number % 2:
            with stock:
                encoder.tokenizer(text, truncation=True, max_length=1 + number % 5)
            return wanted
        other = Response((*response.messages[:1], Message("assistant", (f"yes {number}",))))
        encoder.encode(other)
        return encoder.encode(response).tokens.tolist()

    assert in_threads(use, range(400)) == [wanted] * 400


def test_a_memory_keeps_the_latest_results():
    memory = Latest(2)
    for key in "abc":
        memory.store(key, key.upper())
    assert [memory.get(key) for key in "abc"] == [None, "B", "C"]
    memory.store("b", "other")
    assert (memory.get("b"), len(memory)) == ("other", 2)


def test_a_memory_stays_small_and_whole_when_threads_fill_it():
    memory = Latest(4)

    def use(number):
        memory.store(str(number), number)
        found = memory.get(str(number))
        return found is None or found == number

    assert all(in_threads(use, range(5000)))
    assert len(memory) <= 4
