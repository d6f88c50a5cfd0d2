"""`fastrm plan`: what a run needs on so many GPUs, before there is one."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from fastrm.config import Config
from fastrm.errors import ConfigError
from fastrm.model.architectures import find_architecture, meta_network
from fastrm.model.network import RewardNetwork
from fastrm.plan.communication import Network
from fastrm.plan.flops import Flops, Workload, step_flops, typical_workload
from fastrm.plan.hardware import NETWORK, Gpu
from fastrm.plan.memory import PeakMemory, full_pack, gpu_computation, peak_memory
from fastrm.plan.parameters import Parameters, count_parameters, sum_parameters
from fastrm.plan.rates import ASSUMED_BANDWIDTH_SHARE, RESULTS, Rate, find_rate
from fastrm.plan.step_time import StepTime, Work, first_dominated, gpu_counts, step_time
from fastrm.train.optim import training_bytes

MODES = ("none", "selective", "full")
# Share of the communication that runs beside the backward pass. DeepSpeed overlaps with ZeRO-3 alone unless told
# otherwise; how much of it then hides is a guess.
ASSUMED_OVERLAP = {1: 0.0, 2: 0.0, 3: 0.5}
# Pairs for each GPU in the second curve of the picture, where the step grows with the number of GPUs.
GROWING_PAIRS = 16
LARGEST = 1024


@dataclass(frozen=True)
class Assumptions:
    """What a plan cannot know. Every one is printed.

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
    imbalance: float = 1.05
    nvlink: float | None = None
    network: float | None = None
    latency_s: float = 5e-6
    overlap: float | None = None
    rate_share: float | None = None
    reserve_bytes: int = 5 * 10**9
    results: Path = RESULTS

    def network_of(self, stage: int) -> Network:
        """What ranks are connected by: given values, or 80 % of the datasheets'."""
        return Network(
            self.nvlink or 0.8 * self.gpu.nvlink,
            self.network or 0.8 * NETWORK,
            self.latency_s,
            ASSUMED_OVERLAP[stage] if self.overlap is None else self.overlap,
        )

    @property
    def usable_bytes(self) -> int:
        """GPU memory that a plan may fill."""
        return self.gpu.memory_bytes - self.reserve_bytes


@dataclass(frozen=True)
class Fit:
    """Peak memory of one way to run.

    Attributes:
        settings: configuration key -> value, where it differs from the configuration.
        num_gpus: it runs on.
    """

    settings: dict[str, str | int]
    num_gpus: int
    peak: PeakMemory


@dataclass(frozen=True)
class Plan:
    """Everything that `fastrm plan` finds out; sizes in bytes, times in seconds.

    Attributes:
        origin: of the architecture, in words.
        parameters: by part.
        load: that a step is taken to contain.
        flops: of a step, by part.
        memory: of the configured way; `fits` of all ways.
        steps: on one GPU and on more, the configured number among them.
        dominated: least number of GPUs at which communication takes longer than computing; None: none.
        num_steps: of an epoch.
    """

    config: Config
    assumptions: Assumptions
    origin: str
    parameters: dict[str, Parameters]
    load: Workload
    flops: dict[str, Flops]
    rate: Rate
    work: Work
    network: Network
    memory: PeakMemory
    fits: list[Fit]
    steps: list[StepTime]
    dominated: int | None
    growing: "list[StepTime]" = field(default_factory=list)
    growing_dominated: int | None = None

    @property
    def step(self) -> StepTime:
        """On the configured number of GPUs."""
        return next(step for step in self.steps if step.num_gpus == self.assumptions.num_gpus)

    @property
    def num_steps(self) -> float:
        """Optimizer steps of an epoch."""
        return self.assumptions.num_pairs / self.work.num_pairs


def make_plan(config: Config, assumptions: Assumptions) -> Plan:
    """Plan a run of one epoch.

    Raises:
        ConfigError: for settings that the number of GPUs does not allow, or an architecture that nothing here
            knows.
    """
    _check(config, assumptions)
    try:
        architecture, origin = find_architecture(config.model)
    except LookupError as error:
        raise ConfigError(f"the model cannot be sized: {error.args[0]}") from None
    network = meta_network(architecture, config.model)
    load = typical_workload(config, network)
    flops = step_flops(
        network, load, shared=config.data.share_prefixes, images_once=True, pruned=True,
        checkpointing=config.model.activation_checkpointing == "full",
    )  # fmt: skip
    rate = _rate(config, assumptions)
    work = _work(config, assumptions, network, load, flops, rate)
    connection = assumptions.network_of(config.engine.zero_stage)
    counts = gpu_counts(max(LARGEST, assumptions.num_gpus))
    steps = [step_time(work, count, connection) for count in sorted({*counts, assumptions.num_gpus})]
    growing = [step_time(replace(work, num_pairs=GROWING_PAIRS * count), count, connection) for count in counts]
    own = next(step for step in steps if step.num_gpus == assumptions.num_gpus)
    fits = _fits(config, assumptions.num_gpus, network, load, own.num_packs)
    return Plan(
        config, assumptions, origin, count_parameters(network), load, flops, rate, work, connection,
        memory=_fit(config, {}, assumptions.num_gpus, network, load, own.num_packs).peak,
        fits=fits, steps=steps, dominated=first_dominated(work, connection, counts),
        growing=growing, growing_dominated=next((step.num_gpus for step in growing if step.dominated), None),
    )  # fmt: skip


def _check(config: Config, assumptions: Assumptions) -> None:
    if assumptions.num_gpus == 1:
        return
    for key, value in (("optim.states", config.optim.states), ("precision.weights", config.precision.weights)):
        if value != "fp32":
            raise ConfigError(
                f"{key}: {value} is for one process, got --gpus {assumptions.num_gpus}; add {key}=fp32, or plan with "
                "--gpus 1"
            )
    if config.engine.zero_stage == 3 and config.compile != "off":
        raise ConfigError("compile: layers does not run with engine.zero_stage 3; add compile=off, or another stage")


def _rate(config: Config, assumptions: Assumptions) -> Rate:
    name = Path(config.model.path).name if config.model.path else ""
    model = next((part for part in name.split("-") if part in ("3B", "7B")), None)
    variant = "fastrm" if config.precision.fp8 == "off" else "fastrm FP8"
    return find_rate(assumptions.gpu, model, variant, assumptions.rate_share, assumptions.results)


def _work(
    config: Config, assumptions: Assumptions, network: RewardNetwork, load: Workload, flops: dict[str, Flops], rate: Rate
) -> Work:
    state = training_bytes(network, config)
    total = sum_parameters(count_parameters(network))
    # Weights and moments are read and written, gradients read.
    trained_weights = state.weights * total.trainable / total.total
    moved = 2 * trained_weights + state.gradients + 2 * state.states
    return Work(
        num_pairs=load.num_pairs,
        seconds_per_pair=sum(part.total for part in flops.values()) / rate.flops / load.num_pairs,
        tokens_per_pair=load.num_tokens(config.data.share_prefixes) / load.num_pairs,
        tokens_per_pack=config.optim.tokens_per_pack,
        update_seconds=moved / (ASSUMED_BANDWIDTH_SHARE * assumptions.gpu.memory_bandwidth),
        imbalance=assumptions.imbalance,
        parameters=total,
        stage=config.engine.zero_stage,
    )


def _fits(config: Config, num_gpus: int, network: RewardNetwork, load: Workload, num_packs: int) -> list[Fit]:
    """All ways to run on that number of GPUs, and on one alone."""
    ways = [
        (1, {"precision.weights": weights, "optim.states": states})
        for weights in (("fp32", "bf16") if config.precision.dtype == "bf16" else ("fp32",))
        for states in ("fp32", "8bit")
    ]
    if num_gpus > 1:
        ways += [(num_gpus, {"engine.zero_stage": stage}) for stage in (1, 2, 3)]
    return [
        _fit(config, {**way, "model.activation_checkpointing": mode}, count, network, load, num_packs if count > 1 else 2)
        for count, way in ways
        for mode in MODES
    ]


def _fit(config: Config, settings: dict, num_gpus: int, network: RewardNetwork, load: Workload, num_packs: int) -> Fit:
    changed = with_settings(config, settings)
    rows = full_pack(changed, load, network)
    return Fit(settings, num_gpus, peak_memory(network, changed, rows, gpu_computation(changed, num_packs), num_gpus))


def with_settings(config: Config, settings: dict[str, str | int]) -> Config:
    """The configuration with other values for `section.key` names, checked again."""
    tree = config.model_dump()
    for key, value in settings.items():
        section, name = key.split(".")
        tree[section][name] = value
    return Config.model_validate(tree)

