"""The reading of groups before they wait: the bound of responses, one hash of a prompt, and places in the queue."""

import asyncio
import hashlib
import threading
from types import SimpleNamespace

import pytest

from fastrm.data.sources.layouts.groups import group_record
from fastrm.errors import RecordError
from fastrm.serve import caches
from fastrm.serve.caches import response_digests
from fastrm.serve.problems import Unavailable
from fastrm.serve.scheduler import Scheduler
from tests.helpers.waiting import PATIENCE, wait_until


class Refuses:
    """A model that refuses every group it prepares, once the gate is open.

    Attributes:
        num_begun: the number of groups that it was given.
    """

    name, tokens_per_pack = "refuses", 100

    def __init__(self):
        self.gate, self.num_begun = threading.Event(), 0

    def is_routed(self, record):
        return False

    def prepare(self, *_):
        self.num_begun += 1
        assert self.gate.wait(PATIENCE)
        raise RecordError("BAD_ROW", "refused")


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, PATIENCE))


GROUP = {"prompt": "the cat", "responses": ["yes"]}


def test_a_group_of_too_many_responses_is_refused_before_any_work_for_it():
    model = Refuses()
    model.gate.set()

    async def ask():
        async with Scheduler([model], max_responses=3) as scheduler:
            return await scheduler.score([{**GROUP, "responses": ["yes"] * count} for count in (4, 3)])

    many, few = run(ask())
    assert (many.code, few.code, model.num_begun) == ("TOO_MANY_RESPONSES", "BAD_ROW", 1)
    assert "4 responses, limit 3 (--max-responses)" in many.message


def test_a_prompt_is_hashed_once_for_all_its_responses(monkeypatch):
    hashed = []

    def sha256(data):
        hashed.append(len(data))
        return hashlib.sha256(data)

    monkeypatch.setattr(caches, "hashlib", SimpleNamespace(sha256=sha256))
    turns = [{"role": "assistant", "content": "hm"}, {"role": "user", "content": "and?"}, {"content": "no"}]
    group = {"prompt": "the cat " * 1000, "responses": ["yes", "no", "yes", turns, "no"]}
    group["responses"][3][2]["role"] = "assistant"
    digests = response_digests("tiny", False, group_record(group, 0))
    assert digests[0] == digests[2] and digests[1] == digests[4] and len(set(digests)) == 3
    assert sum(hashed) < 4 * 8000  # the prompt, that of the response with turns of its own, and the first one anew
    hashed.clear()
    response_digests("tiny", False, group_record({**group, "responses": ["yes", "no"] * 50}, 0))
    assert sum(hashed) < 2 * 8000 + 100 * 200


@pytest.mark.parametrize("model, is_routed, prompt", [("b", False, "p"), ("a", True, "p"), ("a", False, "q")])
def test_digests_differ_by_model_route_and_prompt(model, is_routed, prompt):
    digests = [
        response_digests(*named, group_record({**GROUP, "prompt": text}, 0))
        for named, text in ((("a", False), "p"), ((model, is_routed), prompt))
    ]
    assert digests[0] != digests[1]


def test_a_place_in_the_queue_is_free_when_the_thread_that_prepares_it_has_ended():
    model = Refuses()

    async def ask():
        async with Scheduler([model], max_queue=1) as scheduler:
            asked = asyncio.create_task(scheduler.score([GROUP]))
            await asyncio.to_thread(wait_until, lambda: model.num_begun)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
            assert scheduler.queue_length == 1
            with pytest.raises(Unavailable, match="1 groups wait"):
                await scheduler.score([GROUP])
            model.gate.set()
            while scheduler.queue_length:
                await asyncio.sleep(0.001)
            return await scheduler.score([GROUP])

    (refused,) = run(ask())
    assert refused.code == "BAD_ROW"
