"""The hash by which a prompt's groups meet: what it depends on, and where it is computed."""

import asyncio
import itertools
import threading

import pytest

from fastrm.serve import dispatch
from fastrm.serve.dispatch import Dispatcher, Served, prompt_hash
from fastrm.serve.scheduler import Counts, Scored

IMAGE = "data:image/png;base64,AAAA"
GROUP = {"prompt": "which?", "images": [IMAGE], "responses": ["a", "b"]}


class Places(Dispatcher):
    """Two places, to which prompts go in turns; each says with its rewards which one it is."""

    def __init__(self):
        super().__init__(10)
        self.served = {"one": Served("one", None)}
        self._numbers = itertools.cycle((0, 1))
        self.prompts = []

    counts = Counts()

    def place_of(self, prompt):
        self.prompts.append(prompt)
        return next(self._numbers)

    async def ask(self, place, groups, model, resolver):
        return Scored([[float(place)]] * len(groups), model, 0)


def test_prompts_are_hashed_beside_the_event_loop(monkeypatch):
    """The hash of an image of 20 MB takes tens of milliseconds."""
    threads = []

    def watched(group):
        threads.append(threading.current_thread())
        return prompt_hash(group)

    monkeypatch.setattr(dispatch, "prompt_hash", watched)
    places = Places()
    scored = asyncio.run(places.submit([GROUP, {**GROUP, "prompt": "and?"}, GROUP]))
    assert scored.results == [[0.0], [1.0], [0.0]]
    assert places.prompts[0] == places.prompts[2] != places.prompts[1]
    assert len(threads) == 3 and threading.main_thread() not in threads


def test_responses_and_names_say_nothing_of_the_prompt():
    assert prompt_hash(GROUP) == prompt_hash({"images": [IMAGE], "prompt": "which?", "id": "7", "responses": ["c"]})


@pytest.mark.parametrize(
    "one, other",
    [
        ({"prompt": "a"}, {"prompt": "b"}),
        ({"images": ["a", "b"]}, {"images": ["b", "a"]}),
        ({"images": ["ab", "c"]}, {"images": ["a", "bc"]}),
        ({"images": ["a", ["b"]]}, {"images": [["a"], "b"]}),
        ({"images": [["a"], []]}, {"images": [["a", []]]}),
        ({"prompt": "1"}, {"prompt": 1}),
        ({"prompt": None}, {"prompt": "None"}),
        ({"prompt": {"a": "b"}}, {"prompt": ["a", "b"]}),
        ({"prompt": "a", "images": "b"}, {"prompt": "b", "images": "a"}),
        ({"prompt": 's1"'}, {"prompt": 's1""'}),
        ("a", ["a"]),
    ],
    ids=str,
)
def test_prompts_that_differ_have_other_hashes(one, other):
    assert prompt_hash(one) != prompt_hash(other)


@pytest.mark.parametrize(
    "group", [None, 1.5, "\ud800", {"prompt": "\ud800", "images": [None, True]}, {1: 2, "1": 3}], ids=repr
)
def test_whatever_is_sent_has_a_hash(group):
    assert len(prompt_hash(group)) == 64


def test_no_depth_is_too_deep():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert len(prompt_hash({"prompt": deep})) == 64
