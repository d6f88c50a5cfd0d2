"""The plan of a run on a number of GPUs, before there is one: the content of `fastrm plan`."""

import bisect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fastrm.config import Config
from fastrm.errors import ConfigError
from fastrm.forecast.assumed import IMBALANCE, LATENCY_US, RESERVE_GB, RESULTS
from fastrm.forecast.fake_step import FakeSteps
from fastrm.forecast.flops import Flops, step_flops
from fastrm.forecast.full_pack import full_pack, pixel_bytes
from fastrm.forecast.hardware import ASSUMED_BANDWIDTH_SHARE, NETWORK, Gpu, Rate, find_rate
from fastrm.forecast.memory import MODES, PeakMemory, peak_of
from fastrm.forecast.needs import Needs, needs_of
from fastrm.forecast.parameters import Parameters, count_parameters, sum_parameters
from fastrm.forecast.step_time import Network, StepTime, Work, first_dominated, gpu_counts, packs_of_a_step, step_time
from fastrm.forecast.ways import Fit, ways, with_settings
from fastrm.forecast.workload import Workload, typical_workload
from fastrm.model.architectures import find_architecture, meta_network
from fastrm.model.network import RewardNetwork
from fastrm.model.precision import convert_to_fp8
from fastrm.train.optim import training_bytes

# Share of the communication that runs beside the backward pass. DeepSpeed overlaps with ZeRO-3 alone unless told
# otherwise; how much of it then hides is a guess.
ASSUMED_OVERLAP = {1: 0.0, 2: 0.0, 3: 0.5}
# Preferences per GPU in the second curve of the picture, where the step grows with the number of GPUs.
GROWING_PAIRS = 16
LARGEST = 1024


@dataclass(frozen=True)
class Assumptions:
    """The facts that a plan cannot know. Every one is printed.

    Attributes:
        num_gpus, gpu: of the run.
        num_pairs: of an epoch.
        pairs_origin: of that number, in words.
        imbalance: slowest over mean rank.
        nvlink, network: bytes per second and GPU in each direction that collectives reach.
        latency_s: of one hop.
        overlap: share of the communication that can hide behind computing; None: by ZeRO stage.
        rate_share: of the datasheet's dense bf16 rate; None: measured if it was, else assumed.
        reserve_bytes: of GPU memory for the CUDA context, the communication library and fragmentation.
        results: folder of measurements.
    """

    num_gpus: int
    gpu: Gpu
    num_pairs: int
    pairs_origin: str
    imbalance: float = IMBALANCE
    nvlink: float | None = None
    network: float | None = None
    latency_s: float = LATENCY_US * 1e-6
    overlap: float | None = None
    rate_share: float | None = None
    reserve_bytes: int = round(RESERVE_GB * 1e9)
    results: Path = RESULTS

    def network_of(self, stage: int) -> Network:
        """Return the network between ranks: given values, or 80 % of the datasheets'."""
        return Network(
            self.nvlink or 0.8 * self.gpu.nvlink,
            self.network or 0.8 * NETWORK,
            self.latency_s,
            ASSUMED_OVERLAP[stage] if self.overlap is None else self.overlap,
        )

    @property
    def usable_bytes(self) -> int:
        """GPU memory in bytes that a plan may fill."""
        return self.gpu.memory_bytes - self.reserve_bytes


@dataclass(frozen=True)
class TimePlan:
    """The time that a run takes; times in seconds.

    Attributes:
        origin: of the architecture, in words.
        parameters: by part.
        load: that a step is taken to contain.
        flops: of a step, by part.
        notes: further assumptions.
        steps: on one GPU and on more, the configured number among them.
        dominated: least number of GPUs at which communication takes longer than computing; None: none.
        growing, growing_dominated: the same for steps of GROWING_PAIRS pairs for each GPU.
    """

    config: Config
    assumptions: Assumptions
    origin: str
    parameters: dict[str, Parameters]
    load: Workload
    flops: dict[str, Flops]
    rate: Rate
    notes: list[str]
    work: Work
    network: Network
    steps: list[StepTime]
    dominated: int | None
    growing: list[StepTime]
    growing_dominated: int | None

    @property
    def step(self) -> StepTime:
        """The step on the configured number of GPUs."""
        return next(step for step in self.steps if step.num_gpus == self.assumptions.num_gpus)

    @property
    def num_steps(self) -> float:
        """The number of optimizer steps of an epoch."""
        return self.assumptions.num_pairs / self.work.num_pairs


@dataclass(frozen=True)
class Plan(TimePlan):
    """The results of `fastrm plan`: time, and sizes in bytes.

    Attributes:
        memory: of the configured way; `fits` of all ways.
        needs: of memory in each part of the run, and of disk.
        pixel_bytes: of a pack, as float32, while the vision tower runs.
        largest_pack: tokens of the largest pack that fits; None if none does.
    """

    memory: PeakMemory
    needs: Needs
    pixel_bytes: int
    fits: list[Fit]
    largest_pack: int | None


def make_plan(config: Config, assumptions: Assumptions, steps: FakeSteps | None = None) -> Plan:
    """Plan a run of one epoch.

    Args:
        steps: of the same model, which may have run for other plans; None for new ones.

    Raises:
        ConfigError: as `plan_time`.
    """
    timed, steps = plan_time(config, assumptions), steps or steps_of(config)
    network = steps.network
    load, num_gpus, num_packs = timed.load, assumptions.num_gpus, timed.step.num_packs
    memory = peak_of(steps, config, num_gpus, load, num_packs)
    return Plan(
        **vars(timed),
        memory=memory,
        needs=needs_of(steps, config, load, num_gpus, num_packs),
        pixel_bytes=pixel_bytes(network, full_pack(config, load, network)),
        fits=_fits(steps, config, num_gpus, load, num_packs),
        largest_pack=_largest_pack(steps, config, assumptions, load, num_packs),
    )


def plan_time(config: Config, assumptions: Assumptions) -> TimePlan:
    """Find how long a run of one epoch takes, but not whether it fits.

    Raises:
        ConfigError: for settings that the number of GPUs does not allow, or an architecture that nothing here
            knows.
    """
    _check(config, assumptions)
    network, origin = _network_of(config)
    load = typical_workload(config, network)
    flops = step_flops(
        network, load, shared=config.data.share_prefixes, images_once=True, pruned=config.prunes_last_layer,
        checkpointing=config.model.activation_checkpointing == "full",
    )  # fmt: skip
    rate = _rate(config, assumptions)
    compute, notes = _compute_seconds(config, assumptions, flops, rate)
    work = _work(config, assumptions, network, load, compute)
    connection = assumptions.network_of(config.engine.zero_stage)
    counts = gpu_counts(max(LARGEST, assumptions.num_gpus))
    growing = [step_time(replace(work, num_pairs=GROWING_PAIRS * count), count, connection) for count in counts]
    return TimePlan(
        config=config,
        assumptions=assumptions,
        origin=origin,
        parameters=count_parameters(network),
        load=load,
        flops=flops,
        rate=rate,
        notes=notes,
        work=work,
        network=connection,
        steps=[step_time(work, count, connection) for count in sorted({*counts, assumptions.num_gpus})],
        dominated=first_dominated(work, connection, counts),
        growing=growing,
        growing_dominated=next((step.num_gpus for step in growing if step.dominated), None),
    )


def steps_of(config: Config, *progress: Callable[..., None]) -> FakeSteps:
    """Return steps without data of a configuration's model.

    Args:
        progress: as of `FakeSteps`.

    Raises:
        ConfigError: for an architecture that nothing here knows.
    """
    return FakeSteps(_network_of(config)[0], *progress)


def _network_of(config: Config) -> tuple[RewardNetwork, str]:
    """Return the network on the meta device, and the source of its architecture."""
    try:
        architecture, origin = find_architecture(config.model)
    except LookupError as error:
        raise ConfigError(f"the model cannot be sized: {error.args[0]}") from None
    return meta_network(architecture, config.model, config.paradigm), origin


def _check(config: Config, assumptions: Assumptions) -> None:
    if config.precision.fp8 != "off" and not assumptions.gpu.fp8:
        name = assumptions.gpu.name
        raise ConfigError(f"precision.fp8: {name} has no FP8; add precision.fp8=off, or take another --gpu")
    if assumptions.num_gpus == 1:
        return
    for key, value in (("optim.states", config.optim.states), ("precision.weights", config.precision.weights)):
        if value not in ("fp32", "auto"):
            raise ConfigError(
                f"{key}: {value} is for one rank, got --gpus {assumptions.num_gpus}; add {key}=fp32, or plan with "
                "--gpus 1"
            )
    if config.model.quantize is not None:
        raise ConfigError(
            f"model.quantize: {config.model.quantize} is for one rank, got --gpus {assumptions.num_gpus}; plan with "
            "--gpus 1, or without the key"
        )
    if config.engine.zero_stage == 3 and config.compile != "off":
        raise ConfigError("compile: layers does not run with engine.zero_stage 3; add compile=off, or another stage")


def _rate(config: Config, assumptions: Assumptions) -> Rate:
    name = Path(config.model.path).name if config.model.path else ""
    model = next((part for part in name.split("-") if part in ("3B", "7B")), None)
    variant = "fastrm" if config.precision.fp8 == "off" else "fastrm FP8"
    return find_rate(assumptions.gpu, model, variant, assumptions.rate_share, assumptions.results)


def _compute_seconds(
    config: Config, assumptions: Assumptions, flops: dict[str, Flops], rate: Rate
) -> tuple[float, list[str]]:
    """Return seconds of a step's forward and backward pass on one GPU, and the assumptions besides the rate."""
    compute = sum(part.total for part in flops.values()) / rate.flops
    if config.precision.fp8 == "off" or rate.measured:
        return compute, []
    share = _fp8_share(config, _network_of(config)[0])
    faster = assumptions.gpu.fp8 / assumptions.gpu.bf16
    compute -= (1 - 1 / faster) * share * flops["language"].total / rate.flops
    note = (
        f"FP8: {share:.0%} of the operations of the language model's matrices, {faster:.2g} times as fast as in bf16 "
        "(the datasheet's ratio), ASSUMED; its casts cost nothing"
    )
    return compute, [note]


def _fp8_share(config: Config, network: RewardNetwork) -> float:
    """Return the share in FP8 of the operations of the language model's matrices. It converts the network."""
    if config.model.fuse_projections:
        network.fuse_projections()
    return convert_to_fp8(network, config.precision.fp8, emulate=True).flops_share


def _work(config: Config, assumptions: Assumptions, network: RewardNetwork, load: Workload, compute: float) -> Work:
    """Return the work of a step.

    Args:
        compute: seconds of a step's forward and backward passes on one GPU.
    """
    state = training_bytes(network, config)
    total = sum_parameters(count_parameters(network))
    # Weights and moments are read and written, gradients read.
    moved = 2 * state.weights * total.trainable / total.total + state.gradients + 2 * state.states
    return Work(
        num_pairs=load.num_pairs,
        seconds_per_pair=compute / load.num_pairs,
        tokens_per_pair=load.num_tokens(config.data.share_prefixes) / load.num_pairs,
        tokens_per_pack=config.optim.tokens_per_pack,
        update_seconds=moved / (ASSUMED_BANDWIDTH_SHARE * assumptions.gpu.memory_bandwidth),
        imbalance=assumptions.imbalance,
        parameters=total,
        stage=config.engine.zero_stage,
    )


def _fits(steps: FakeSteps, config: Config, num_gpus: int, load: Workload, num_packs: int) -> list[Fit]:
    """Return all ways to run on that number of GPUs, and on one alone."""
    found = [(way, packs_of_a_step(config, load, 1)) for way in ways(config, 1)]
    if num_gpus > 1:
        found += [(way, num_packs) for way in ways(config, num_gpus)]
    return [
        Fit(way, mode, peak_of(steps, way.config(config, mode), way.num_gpus, load, packs))
        for way, packs in found
        for mode in MODES
    ]


def _largest_pack(
    steps: FakeSteps, config: Config, assumptions: Assumptions, load: Workload, num_packs: int
) -> int | None:
    """Return the tokens of the largest pack that fits, a multiple of 1,024; None if 1,024 do not."""

    def fits(thousands: int) -> bool:
        tokens = 1024 * thousands
        small = with_settings(config, {"optim.tokens_per_pack": tokens, "data.max_tokens_per_group": tokens})
        return peak_of(steps, small, assumptions.num_gpus, load, num_packs).total <= assumptions.usable_bytes

    most = config.optim.tokens_per_pack // 1024
    if not most or fits(most):
        return 1024 * most or None
    return 1024 * bisect.bisect_left(range(1, most), True, key=lambda thousands: not fits(thousands)) or None
