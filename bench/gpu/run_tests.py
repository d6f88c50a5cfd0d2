"""Run GPU tests and write the results after each one: tests.json in --out, so that a time limit loses no verdict."""

import argparse
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.harness.results import write_json

KEPT = 20  # the most failures that are written in full


class Verdicts:
    """A pytest plugin that counts outcomes, in the process that the others report to."""

    def __init__(self, file: Path):
        self._file = file
        self.found = {"passed": 0, "failed": 0, "skipped": 0, "errors": 0, "finished": False, "failures": []}

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.skipped:
            self.found[report.outcome] += 1
        elif report.failed:  # a fixture failed
            self.found["errors"] += 1
        if report.failed:
            self._tell(report)
        write_json(self._file, self.found)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.found["errors"] += 1
            self._tell(report)
            write_json(self._file, self.found)

    def pytest_sessionfinish(self) -> None:
        self.found["finished"] = True
        write_json(self._file, self.found)

    def _tell(self, report) -> None:
        if len(self.found["failures"]) < KEPT:
            self.found["failures"].append({"test": report.nodeid, "text": report.longreprtext[-1500:]})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("-n", default="12", help="processes")
    parser.add_argument("-m", default="gpu", help="marker expression")
    parser.add_argument("files", nargs="+")
    arguments = parser.parse_args()
    options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-n", arguments.n, "-m", arguments.m]
    return int(pytest.main([*options, *arguments.files], plugins=[Verdicts(arguments.out / "tests.json")]))


if __name__ == "__main__":
    sys.exit(main())
