"""The time of a step on a number of GPUs: computing, the optimizer, and communication that is not hidden."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from fastrm.config import Config
from fastrm.forecast.assumed import IMBALANCE
from fastrm.forecast.communication import Collective, Network, collectives
from fastrm.forecast.flops import Workload
from fastrm.forecast.hardware import GPUS_PER_NODE
from fastrm.forecast.parameters import Parameters


@dataclass(frozen=True)
class Work:
    """The work of a step, whatever the number of GPUs.

    Attributes:
        num_pairs: of the step.
        seconds_per_pair: of forward and backward pass on one GPU.
        tokens_per_pair, tokens_per_pack: of the packed rows.
        update_seconds: of the optimizer on one GPU that updates everything.
        imbalance: slowest over mean rank.
        parameters: of the network.
        stage: of ZeRO.
    """

    num_pairs: int
    seconds_per_pair: float
    tokens_per_pair: float
    tokens_per_pack: int
    update_seconds: float
    imbalance: float
    parameters: Parameters
    stage: int


@dataclass(frozen=True)
class StepTime:
    """The time of one step on `num_gpus` GPUs, in seconds.

    Attributes:
        busy_gpus: that have at least one pair.
        num_packs: of the slowest rank.
        compute: of the slowest rank.
        communication: of all messages; `hidden` of it while the GPU computes.
    """

    num_gpus: int
    num_pairs: int
    busy_gpus: int
    num_packs: int
    compute: float
    update: float
    communication: float
    hidden: float

    @property
    def exposed(self) -> float:
        """Seconds of communication for which the GPU waits."""
        return self.communication - self.hidden

    @property
    def total(self) -> float:
        """Seconds from one update to the next."""
        return self.compute + self.update + self.exposed

    @property
    def pairs_per_second(self) -> float:
        """Preferences per second of all GPUs together."""
        return self.num_pairs / self.total

    @property
    def dominated(self) -> bool:
        """True if the GPU waits longer for messages than it computes."""
        return self.exposed > self.compute + self.update


def messages(work: Work, num_gpus: int, num_packs: int) -> list[Collective]:
    """Return the collectives of one step; none on one GPU."""
    return collectives(work.parameters, work.stage, num_packs) if num_gpus > 1 else []


def slowest_pairs(num_pairs: float, num_gpus: int, imbalance: float = IMBALANCE) -> float:
    """Return the preferences of a step on the slowest rank: `imbalance` times the mean, at least one."""
    mean = num_pairs / num_gpus
    return max(1.0, mean * imbalance) if num_gpus > 1 else mean


def packs_of_a_step(config: Config, load: Workload, num_gpus: int, imbalance: float = IMBALANCE) -> int:
    """Return the number of packs of a step on the slowest rank."""
    tokens_per_pair = load.num_tokens(config.data.share_prefixes) / load.num_pairs
    pairs = slowest_pairs(load.num_pairs, num_gpus, imbalance)
    return _num_packs(pairs, tokens_per_pair, config.optim.tokens_per_pack)


def _num_packs(pairs: float, tokens_per_pair: float, tokens_per_pack: int) -> int:
    return max(1, math.ceil(pairs * tokens_per_pair / tokens_per_pack))


def step_time(work: Work, num_gpus: int, network: Network) -> StepTime:
    """Predict one step, which is as long as that of the slowest rank."""
    slowest = slowest_pairs(work.num_pairs, num_gpus, work.imbalance)
    num_packs = _num_packs(slowest, work.tokens_per_pair, work.tokens_per_pack)
    compute = slowest * work.seconds_per_pair
    communication = sum(message.seconds(num_gpus, network) for message in messages(work, num_gpus, num_packs))
    return StepTime(
        num_gpus, work.num_pairs, min(num_gpus, work.num_pairs), num_packs, compute, work.update_seconds / num_gpus,
        communication, min(network.overlap * communication, compute),
    )  # fmt: skip


def efficiency(step: StepTime, work: Work) -> float:
    """Return preferences per second and GPU, relative to one GPU with the same step."""
    alone = work.num_pairs * work.seconds_per_pair + work.update_seconds
    return alone / (step.num_gpus * step.total)


def gpu_counts(largest: int) -> list[int]:
    """Return 1, 2, 4, 8, and then whole nodes, up to `largest`."""
    return [count for count in (1, 2, 4) if count <= largest] + list(range(GPUS_PER_NODE, largest + 1, GPUS_PER_NODE))


def first_dominated(work: Work, network: Network, counts: Iterable[int]) -> int | None:
    """Return the least of `counts` at which messages take longer than computing; None if there is none."""
    return next((count for count in counts if step_time(work, count, network).dominated), None)
