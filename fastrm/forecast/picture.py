"""The picture of a plan: the efficiency of more GPUs, and the parts of a step's time."""

from dataclasses import replace
from pathlib import Path

from fastrm.forecast.plan import GROWING_PAIRS, TimePlan
from fastrm.forecast.step_time import efficiency
from fastrm.ui import new_figure

BLUE, ORANGE, GREY = "#2c6fbb", "#d9730d", "#9aa0a6"


def draw_plan(plan: TimePlan, file: Path) -> None:
    """Write a PNG: scaling efficiency over the number of GPUs, and the parts of a step's time.

    A point marks where communication begins to take longer than computing.
    """
    figure = new_figure(12, 4.5)
    left, right = figure.subplots(1, 2)
    _draw_efficiency(plan, left)
    _draw_times(plan, right)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        ticks = [count for count in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if count <= plan.steps[-1].num_gpus]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel("GPUs")
        axes.spines[["top", "right"]].set_visible(False)
    rate = "measured" if plan.rate.measured else "assumed"
    figure.suptitle(
        f"{plan.config.model.path or 'model.init'} on {plan.assumptions.gpu.name}, ZeRO-{plan.work.stage}: predicted, "
        f"with {plan.rate.flops / 1e12:,.0f} TFLOP/s a GPU ({rate})"
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def _draw_efficiency(plan: TimePlan, axes) -> None:
    curves = [
        (f"{plan.work.num_pairs:,} pairs a step", BLUE, plan.steps, lambda step: plan.work, plan.dominated),
        (f"{GROWING_PAIRS} pairs a step for each GPU", ORANGE, plan.growing,
         lambda step: replace(plan.work, num_pairs=step.num_pairs), plan.growing_dominated),
    ]  # fmt: skip
    for label, colour, steps, work_of, dominated in curves:
        shares = {step.num_gpus: efficiency(step, work_of(step)) for step in steps}
        axes.plot(shares.keys(), shares.values(), color=colour, label=label)
        if dominated is not None:
            axes.plot([dominated], [shares[dominated]], "o", color=colour)
            axes.annotate(
                f"{dominated} GPUs: communication\ntakes longer than computing", (dominated, shares[dominated]),
                xytext=(8, 14), textcoords="offset points", fontsize=9, color=colour,
            )  # fmt: skip
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylabel("pairs/s for each GPU, one GPU = 100 %")
    axes.set_title("Scaling efficiency")
    axes.legend(frameon=False, loc="lower left")


def _draw_times(plan: TimePlan, axes) -> None:
    counts = [step.num_gpus for step in plan.steps]
    axes.plot(counts, [step.total for step in plan.steps], color="black", label="step")
    axes.plot(counts, [step.compute for step in plan.steps], color=BLUE, label="computing")
    several = [step for step in plan.steps if step.num_gpus > 1]
    axes.plot([step.num_gpus for step in several], [step.exposed for step in several], color=ORANGE,
              label="waiting for messages")  # fmt: skip
    axes.axvline(plan.work.num_pairs, color=GREY, linewidth=1, linestyle=":")
    axes.annotate(" one pair a GPU", (plan.work.num_pairs, axes.get_ylim()[1]), fontsize=9, color=GREY, va="top")
    axes.set_yscale("log")
    axes.set_ylabel("seconds")
    axes.set_title(f"A step of {plan.work.num_pairs:,} pairs")
    axes.legend(frameon=False, loc="center right")
