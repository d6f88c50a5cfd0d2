"""The messages between the ranks of a step, and the time that they take.

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
from dataclasses import dataclass

from fastrm.forecast.hardware import GPUS_PER_NODE
from fastrm.forecast.parameters import Parameters

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
