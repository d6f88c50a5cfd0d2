"""Collects the comparisons of a run: a table at its end, and JSON with --save-results."""

import json
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    f"{'workload':<28} {'variant':<7} {'s/step':>7} {'quartiles':>15} {'pairs/s':>8} "
    f"{'peak MiB':>8} {'time x':>7} {'CPU x':>6} {'tokens x':>8} {'FLOPs x':>8} {'floor':>6}"
)
_KEY = pytest.StashKey()


def pytest_addoption(parser):
    parser.addoption(
        "--save-results", action="store_true", help="write the comparisons to bench/results/<device name>.json"
    )


class Comparisons:
    """What the tests of this run have measured."""

    def __init__(self):
        self.done = []

    def add(self, comparison, benchmark) -> None:
        """Keep a comparison, then assert its floor. None (timing is switched off) is ignored.

        The clock is what counts, but where other work shares the cores it measures that work. CPU time
        is then still a fair judge of the two variants, so the better of the two ratios is held to the floor.
        """
        if comparison is None:
            return
        self.done.append(comparison)
        benchmark.extra_info.update(comparison.to_json())
        ratio = max(comparison.time_ratio, comparison.cpu_ratio)
        assert ratio >= comparison.floor, (
            f"{comparison.workload}: fastrm is {comparison.time_ratio:.2f} times as fast as "
            f"{comparison.rival.variant} ({comparison.cpu_ratio:.2f} in CPU time), wanted at least {comparison.floor}"
        )


@pytest.fixture
def comparisons(request) -> Comparisons:
    return request.config.stash[_KEY]


def pytest_configure(config):
    config.stash[_KEY] = Comparisons()


def pytest_terminal_summary(terminalreporter, config):
    done = config.stash[_KEY].done
    if not done:
        return
    terminalreporter.section("training step, fastrm against the rest")
    terminalreporter.write_line(COLUMNS)
    for comparison in done:
        for line in _lines(comparison):
            terminalreporter.write_line(line)
    if config.getoption("--save-results"):
        terminalreporter.write_line(f"saved to {_save(done)}")


def _lines(comparison):
    for side in (comparison.rival, comparison.fastrm):
        low, high = side.times.quartiles
        peak = "-" if side.peak_mib is None else f"{side.peak_mib:,.0f}"
        line = (
            f"{comparison.workload:<28} {side.variant:<7} {side.times.median:>7.3f} {f'{low:.3f} - {high:.3f}':>15} "
            f"{comparison.pairs_per_second(side):>8.2f} {peak:>8}"
        )
        if side is comparison.fastrm:
            line += (
                f" {comparison.time_ratio:>7.2f} {comparison.cpu_ratio:>6.2f} {comparison.token_ratio:>8.2f} "
                f"{comparison.flop_ratio:>8.2f} {comparison.floor:>6.2f}"
            )
        yield line


def _save(done) -> Path:
    import torch

    device = _device_name()
    report = {
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | _versions("torch", "transformers", "trl", "numpy"),
        "comparisons": [comparison.to_json() for comparison in done],
    }
    file = RESULTS / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(report, indent=2) + "\n")
    return file


def _versions(*packages) -> dict[str, str | None]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _device_name() -> str:
    """The CPU's model and the cores that this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        cores = len(os.sched_getaffinity(0))
    except (OSError, StopIteration):
        model, cores = platform.processor() or platform.machine(), os.cpu_count()
    return f"{model}, {cores} cores"
