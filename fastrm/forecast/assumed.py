"""The options of `fastrm plan`, and its assumptions without them; the standard library is enough: --help is instant."""

from dataclasses import dataclass
from pathlib import Path

IMBALANCE = 1.05  # time of the slowest rank over the ranks' mean time
LATENCY_US = 5.0  # of one hop of a message, in microseconds
RESERVE_GB = 4.0  # of each GPU's memory, for the CUDA context, the communication library and fragmentation
RESULTS = Path("bench/results")  # folder of the training steps that bench/training/run_training.py measured


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The options of `fastrm plan`, in the units of the command line; `Assumptions` are made of them.

    Attributes:
        gpus, gpu: number and kind.
        pairs: preferences of an epoch; None to count them, or to assume the recipe's.
        imbalance: time of the slowest rank over the ranks' mean time.
        nvlink_gbs, network_gbs: speed of messages inside a node and between nodes, for each GPU; None: assumed.
        latency_us: of one hop of a message.
        overlap: share of the messages that travel while the GPUs compute; None: assumed.
        rate_share: of the datasheet's bf16 rate; None: measured or assumed.
        reserve_gb: memory of each GPU to leave free.
        results: folder of measurements.
    """

    gpus: int = 1
    gpu: str = "h100"
    pairs: int | None = None
    imbalance: float = IMBALANCE
    nvlink_gbs: float | None = None
    network_gbs: float | None = None
    latency_us: float = LATENCY_US
    overlap: float | None = None
    rate_share: float | None = None
    reserve_gb: float = RESERVE_GB
    results: Path = RESULTS
