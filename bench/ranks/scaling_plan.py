"""The tables and the picture of docs/scaling.md: predictions of `fastrm plan` for 8, 64 and 512 GPUs.

python bench/ranks/scaling_plan.py           print the tables
python bench/ranks/scaling_plan.py --write   put them into docs/scaling.md, and draw docs/scaling.png
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import ROOT
from bench.harness.pages import Part, table
from bench.harness.results import RESULTS
from fastrm.config import Config, load_config
from fastrm.forecast.hardware import GPUS
from fastrm.forecast.memory import MODES
from fastrm.forecast.picture import draw_plan
from fastrm.forecast.plan import LARGEST, Assumptions, Plan, make_plan, plan_time, steps_of
from fastrm.forecast.report import days
from fastrm.forecast.step_time import efficiency, first_dominated, gpu_counts, messages
from fastrm.forecast.ways import with_settings
from fastrm.ui import gib, seconds

DOCUMENT, PICTURE = ROOT / "docs" / "scaling.md", ROOT / "docs" / "scaling.png"
PART = Part(DOCUMENT, "tables", "bench/ranks/scaling_plan.py --write")
PAIRS = 2_850_000
# (GPUs, pairs of a step): the recipe's batch, and 16 pairs for each GPU.
CASES = [(8, 128), (64, 128), (64, 1024), (512, 128), (512, 8192)]


def imbalance_of(num_gpus: int, num_pairs: int) -> float | None:
    """Return slowest over mean rank of the recipe's mixture as test_rank_balance.py simulated it, or None."""
    file = RESULTS / "rank-balance.json"
    cases = json.loads(file.read_text())["cases"] if file.exists() else []
    wanted = ("recipe's mixture", num_gpus, num_pairs / num_gpus)
    found = [case for case in cases if (case["workload"], case["num_ranks"], case["pairs_per_rank"]) == wanted]
    return found[0]["by_flops"] if found else None


def case_of(num_gpus: int, num_pairs: int, stage: int = 2, simulated: bool = True) -> tuple[Config, Assumptions]:
    """Return the recipe on this many H100s, with another batch and stage, and what its plan assumes.

    Args:
        simulated: balance of the ranks as it was simulated for these numbers; else the plan's default, which does
            not depend on them.
    """
    recipe = load_config(ROOT / "configs" / "full.yaml")
    config = with_settings(recipe, {"optim.batch_pairs": num_pairs, "engine.zero_stage": stage})
    assumptions = Assumptions(num_gpus, GPUS["h100"], PAIRS, "the recipe's", results=RESULTS)
    imbalance = imbalance_of(num_gpus, num_pairs)
    if simulated and imbalance is not None:
        assumptions = replace(assumptions, imbalance=imbalance)
    return config, assumptions


def tables() -> list[str]:
    """Return the tables as lines of Markdown."""
    steps = steps_of(case_of(*CASES[0])[0])
    plans = {case: make_plan(*case_of(*case), steps) for case in CASES}
    first = plans[CASES[0]]
    usable = gib(first.assumptions.usable_bytes)
    return [
        f"Computing: {first.rate.flops / 1e12:,.0f} TFLOP/s; {first.rate.origin}.",
        *("", "**Time** on H100, ZeRO-2, in seconds:", ""),
        *_time_table(plans),
        *("", f"**Memory** with packs of 32,768 tokens, in GiB; in bold what fits the {usable} GiB of an H100:", ""),
        *_memory_table(plans),
        *("", "**Messages** of a step of 128 pairs on 64 H100:", ""),
        *_message_table(),
    ]


def _time_table(plans: dict) -> list[str]:
    columns = (
        "GPUs", "pairs a step", "slowest / mean rank", "computing", "AdamW", "waiting for messages", "step", "pairs/s",
        "efficiency", "days an epoch", "messages take longer than computing",
    )  # fmt: skip
    rows = []
    for (num_gpus, num_pairs), made in plans.items():
        step = made.step
        simulated, dominated = imbalance_of(num_gpus, num_pairs), _dominated(made)
        cells = [
            f"{num_gpus}", f"{num_pairs:,}", f"{made.work.imbalance:.3f}" + ("" if simulated else " (assumed)"),
            seconds(step.compute), seconds(step.update), seconds(step.exposed), seconds(step.total),
            f"{step.pairs_per_second:,.0f}", f"{efficiency(step, made.work):.0%}", f"{days(made, step):.2f}",
            f"from {dominated:,} GPUs on" if dominated else "nowhere up to 1,024",
        ]  # fmt: skip
        rows.append(cells)
    return table(columns, rows)


def _dominated(made: Plan) -> int | None:
    """Return the least number of GPUs at which messages dominate this step, with the plan's default imbalance."""
    work = replace(made.work, imbalance=Assumptions.imbalance)
    return first_dominated(work, made.network, gpu_counts(LARGEST))


def _memory_table(plans: dict) -> list[str]:
    seen: dict[str, list[str]] = {}
    for made in plans.values():
        for fit in made.fits:
            cells = seen.setdefault(fit.way.label, [])
            if len(cells) < len(MODES):
                fits = fit.peak.total <= made.assumptions.usable_bytes
                cells.append(f"**{gib(fit.peak.total)}**" if fits else gib(fit.peak.total))
    return table(("way to run", *MODES), [(label, *cells) for label, cells in seen.items()])


def _message_table() -> list[str]:
    rows = []
    for stage in (1, 2, 3):
        made = plan_time(*case_of(64, 128, stage))
        for message in messages(made.work, 64, made.step.num_packs):
            sent, took = message.sent(64) / 1e9, seconds(message.seconds(64, made.network))
            rows.append((f"{stage}", message.name, f"{sent:.1f}", took))
    return table(("ZeRO stage", "messages", "GB sent by each GPU", "s"), rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        PART.write(tables())
        draw_plan(plan_time(*case_of(64, 128, simulated=False)), PICTURE)
    else:
        print("\n".join(tables()))
