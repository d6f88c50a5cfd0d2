"""A plan as tables and advice on standard output, and as JSON."""

import math
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console

from fastrm.config import Config
from fastrm.forecast.hardware import ASSUMED_BANDWIDTH_SHARE
from fastrm.forecast.memory import MODES, PeakMemory
from fastrm.forecast.parameters import Parameters, sum_parameters
from fastrm.forecast.plan import GROWING_PAIRS, Plan, TimePlan
from fastrm.forecast.room import print_needs
from fastrm.forecast.stand_ins import describe_replaced
from fastrm.forecast.step_time import StepTime, efficiency, messages
from fastrm.forecast.ways import Fit
from fastrm.tables import Table
from fastrm.ui import gib, gpus, peta, say, seconds, show

SHOWN = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "states": "AdamW states",
    "gathered": "gathered weights (ZeRO-3)",
    "buckets": "gradients on their way",
    "activations": "activations kept for the backward pass",
    "copies": "bf16 copies of weights (autocast)",
    "working": "the layer that runs",
}


def print_plan(plan: Plan, console: Console) -> None:
    """Print assumptions, then memory, communication, time and advice."""
    _print_assumptions(plan, console)
    print_parameters(console, plan.parameters, plan.origin)
    _print_memory(plan, console)
    _print_ways(plan, console)
    print_needs(console, plan.config, plan.needs, plan.assumptions.num_gpus)
    _print_communication(plan, console)
    _print_time(plan, console)
    say(console, "What to do")
    for line in advice(plan):
        say(console, f"  {line}")


def advice(plan: Plan) -> list[str]:
    """Return sentences on whether the run fits, and on other changes that are worth making."""
    given = plan.assumptions
    lines = memory_advice(plan.config, given.num_gpus, plan.memory, plan.fits, given.usable_bytes, plan.largest_pack)
    idle = given.num_gpus - plan.step.busy_gpus
    pairs = plan.work.num_pairs
    if idle:
        lines.append(
            f"{idle:,} of {gpus(given.num_gpus)} have no pair in a step: optim.batch_pairs is {pairs:,}; use fewer, or "
            "raise it (another batch size is another recipe)."
        )
    if plan.dominated is not None and given.num_gpus >= plan.dominated:
        lines.append(
            f"communication takes longer than computing from {gpus(plan.dominated)} on: with optim.batch_pairs "
            f"{pairs:,} more GPUs buy little; raise it, or use fewer."
        )
    return lines


def memory_advice(
    config: Config, num_gpus: int, peak: PeakMemory, fits: Sequence[Fit], usable: int, largest_pack: int | None
) -> list[str]:
    """Return sentences: whether the configured way fits a GPU's usable bytes, and if not, the least changes that do.

    Args:
        peak: of the configured way.
        largest_pack: tokens of the largest pack that fits in the configured way; None if none does.
    """
    needed = f"{gib(peak.total)} GiB of {gib(usable)} GiB"
    if peak.total <= usable:
        return [f"fits: {needed}.", *_lighter(config, num_gpus, fits, usable)]
    lines = [f"does not fit: {needed}, at its fullest in: {peak.when}."]
    if largest_pack is not None:
        lines.append(f"optim.tokens_per_pack and data.max_tokens_per_group: {largest_pack} would fit.")
    mode = config.model.activation_checkpointing
    possible = [fit for fit in fits if fit.peak.total <= usable]
    # First the fits that recompute no more than they must, on as many GPUs as were asked for.
    possible.sort(key=lambda fit: (fit.way.num_gpus != num_gpus, fit.checkpointing != mode, fit.peak.total))
    seen: set[str] = set()
    for fit in possible:
        if fit.way.label not in seen:
            seen.add(fit.way.label)
            lines.append(f"fits: {fit.text}.")
    if not possible:
        lines.append("no other way fits packs of this size either: smaller packs, or a GPU with more memory.")
    return lines


def _lighter(config: Config, num_gpus: int, fits: Sequence[Fit], usable: int) -> list[str]:
    """Return sentences on a mode of checkpointing that recomputes less and fits as well."""
    costs = {"none": 0, "selective": 1, "full": 2}
    mode = config.model.activation_checkpointing
    tree = config.model_dump()
    for fit in sorted(fits, key=lambda fit: costs[fit.checkpointing]):
        same = fit.way.num_gpus == num_gpus and all(
            tree[key.split(".")[0]][key.split(".")[1]] == value for key, value in fit.way.settings.items()
        )
        if same and costs[fit.checkpointing] < costs[mode] and fit.peak.total <= usable:
            text = f"model.activation_checkpointing: {fit.checkpointing} fits too ({gib(fit.peak.total)} GiB)"
            return [f"{text} and computes less again."]
    return []


def _print_assumptions(plan: Plan, console: Console) -> None:
    given, load, network = plan.assumptions, plan.load, plan.network
    say(console, f"{gpus(given.num_gpus)}, {given.gpu.name}: a prediction, not a measurement. Assumed:")
    gpu, sure = given.gpu, f"{given.gpu.source}"
    lines = [
        f"a step has {load.num_pairs:,} {load.unit} (optim.batch_pairs), each of a prompt of its own: "
        f"{load.image_tokens:,} image tokens ({load.image_key}), {load.lengths}",
        f"an epoch has {given.num_pairs:,} pairs ({given.pairs_origin})",
        f"the slowest rank has {given.imbalance:g} times the mean (--imbalance)",
        f"computing: {plan.rate.flops / 1e12:,.0f} TFLOP/s; {plan.rate.origin}",
        *plan.notes,
        f"AdamW: {ASSUMED_BANDWIDTH_SHARE:.0%} of {gpu.memory_bandwidth / 1e12:g} TB/s ({sure})",
        f"messages: {network.nvlink / 1e9:,.0f} GB/s inside a node of 8 (--nvlink-gbs), {network.network / 1e9:,.0f} "
        f"GB/s between nodes for each GPU (--network-gbs); unless given, 80 % of {gpu.nvlink / 1e9:,.0f} ({sure}) "
        "and of 50 (a 400 Gb/s card)",
        f"a hop takes {network.latency_s * 1e6:g} us (--latency-us); {network.overlap:.0%} of the messages can run "
        "beside computing (--overlap)",
        f"memory: {gib(gpu.memory_bytes)} GiB ({sure}), of which {gib(given.reserve_bytes)} GiB are kept for the CUDA "
        "context, the communication library and fragmentation (--reserve-gb)",
        "what a step holds: found by running the network itself on tensors without data; what kernels allocate inside "
        "themselves is not seen",
        *describe_replaced(plan.config),
    ]
    for line in lines:
        say(console, f"  - {line}")


def print_parameters(console: Console, parts: dict[str, Parameters], origin: str) -> None:
    """Print the table of parameters by part."""
    table = Table("part", "all", "trained")
    for name, count in (*parts.items(), ("all", sum_parameters(parts))):
        table.add_row(name, f"{count.total:,}", f"{count.trainable:,}")
    show(console, f"Parameters (exact; {origin})", table)


def _print_memory(plan: Plan, console: Console) -> None:
    table = Table("part", "GiB")
    values = vars(plan.memory)
    for name, label in PARTS.items():
        if values[name]:
            table.add_row(label, gib(values[name]))
    table.add_section()
    table.add_row("sum", gib(plan.memory.total))
    packs = f"packs of {plan.config.optim.tokens_per_pack:,} tokens"
    show(console, f"Memory of a GPU at its fullest ({plan.memory.when}), {packs}", table)
    if plan.pixel_bytes:
        say(console, f"  Pixels of a pack, in the vision tower's forward pass alone: {gib(plan.pixel_bytes)} GiB.")


def _print_ways(plan: Plan, console: Console) -> None:
    table = Table("way to run", *MODES, "which fit")
    usable = plan.assumptions.usable_bytes
    by_way: dict[str, list] = {}
    for fit in plan.fits:
        by_way.setdefault(fit.way.label, []).append(fit)
    for label, fits in by_way.items():
        fitting = [fit.checkpointing for fit in fits if fit.peak.total <= usable]
        table.add_row(label, *(gib(fit.peak.total) for fit in fits), ", ".join(fitting) or "none of them")
    show(console, f"Peak memory by activation checkpointing, GiB of {gib(usable)} GiB", table)


def _print_communication(plan: Plan, console: Console) -> None:
    count = plan.assumptions.num_gpus
    if count == 1:
        return
    table = Table("messages of a step", "times", "GB sent by each GPU", "GB of it through its network card", "s")
    for message in messages(plan.work, count, plan.step.num_packs):
        sent = message.sent(count)
        table.add_row(
            message.name, f"{message.num_calls:,}", f"{sent / 1e9:,.1f}", f"{sent / 8e9 if count > 8 else 0:,.1f}",
            seconds(message.seconds(count, plan.network)),
        )  # fmt: skip
    packs = f"{plan.step.num_packs} pack{'s' * (plan.step.num_packs > 1)} a step"
    show(console, f"Communication, ZeRO-{plan.work.stage}, float32, {packs}", table)


def _print_time(plan: Plan, console: Console) -> None:
    columns = ("packs", "computing", "AdamW", "waiting for messages", "step", "pairs/s", "efficiency", "days an epoch")
    table = Table("GPUs", *columns)
    shown = sorted({count for count in SHOWN if count <= plan.steps[-1].num_gpus} | {plan.assumptions.num_gpus})
    for step in (step for step in plan.steps if step.num_gpus in shown):
        table.add_row(*_time_row(plan, step), style="bold" if step.num_gpus == plan.assumptions.num_gpus else None)
    pairs = f"{plan.work.num_pairs:,} pairs, and an epoch of {plan.assumptions.num_pairs:,}"
    show(console, f"One step of {pairs}; times in seconds", table)
    flops = sum(part.total for part in plan.flops.values())
    vision = plan.flops["vision"].total
    lines = [f"  {peta(flops)} PFLOP a step, {vision / flops:.0%} of it in the vision tower and projector."]
    for text, count in (
        (f"With {plan.work.num_pairs:,} pairs a step", plan.dominated),
        (f"With {GROWING_PAIRS} pairs a step for each GPU", plan.growing_dominated),
    ):
        where = f"from {gpus(count)} on" if count else f"nowhere up to {gpus(plan.steps[-1].num_gpus)}"
        lines.append(f"  {text}, communication takes longer than computing {where}.")
    for line in lines:
        say(console, line)


def _time_row(plan: Plan, step: StepTime) -> list[str]:
    return [
        f"{step.num_gpus:,}", f"{step.num_packs}", seconds(step.compute), seconds(step.update), seconds(step.exposed),
        seconds(step.total), f"{step.pairs_per_second:,.0f}", f"{efficiency(step, plan.work):.0%}",
        f"{days(plan, step):.2f}",
    ]  # fmt: skip


def days(plan: TimePlan, step: StepTime) -> float:
    """Return the days of an epoch."""
    return math.ceil(plan.num_steps) * step.total / 86400


def as_json(plan: Plan) -> dict:
    """Return the whole plan in plain types; sizes in bytes, times in seconds."""
    given = plan.assumptions
    steps = {"configured": plan.steps, f"{GROWING_PAIRS} pairs for each GPU": plan.growing}
    return {
        "assumptions": {
            "num_gpus": given.num_gpus, "gpu": asdict(given.gpu), "num_pairs": given.num_pairs,
            "pairs_origin": given.pairs_origin, "imbalance": given.imbalance, "reserve_bytes": given.reserve_bytes,
            "network": asdict(plan.network), "rate": asdict(plan.rate), "load": asdict(plan.load),
        },
        "parameters": {name: asdict(count) for name, count in plan.parameters.items()},
        "memory": {**asdict(plan.memory), "total": plan.memory.total, "pixels": plan.pixel_bytes},
        "needs": asdict(plan.needs),
        "fits": [
            {
                "num_gpus": fit.way.num_gpus, "settings": fit.way.settings, "checkpointing": fit.checkpointing,
                **asdict(fit.peak), "total": fit.peak.total, "fits": fit.peak.total <= given.usable_bytes,
            }
            for fit in plan.fits
        ],
        "communication": [
            {**asdict(message), "sent": message.sent(given.num_gpus)}
            for message in messages(plan.work, given.num_gpus, plan.step.num_packs)
        ],
        "flops": {name: asdict(part) for name, part in plan.flops.items()},
        "steps": {name: [_step_json(step) for step in found] for name, found in steps.items()},
        "dominated": plan.dominated,
        "growing_dominated": plan.growing_dominated,
        "days": days(plan, plan.step),
        "advice": advice(plan),
    }  # fmt: skip


def _step_json(step: StepTime) -> dict:
    return {**asdict(step), "exposed": step.exposed, "total": step.total, "pairs_per_second": step.pairs_per_second}
