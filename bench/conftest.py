"""Fixtures that collect the comparisons of a run: a table at its end, and JSON with --save-results."""

import platform
import shutil
from pathlib import Path

import pytest

from bench.harness.results import RESULTS, cpu_name, file_of, package_versions, write_json
from bench.kernels.run_kernels import BUDGET_SECONDS, Run
from fastrm.tables import Table

COLUMNS = (
    "workload, variant", "s/step", "quartiles", "pairs/s", "peak MiB", "time x", "CPU x", "tokens x", "FLOPs x", "floor"
)  # fmt: skip
_KEY = pytest.StashKey()
_KERNELS_KEY = pytest.StashKey()
OURS = ("triton", "triton+graph", "varlen", "flash_attn", "eager")


def pytest_addoption(parser):
    parser.addoption(
        "--save-results", action="store_true", help="write the comparisons to bench/results/<device name>.json"
    )


class Comparisons:
    """The measurements of this run's tests."""

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


class Kernels:
    """The kernel benchmarks of this run: those of run_kernels.py, with pytest-benchmark as their driver."""

    def __init__(self):
        self.run = Run(BUDGET_SECONDS)

    def compare(self, op: str, shape, benchmark) -> dict:
        """Gate and time a shape; return its entry of the results. The test fails if a variant of this package does.

        With --benchmark-disable the gate alone.
        """

        def drive(ours, rest, rounds):
            benchmark.pedantic(ours, setup=rest, rounds=rounds)

        if benchmark.disabled:
            entry = benchmark(self.run.measure, op, shape, self.run.budget, timed=False)
        else:
            entry = self.run.measure(op, shape, self.run.budget, drive)
        if entry is None:
            pytest.skip("out of time")
        if not benchmark.disabled:
            self.run.entries.append(entry)
            benchmark.extra_info.update(entry)
        failed = {name: variant["failed"] for name, variant in entry["variants"].items() if variant["failed"]}
        ours = [f"{name}: {why}" for name, why in failed.items() if name in OURS or why.startswith("red gate")]
        assert not ours, "\n".join(ours)
        return entry


@pytest.fixture
def comparisons(request) -> Comparisons:
    return request.config.stash[_KEY]


@pytest.fixture
def kernels(request) -> Kernels:
    stash = request.config.stash
    if _KERNELS_KEY not in stash:
        stash[_KERNELS_KEY] = Kernels()
    return stash[_KERNELS_KEY]


def pytest_configure(config):
    config.stash[_KEY] = Comparisons()


def pytest_terminal_summary(terminalreporter, config):
    _summarize_steps(terminalreporter, config)
    _summarize_kernels(terminalreporter, config)


def _summarize_kernels(terminalreporter, config):
    if _KERNELS_KEY not in config.stash:
        return
    run = config.stash[_KERNELS_KEY].run
    if not run.entries:
        return
    terminalreporter.section("kernels")
    for line in run.lines():
        terminalreporter.write_line(line)
    if config.getoption("--save-results"):
        terminalreporter.write_line(f"saved to {run.save(RESULTS)}")


def _summarize_steps(terminalreporter, config):
    done = config.stash[_KEY].done
    if not done:
        return
    terminalreporter.section("training step, fastrm against the rest")
    table = Table(*COLUMNS)
    for comparison in done:
        for cells in _rows(comparison):
            table.add_row(*cells)
    for line in table.as_lines(shutil.get_terminal_size().columns):
        terminalreporter.write_line(line)
    if config.getoption("--save-results"):
        terminalreporter.write_line(f"saved to {_save(done)}")


def _rows(comparison):
    for side in (comparison.rival, comparison.fastrm):
        low, high = side.times.quartiles
        peak = "-" if side.peak_mib is None else f"{side.peak_mib:,.0f}"
        cells = [
            f"{comparison.workload}, {side.variant}", f"{side.times.median:.3f}", f"{low:.3f} - {high:.3f}",
            f"{comparison.pairs_per_second(side):.2f}", peak,
        ]  # fmt: skip
        if side is comparison.fastrm:
            ratios = (comparison.time_ratio, comparison.cpu_ratio, comparison.token_ratio, comparison.flop_ratio)
            cells += [f"{ratio:.2f}" for ratio in (*ratios, comparison.floor)]
        yield cells


def _save(done) -> Path:
    import torch

    device = cpu_name()
    report = {
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | package_versions("torch", "transformers", "trl", "numpy"),
        "comparisons": [comparison.to_json() for comparison in done],
    }
    file = file_of(device, ".json")
    write_json(file, report, indent=2)
    return file
