"""Training runs in processes that tests kill, and what must be the same in the end."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastrm.train.metrics import read_rows
from tests.helpers.own_process import JobServer

CLOCK = ("preferences_per_second", "tokens_per_second", "data_wait_share")


class ForkServer(JobServer):
    """Starts training processes and kills them."""

    def __init__(self):
        super().__init__("tests.helpers.fork_server")

    def start(self, config: Path, resume: str = "auto", patch: str | None = None) -> int:
        """`fastrm train`; its process id. What it says is in the configuration's name with .log."""
        return self.command(["train", config, "--resume", resume], Path(f"{config}.log"), patch)

    def command(
        self, arguments: Sequence, log: Path, patch: str | None = None, environment: dict[str, str] | None = None
    ) -> int:
        """`fastrm ARGUMENTS` after a function of tests/helpers, with further variables; its process id.

        Args:
            patch: "module.function".
        """
        request = {"arguments": list(map(str, arguments)), "log": str(log), "patch": patch}
        return self.send({**request, "environment": environment or {}})


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    found = ForkServer()
    yield found
    found.close()


def rows_without_clock(run_dir: Path) -> list[dict]:
    """Every logged number but those that depend on the speed of the machine."""
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in read_rows(run_dir / "metrics.jsonl")]


def outcome(run_dir: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """What must not differ: the logged numbers and the final weights."""
    return rows_without_clock(run_dir), load_file(run_dir / "model" / "model.safetensors")


def assert_same(run_dir: Path, unbroken: tuple[list[dict], dict[str, torch.Tensor]]) -> None:
    rows, weights = outcome(run_dir)
    assert rows == unbroken[0]
    assert weights.keys() == unbroken[1].keys()
    assert all(torch.equal(weights[name], unbroken[1][name]) for name in weights)
