"""Files of results: the name of each device's file, and what stands in all of them, the device, date and versions."""

import datetime
import json
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bench import ROOT
from fastrm.json_files import to_json

RESULTS = ROOT / "bench" / "results"


def file_of(device: str, suffix: str, folder: Path = RESULTS, *, quick: bool = False) -> Path:
    """Return the file of a device's results; a quick run has one of its own, which no table is made from."""
    return folder / (file_stem(device) + (suffix.replace(".json", "-quick.json") if quick else suffix))


def load_all(suffix: str, folder: Path = RESULTS) -> list[dict]:
    """Return the reports of all devices in files that end in `suffix`."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*" + suffix))]


def device_name() -> str:
    """Return the name of the GPU, or without one the CPU's model and the cores that this process may use."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else cpu_name()


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        cores = len(os.sched_getaffinity(0))
    except (OSError, StopIteration):
        model, cores = platform.processor() or platform.machine(), os.cpu_count()
    return f"{model}, {cores} cores"


def file_stem(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def package_versions(*packages: str) -> dict[str, str | None]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def environment(*packages: str) -> dict:
    """Return the date, and the versions of what decides a kernel's speed and of these packages."""
    import torch

    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
            "triton": package_versions("triton")["triton"], "cuda": torch.version.cuda, "driver": _driver(),
            **package_versions(*packages),
        },
    }  # fmt: skip


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[0].strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def write_json(file: Path, content: object, indent: int = 1) -> None:
    """Write JSON so that a reader finds the old content or the new one whole, also after a kill."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_text(to_json(content, indent=indent) + "\n")
    draft.replace(file)
