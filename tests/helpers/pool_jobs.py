"""Scoring with data workers in threads of a pool, in a process that has used no other library before.

A worker begun in a thread frees what other threads have kept for themselves. PyAV 19 keeps the converter of frames so,
and freeing it in the worker waits for threads that are not there: where another test has read a video, it never ends.
"""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

from fastrm.data.batching import PackPlan
from fastrm.data.loader import PackBuilder, load_packs
from fastrm.evaluate.reward_model import RewardModel
from tests.helpers.support import make_model, make_record


def exit_codes_of_workers() -> list[int]:
    """Return the exit codes of two data workers that a thread of a pool has begun and that have done their work."""
    builder = PackBuilder([make_record(1)], make_model("qwen2").encoder, True)

    def exit_codes():
        packs = load_packs(builder, [PackPlan((0,), 0, True)] * 3, 2)
        next(packs)
        workers = multiprocessing.active_children()
        assert len(list(packs)) == 2
        return [worker.exitcode for worker in workers]

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(exit_codes).result()


def score_in_threads(calls: list[list[dict]]) -> tuple[list, list]:
    """Return the rewards of each call, by this thread alone and by a thread each with a data worker each."""
    model = RewardModel(make_model("qwen2_5_vl"))
    alone = [model.score(call) for call in calls]
    with ThreadPoolExecutor(len(calls)) as pool:
        return alone, list(pool.map(lambda call: model.score(call, num_workers=1), calls))
