"""GPUs as their makers' datasheets describe them, and the rate at which they compute.

No datasheet's figure was measured here. The rate is measured over whole training steps where there is a result of
bench/training/run_training.py, else an assumed share of the datasheet's.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from fastrm.errors import ConfigError
from fastrm.forecast.assumed import RESULTS

# The assumed share of the datasheet's dense rate, over a whole step.
ASSUMED_SHARE = 0.4
# The assumed share of the datasheet's memory bandwidth, in the optimizer's update.
ASSUMED_BANDWIDTH_SHARE = 0.7


@dataclass(frozen=True)
class Gpu:
    """A GPU of a node of eight.

    Attributes:
        name: as torch reports it begins with "NVIDIA " and contains this.
        memory_bytes: 10^9 bytes for each GB of the datasheet.
        bf16, fp8: dense floating-point operations per second; 0 where there is no such unit.
        memory_bandwidth: bytes per second.
        nvlink: bytes per second in each direction, half of the datasheet's total; PCIe's where there is no NVLink.
        source: of all figures.
    """

    name: str
    memory_bytes: int
    bf16: float
    fp8: float
    memory_bandwidth: float
    nvlink: float
    source: str


GPUS = {
    "a100": Gpu("A100", 80 * 10**9, 312e12, 0, 2.039e12, 300e9, "NVIDIA A100 80GB SXM datasheet"),
    "h100": Gpu("H100", 80 * 10**9, 989e12, 1979e12, 3.35e12, 450e9, "NVIDIA H100 SXM datasheet"),
    "h200": Gpu("H200", 141 * 10**9, 989e12, 1979e12, 4.8e12, 450e9, "NVIDIA H200 SXM datasheet"),
    "rtx4090": Gpu("RTX 4090", 24 * 10**9, 165.2e12, 330.3e12, 1.008e12, 32e9, "NVIDIA Ada whitepaper; PCIe 4.0 x16"),
    "b200": Gpu("B200", 180 * 10**9, 2250e12, 4500e12, 8e12, 900e9, "NVIDIA DGX B200 datasheet, an eighth"),
}
GPUS_PER_NODE = 8
# Each GPU has a ConnectX-7 of 400 Gb/s (NVIDIA DGX H100 datasheet).
NETWORK = 50e9


def find_gpu(name: str) -> Gpu:
    """Find the GPU of a name such as h100.

    Raises:
        ConfigError: if there is none.
    """
    if name.lower() not in GPUS:
        raise ConfigError(f"--gpu {name}: not one of {', '.join(GPUS)}; take the one that is nearest to yours")
    return GPUS[name.lower()]


@dataclass(frozen=True)
class Rate:
    """Floating-point operations per second over the forward and backward passes of a step.

    Attributes:
        measured: False if it is assumed.
        origin: in words.
    """

    flops: float
    measured: bool
    origin: str


def find_rate(gpu: Gpu, model: str | None, variant: str, share: float | None, folder: Path = RESULTS) -> Rate:
    """Find the rate that `bench/training/run_training.py` measured on this GPU for this size of model, or assume one.

    Args:
        model: its size in the benchmark, such as 7B; None if it has none.
        variant: of the benchmark: fastrm, or fastrm FP8.
        share: of the datasheet's dense bf16 rate to assume; None to look for a measurement first.
        folder: of the benchmark's results.

    Raises:
        ConfigError: for a file of results that cannot be read.
    """
    if share is None:
        for file in sorted(folder.glob("*-training.json")):
            rate = _measured(file, gpu, model, variant)
            if rate is not None:
                return rate
        share = ASSUMED_SHARE
    text = f"ASSUMED: {share:.0%} of {gpu.bf16 / 1e12:,.0f} TFLOP/s, dense bf16 of the {gpu.source}"
    return Rate(share * gpu.bf16, False, text)


def _measured(file: Path, gpu: Gpu, model: str | None, variant: str) -> Rate | None:
    """Return the mean rate over one file's workloads, weighted by their time; None if it has none."""
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        if gpu.name not in report["device"]:
            return None
        found = [
            entry["variants"][variant]
            for entry in report["entries"]
            if entry["kind"] == "main" and entry["model"] == model and variant in entry["variants"]
        ]
        found = [figures for figures in found if not figures["failed"]]
        flops = sum(figures["flops"] for figures in found)
        seconds = sum(figures["seconds"]["median"] for figures in found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file}: not a result of bench/training/run_training.py ({type(error).__name__}: {error}); remove it, "
            "or give another folder with --results"
        ) from None
    if not found:
        return None
    return Rate(flops / seconds, True, f"measured on {report['device']}: {variant}, {model} ({file})")
