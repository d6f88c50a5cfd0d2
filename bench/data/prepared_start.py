"""Training's side of `prepared_scale.py`, in a process of its own: open the set, plan an epoch, check it.

python bench/data/prepared_start.py CONFIG NUM_RANKS      prints JSON
"""

import json
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

import bench  # noqa: F401  (the kernels' path)
from fastrm.config import load_config
from fastrm.data.batching import StepOrder, divide_step
from fastrm.data.prepared.stored import PreparedSet, read_manifest
from fastrm.model.architectures import find_architecture
from fastrm.train.step_cost import make_cost_model

BATCH_PAIRS = 128  # [P]


def main(config_path: str, num_ranks: int) -> None:
    """Open the set of a configuration and plan one epoch for `num_ranks` ranks."""
    config = load_config(config_path)
    cost = make_cost_model(find_architecture(config.model)[0], config.model)
    started = time.perf_counter()
    folder = Path(config.data.prepared)
    train = PreparedSet(folder, "train", read_manifest(folder), config)
    order = StepOrder(train.preference_counts, BATCH_PAIRS, config.run.seed)
    _, members = next(order.steps_from(0))
    divide_step(members.tolist(), train.groups, config.optim.tokens_per_pack, num_ranks, cost)
    start = {"groups": len(train), "preferences": train.num_preferences, "seconds": time.perf_counter() - started}
    print(
        json.dumps({"start": start, "plan": _plan_epoch(train, order, config.optim.tokens_per_pack, num_ranks, cost)})
    )


def _plan_epoch(train: PreparedSet, order: StepOrder, budget: int, num_ranks: int, cost) -> dict:
    """Plan every step of an epoch for all ranks; count the groups and tokens of its packs."""
    seen, over = np.zeros(len(train), dtype=np.int64), 0
    num_steps, started = order.steps_in_epoch(0), time.perf_counter()
    planning = 0.0
    for _, (_, members) in zip(range(num_steps), order.steps_from(0), strict=False):
        begun = time.perf_counter()
        division = divide_step(members.tolist(), train.groups, budget, num_ranks, cost)
        packs = [pack for rank in range(num_ranks) for pack in division.packs(rank)]
        planning += time.perf_counter() - begun
        for pack in packs:
            np.add.at(seen, list(pack), 1)
            over += sum(train.groups[group].num_tokens for group in pack) > budget
    return {
        "num_ranks": num_ranks,
        "batch_pairs": BATCH_PAIRS,
        "steps": num_steps,
        "steps_per_second": num_steps / planning,
        "groups_per_second": len(train) / planning,
        "seconds": time.perf_counter() - started,
        "groups_not_once": int((seen != 1).sum()),
        "preferences_planned": int((seen * train.preference_counts).sum()),
        "packs_over_budget": int(over),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
