"""The device, its versions and its speed, as facts.json in --out. Exit status 1 without CUDA."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.harness.results import device_name, environment, write_json

PACKAGES = (
    "transformers", "torchao", "liger-kernel", "flash-attn", "flash-attn-3", "flash-attn-4", "pydantic", "numpy",
    "pytest", "pytest-xdist",
)  # fmt: skip
PRODUCT = {"cuda": 8192, "cpu": 512}


def matmul_flops(device: str) -> float:
    """Return FLOPs per second of the best of ten square bf16 products."""
    import torch

    from bench.harness.rates import product_seconds

    size = PRODUCT[device]
    return 2 * size**3 / min(product_seconds(size, size, size, device, torch.bfloat16))


def facts(device: str) -> dict:
    """Return the facts by which figures have to be read: device, versions, bandwidth, matmul rate."""
    import os

    import torch

    from bench.harness.rates import copy_bytes_per_second

    found = environment(*PACKAGES)
    found |= {"device": device_name(), "on_gpu": device == "cuda", "cores": len(os.sched_getaffinity(0))}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "memory_bytes": properties.total_memory,
            "free_bytes": torch.cuda.mem_get_info()[0],
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
        }
    found["matmul_flops"] = matmul_flops(device)
    found["copy_bytes_per_second"] = copy_bytes_per_second(device)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cpu", action="store_true", help="for a rehearsal: no GPU is no failure")
    arguments = parser.parse_args()
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu and not arguments.cpu:
        print(f"torch {torch.__version__} finds no CUDA device")
        return 1
    found = facts("cuda" if on_gpu else "cpu")
    write_json(arguments.out / "facts.json", found)
    print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
