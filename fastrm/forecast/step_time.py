"""The time of a step on a number of GPUs: computing, the optimizer, and messages that are not hidden.

A ring over N ranks sends (N - 1) / N of a tensor from each rank for a reduce-scatter or an all-gather, and
twice that for an all-reduce (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms").
Rajbhandari et al. 2020 (arXiv 1910.02054, section 7) count ZeRO's tensors. The messages and their times are those
of fastrm's engine on DeepSpeed 0.19.8, which sends float32:

    stage 1    once a step: gradients all-reduced (DeepSpeed reduces buckets for all ranks at once), then
               the trained weights gathered
    stage 2    the gradients after every pack, the weights once a step
    stage 3    for every pack: all weights gathered for the forward pass, the trained ones again for the
               backward pass, gradients reduced and scattered
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from fastrm.config import Config
from fastrm.forecast.assumed import IMBALANCE
from fastrm.forecast.hardware import GPUS_PER_NODE
from fastrm.forecast.parameters import Parameters
from fastrm.forecast.workload import Workload

ELEMENT = 4  # bytes of a float32
# Elements that DeepSpeed gathers or reduces at once: fastrm.train.deepspeed_engine.BUCKET, and the defaults of
# allgather_bucket_size and stage3_prefetch_bucket_size.
REDUCED_AT_ONCE, GATHERED_AT_ONCE, PREFETCHED_AT_ONCE = 200_000_000, 500_000_000, 50_000_000


@dataclass(frozen=True)
class Network:
    """The network between the ranks.

    Attributes:
        nvlink, network: bytes per second and GPU in each direction that collectives reach, inside a node
            and between nodes.
        latency_s: of one hop of a ring.
        overlap: share of the communication that can run while the GPU computes, if there is enough to compute.
    """

    nvlink: float
    network: float
    latency_s: float
    overlap: float


@dataclass(frozen=True)
class Collective:
    """A kind of message of a step.

    Attributes:
        num_bytes: of the tensors, all calls together.
        factor: how often a ring sends them: 1, or 2 for an all-reduce.
        num_calls: in a step.
    """

    name: str
    num_bytes: int
    factor: int
    num_calls: int

    def sent(self, num_gpus: int) -> float:
        """Return the bytes that each GPU sends in a step, to its neighbour in a ring."""
        return self.factor * self.num_bytes * (num_gpus - 1) / num_gpus

    def seconds(self, num_gpus: int, network: Network) -> float:
        """Return the seconds of all calls one after another.

        Rings cross from node to node at one GPU in eight, each ring at another: a network card carries an
        eighth of what a GPU sends.
        """
        sent = self.sent(num_gpus)
        transfer = sent / network.nvlink
        if num_gpus > GPUS_PER_NODE:
            transfer = max(transfer, sent / (GPUS_PER_NODE * network.network))
        return transfer + self.num_calls * self.factor * (num_gpus - 1) * network.latency_s


def collectives(parameters: Parameters, stage: int, num_packs: int) -> list[Collective]:
    """Return all messages of one step of two or more ranks; small ones (loss, norm) are left out.

    Args:
        parameters: of the whole network.
        num_packs: of the step on each rank.
    """
    trained, everything = parameters.trainable, parameters.total
    if stage == 3:
        return [
            _collective("all-gather of weights, forward", everything, 1, PREFETCHED_AT_ONCE, num_packs),
            _collective("all-gather of weights, backward", trained, 1, PREFETCHED_AT_ONCE, num_packs),
            _collective("reduce-scatter of gradients", trained, 1, REDUCED_AT_ONCE, num_packs),
        ]
    return [
        _collective("all-reduce of gradients", trained, 2, REDUCED_AT_ONCE, 1 if stage == 1 else num_packs),
        _collective("all-gather of weights", trained, 1, GATHERED_AT_ONCE, 1),
    ]


def _collective(name: str, num_elements: int, factor: int, at_once: int, times: int) -> Collective:
    return Collective(name, ELEMENT * num_elements * times, factor, math.ceil(num_elements / at_once) * times)


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
