"""The work of `fastrm plan`: make a plan, print it, and write its files."""

from pathlib import Path

from fastrm.config import Config
from fastrm.forecast.assumed import PlanOptions
from fastrm.forecast.fake_step import PROGRESS
from fastrm.forecast.hardware import find_gpu
from fastrm.forecast.inputs import count_preferences
from fastrm.forecast.picture import draw_plan
from fastrm.forecast.plan import Assumptions, Plan, make_plan, steps_of
from fastrm.forecast.report import as_json, print_plan
from fastrm.json_files import to_json
from fastrm.storage import write_whole
from fastrm.ui import Display, make_console, say

# The preferences of an epoch of configs/full.yaml (arXiv 2509.16127).
RECIPE_PAIRS = 2_850_000


def plan_run(
    config: Config, assumptions: Assumptions, json_out: Path | None = None, png_out: Path | None = None
) -> Plan:
    """Make a plan, print it, and write it to files if they are named.

    Raises:
        ConfigError: as `make_plan`.
    """
    with Display() as display:
        plan = make_plan(config, assumptions, steps_of(config, display.task(PROGRESS)))
    console = make_console()
    print_plan(plan, console)
    if json_out is not None:
        json_out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(json_out, to_json(as_json(plan), indent=1) + "\n")
    if png_out is not None:
        draw_plan(plan, png_out)
    for file in filter(None, (json_out, png_out)):
        say(console, f"written: {file}")
    return plan


def assume(config: Config, options: PlanOptions) -> Assumptions:
    """Return the assumptions of a plan by the options of the command line.

    Raises:
        ConfigError: for an unknown kind of GPU.
    """
    nvlink, network = options.nvlink_gbs, options.network_gbs
    return Assumptions(
        options.gpus, find_gpu(options.gpu), *epoch_pairs(config, options.pairs), options.imbalance,
        nvlink=None if nvlink is None else nvlink * 1e9,
        network=None if network is None else network * 1e9,
        latency_s=options.latency_us * 1e-6, overlap=options.overlap, rate_share=options.rate_share,
        reserve_bytes=round(options.reserve_gb * 1e9), results=options.results,
    )  # fmt: skip


def epoch_pairs(config: Config, given: int | None = None) -> tuple[int, str]:
    """Return the preferences of an epoch, and the origin of the number.

    Args:
        given: the number that the user gives; None to count them, or to assume the recipe's.
    """
    if given is not None:
        return given, "--pairs"
    counted = count_preferences(config)
    if counted is not None:
        return counted, "counted in data.train"
    return RECIPE_PAIRS, "ASSUMED, as in the BaseReward recipe: data.train is missing here or large; set --pairs"
