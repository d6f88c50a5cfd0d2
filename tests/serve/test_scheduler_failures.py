"""Faults of packs, of the loop, and clients that leave: who has an error, and who has none."""

import asyncio
import threading

import pytest
from starlette.requests import Request

from fastrm.errors import GroupError, RecordError
from fastrm.serve.app import Service
from fastrm.serve.problems import RequestError
from fastrm.serve.scheduler import Scheduler
from fastrm.serve.settings import ServeSettings
from tests.helpers.scheduling import ask_each, check_close, make_groups, run
from tests.helpers.waiting import PATIENCE


def test_a_pack_that_fails_is_computed_group_by_group(model, scorer, monkeypatch):
    groups = make_groups(3)
    compute = scorer.run

    def fails(found):
        if any(len(group.record.responses) == 3 for group in found):
            raise RuntimeError("out of memory")
        return compute(found)

    monkeypatch.setattr(scorer, "run", fails)
    bad = {"prompt": "a", "responses": ["b", "c", "d"]}
    (*good, failed, last), packs, _ = ask_each(scorer, [*groups[:2], bad, groups[2]])
    assert packs == [4, 1, 1, 1, 1]
    assert [*good, last] == model.score(groups)
    assert isinstance(failed, GroupError) and failed.code == "INTERNAL"


@pytest.mark.parametrize("is_refused", [True, False], ids=["refused", "failed"])
def test_what_cannot_be_computed_harms_no_request_that_it_was_joined_with(model, scorer, monkeypatch, is_refused):
    good = [{"prompt": "the cat", "responses": ["yes"]}, {"prompt": "the cat", "responses": ["no", "so"]}]
    compute = scorer.run

    def fails(found):
        is_bad = ["bad" in [response.text for response in group.record.responses] for group in found]
        if any(is_bad) and not is_refused:
            raise RuntimeError("out of memory")
        refused = RecordError("NON_FINITE_REWARD", "an infinity")
        return [refused if bad else result for bad, result in zip(is_bad, compute(found), strict=True)]

    monkeypatch.setattr(scorer, "run", fails)
    groups = [good[0], {"prompt": "the cat", "responses": ["bad"]}, good[1]]
    (first, bad, last), packs, num_joined = ask_each(scorer, groups)
    assert packs[0] == 1 and num_joined == 2
    check_close([first, last], [model.score([group])[0] for group in good])
    assert isinstance(bad, GroupError) and bad.code == ("NON_FINITE_REWARD" if is_refused else "INTERNAL")


def test_a_loop_that_fails_leaves_nobody_waiting(scorer, monkeypatch):
    def fails(*_):
        raise RuntimeError("a fault in the loop")

    monkeypatch.setattr("fastrm.serve.scheduler.choose", fails)

    async def ask():
        async with Scheduler([scorer]) as scheduler:
            asked = scheduler.score([{"prompt": "the cat", "responses": ["yes"]}] * 2)
            return await asyncio.wait_for(asked, 100), scheduler.is_ready

    results, is_ready = run(ask())
    assert [result.code for result in results] == ["INTERNAL"] * 2 and not is_ready


def test_a_scheduler_whose_groups_all_fail_is_not_ready_until_one_is_computed(model, scorer, monkeypatch):
    compute, groups = scorer.run, [{"prompt": f"the {n}", "responses": ["yes", "no", "so", "a"]} for n in range(8)]

    def fails(found):
        raise RuntimeError("the device is lost")

    async def ask():
        async with Scheduler([scorer]) as scheduler:
            monkeypatch.setattr(scorer, "run", fails)
            assert all(isinstance(result, GroupError) for result in await scheduler.score(groups[:7]))
            ready = [scheduler.is_ready]
            await scheduler.score(groups[7:])
            ready.append(scheduler.is_ready)
            monkeypatch.setattr(scorer, "run", compute)
            assert await scheduler.score(groups[:1]) == model.score(groups[:1])
            return [*ready, scheduler.is_ready]

    assert run(ask()) == [True, False, True]


class Held:
    """A model whose groups are prepared when the gate is opened, and then refused."""

    name, tokens_per_pack = "held", 100

    def __init__(self):
        self.gate = threading.Event()

    def is_routed(self, record):
        return False

    def prepare(self, *_):
        assert self.gate.wait(PATIENCE)
        raise RecordError("BAD_ROW", "refused")


@pytest.mark.parametrize("leaves", [True, False], ids=["client left", "server ended"])
def test_a_client_that_leaves_an_ending_server_is_not_a_lost_answer(leaves):
    held = Held()

    async def ask():
        left = asyncio.Event()

        async def receive():
            await left.wait()
            return {"type": "http.disconnect"}

        async with Scheduler([held]) as scheduler:
            request = Request({"type": "http"}, receive)
            service, group = Service(scheduler, ServeSettings()), {"prompt": "a", "responses": ["b"]}
            asked = asyncio.create_task(service.score(request, [group]))
            while not scheduler.queue_length:
                await asyncio.sleep(0.001)
            scheduler.stop_accepting()
            left.set() if leaves else asked.cancel()
            with pytest.raises(RequestError if leaves else asyncio.CancelledError):
                await asked
            held.gate.set()
            return scheduler.num_lost

    assert run(ask()) == (0 if leaves else 1)
