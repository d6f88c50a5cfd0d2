"""Several workers behind one interface: prompts that stay together, and deaths that harm nobody else."""

import asyncio
import os
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from fastrm.data.sources.media import any_path
from fastrm.errors import ConfigError, GroupError
from fastrm.serve.dispatch import prompt_hash
from fastrm.serve.problems import Unavailable, UnknownModel
from fastrm.serve.scheduler import Counts, Scored
from fastrm.serve.workers import WorkerError, Workers
from tests.helpers.waiting import PATIENCE

MAX_QUEUE = 64


class Pids:
    """A scheduler whose rewards say who has answered: the process, and the length of each response.

    A prompt may ask for more: to sleep, to fail, to kill the process, to be one of packs that all fail.
    """

    def __init__(self):
        self.served = {name: SimpleNamespace(reader=f"reader of {name}") for name in ("one", "two")}
        self.counts, self.is_ready = Counts(), True

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def submit(self, groups, model, resolver):
        assert resolver() is any_path
        for group in groups:
            if group["prompt"].startswith("sleep"):
                await asyncio.sleep(3600)
            if group["prompt"].startswith("die"):
                os.kill(os.getpid(), signal.SIGKILL)
            if group["prompt"].startswith("fail"):
                raise ZeroDivisionError("a bug")
            self.is_ready = not group["prompt"].startswith("packs fail")
        self.counts = replace(self.counts, groups=self.counts.groups + len(groups))
        return Scored([self._rewards(number, group) for number, group in enumerate(groups)], model, 10 * len(groups))

    def _rewards(self, number, group):
        if group["prompt"].startswith("bad"):
            return GroupError(number, None, "BAD_ROW", "nothing to read")
        return [float(os.getpid()), *(float(len(response)) for response in group["responses"])]


def make_pids(number):
    return Pids()


def make_none(number):
    if number == 1:
        raise ConfigError("model: runs/none is no folder")
    time.sleep(3600)


@pytest.fixture(scope="module")
def said():
    return []


@pytest.fixture(scope="module")
def run(said):
    """Runs a coroutine function with three workers that all tests share, as starting them takes seconds."""
    with asyncio.Runner() as runner:
        workers = runner.run(Workers(make_pids, 3, max_queue=MAX_QUEUE, say=said.append).__aenter__())
        yield lambda body: runner.run(asyncio.wait_for(body(workers), PATIENCE))
        pids = set(runner.run(asyncio.wait_for(some_pids(workers), PATIENCE)))
        runner.run(workers.__aexit__())
    assert len(pids) == 3
    for pid in pids:  # they end with what started them
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def group(prompt, *responses, **more):
    return {"prompt": prompt, "responses": list(responses or ("yes", "no")), **more}


async def pid_of(workers, prompt):
    return int((await workers.submit([group(prompt)])).results[0][0])


async def some_pids(workers):
    """The processes that answer to thirty prompts."""
    return [await pid_of(workers, f"p{n}") for n in range(30)]


def test_answers_come_in_the_order_of_the_groups(run):
    groups = [group(f"prompt {n}", "a" * n) for n in range(40)]
    groups[7] = group("bad")

    async def body(workers):
        return await workers.submit(groups, "two")

    scored = run(body)
    assert scored.model == "two" and scored.num_tokens == 400
    assert [result[1] for n, result in enumerate(scored.results) if n != 7] == [n for n in range(40) if n != 7]
    error = scored.results[7]
    assert isinstance(error, GroupError) and (error.index, error.code) == (7, "BAD_ROW")
    assert len({result[0] for n, result in enumerate(scored.results) if n != 7}) == 3, "not all workers had work"


def test_equal_prompts_and_images_meet_and_others_spread(run):
    image = "data:image/png;base64,AAAA"

    async def body(workers):
        one, two, three = [
            [(await workers.submit([group("which?", str(n), id=str(n), images=[picture])])).results[0][0]
             for n in range(8)]
            for picture in (image, image + "B", image + "C")
        ]  # fmt: skip
        return one, two, three

    for pids in run(body):
        assert len(set(pids)) == 1
    hashes = {prompt_hash(group("which?", images=[image])), prompt_hash(group("which?", images=[image + "B"]))}
    assert len(hashes | {prompt_hash(group("which?"))}) == 3


def test_a_fault_of_a_worker_is_an_error_of_that_request_alone(run, capfd):
    async def body(workers):
        with pytest.raises(WorkerError, match="ZeroDivisionError: a bug"):
            await workers.submit([group("fail")])
        return await some_pids(workers)

    assert len(set(run(body))) == 3


def test_a_worker_whose_packs_all_fail_is_seen_until_it_computes_again(run):
    async def body(workers):
        before = workers.is_ready
        await pid_of(workers, "packs fail")
        during = workers.is_ready
        await some_pids(workers)  # by all of them
        return before, during, workers.is_ready

    assert run(body) == (True, False, True)


def test_the_queue_is_bounded_and_what_a_client_leaves_makes_room(run):
    async def body(workers):
        asked = [asyncio.create_task(workers.submit([group(f"sleep {n}")])) for n in range(MAX_QUEUE)]
        while workers.queue_length < MAX_QUEUE:
            await asyncio.sleep(0)
        with pytest.raises(Unavailable, match=f"{MAX_QUEUE} groups wait, 1 more") as full:
            await workers.submit([group("p")])
        assert full.value.code == "QUEUE_FULL"
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        assert workers.queue_length == 0
        return await pid_of(workers, "p")

    assert run(body) > 0


def test_another_model_is_named(run):
    async def body(workers):
        with pytest.raises(UnknownModel, match="one, two"):
            await workers.submit([group("p")], "three")

    run(body)


def test_readers_are_those_of_the_workers_and_counts_are_summed(run):
    async def body(workers):
        before = workers.counts.groups
        await some_pids(workers)
        return workers.find(None), workers.find("two"), workers.counts.groups - before

    first, second, groups = run(body)
    assert (first.name, first.reader, second.reader) == ("one", "reader of one", "reader of two")
    assert groups == 30


def test_a_worker_that_cannot_load_ends_the_start():
    async def start():
        async with Workers(make_none, 2):
            raise AssertionError("it started")

    with pytest.raises(ConfigError, match="runs/none is no folder"):
        asyncio.run(asyncio.wait_for(start(), PATIENCE))


def test_a_death_is_named_answered_with_503_and_mended_and_harms_no_other_prompt(run, said):
    async def body(workers):
        before = await some_pids(workers)
        with pytest.raises(Unavailable, match=r"worker \d \(process \d+\) was killed by SIGKILL .* ask again") as lost:
            await workers.submit([group("die")])
        during = after = await some_pids(workers)
        while len(set(after)) < 3:
            await asyncio.sleep(0.2)
            after = await some_pids(workers)
        return lost.value, before, during, after

    lost, before, during, after = run(body)
    (dead,) = [pid for pid in set(before) if f"process {pid})" in str(lost)]
    assert lost.status == 503 and lost.headers["Retry-After"]
    assert len(said) == 1 and f"process {dead}) was killed by SIGKILL; 1 of its requests" in said[0]
    for pid, meanwhile, again in zip(before, during, after, strict=True):
        if pid != dead:
            assert meanwhile == again == pid, "a prompt of another worker moved"
        else:
            assert meanwhile != dead and again not in before, "a prompt did not come back to its worker"
