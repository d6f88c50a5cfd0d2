"""GPUs as their makers' datasheets describe them. Nothing here was measured."""

from dataclasses import dataclass

from fastrm.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """A GPU of a node of eight.

    Attributes:
        name: as torch reports it begins with "NVIDIA " and contains this.
        memory_bytes: 10^9 bytes for each GB of the datasheet.
        bf16, fp8: dense floating-point operations per second; 0 where there is no such unit.
        memory_bandwidth: bytes per second.
        nvlink: bytes per second in each direction, half of the datasheet's total.
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
