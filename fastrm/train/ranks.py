"""The processes of a run: the rank of this one, and the small messages between them on the host.

The engine exchanges gradients and weights. The messages here are small: whether a rank was asked to stop, its counts,
the first rank's findings on the disk.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fastrm.errors import ConfigError, FastrmError, InterruptedRun
from fastrm.stop import StopRequest

T = TypeVar("T")
# The longest work of one rank while the others wait: verify a checkpoint, write one, train a tokenizer.
PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """The rank of this process among `num_ranks`; every method but `close` must be called on all of them.

    Attributes:
        group: of gloo, for Python objects in the host's memory; None for one rank.
    """

    rank: int = 0
    num_ranks: int = 1
    group: Any = None

    @property
    def is_first(self) -> bool:
        """True for the process that writes the run's files and prints for the user."""
        return self.rank == 0

    @property
    def num_local(self) -> int:
        """The number of ranks on this machine, as the launcher says; all, if it does not."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.num_ranks)) if self.num_ranks > 1 else 1

    def any(self, flag: bool) -> bool:
        """Return whether the flag is true on some rank."""
        if self.num_ranks == 1:
            return flag
        found = torch.tensor([int(flag)])
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.group)
        return bool(found)

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in order of the ranks."""
        if self.num_ranks == 1:
            return [value]
        values: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(values, value, group=self.group)
        return values

    def on_first(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0 only, and return its result on all ranks.

        Raises:
            FastrmError: on every rank the error that it raised there; InterruptedRun where a signal broke it off.
        """
        if self.num_ranks == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = function()
            except FastrmError as error:
                outcome[1] = error
            except StopRequest as stop:
                outcome[1] = InterruptedRun(f"stopped by {stop.name}; start again with --resume auto")
        dist.broadcast_object_list(outcome, group=self.group, group_src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def close(self) -> None:
        """Leave the other ranks. A process that ends without it is aborted by its communication threads."""
        if self.num_ranks > 1:
            dist.destroy_process_group()


ALONE = Ranks()


def is_launched() -> bool:
    """Return whether this process was started as a rank, by `fastrm train`, torchrun or the deepspeed launcher."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def joined(requested: str) -> Iterator[Ranks]:
    """Join the other ranks, until the block ends."""
    ranks = join(requested)
    try:
        yield ranks
    finally:
        ranks.close()


def join(requested: str) -> Ranks:
    """Join the other ranks, if the launcher's environment names any, and take this one's GPU.

    Args:
        requested: run.device.

    Raises:
        ConfigError: if DeepSpeed is not installed, or there is no GPU for this rank.
    """
    if not is_launched() or os.environ["WORLD_SIZE"] == "1":
        return ALONE
    check_deepspeed(int(os.environ["WORLD_SIZE"]))
    check_not_one_gpu(requested, int(os.environ["WORLD_SIZE"]))
    uses_cuda = requested == "cuda" or (requested == "auto" and torch.cuda.is_available())
    if uses_cuda:
        check_gpus(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        # The device is named, because NCCL would guess that of a barrier, and warn about it.
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    return Ranks(dist.get_rank(), dist.get_world_size(), group)


def check_deepspeed(num_ranks: int) -> None:
    """Refuse to run on several ranks without DeepSpeed.

    Raises:
        ConfigError: naming the package to install.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f'{num_ranks} ranks need DeepSpeed, which is not installed; pip install "fastrm[deepspeed]", or set '
            "run.num_processes: 1"
        )


def check_not_one_gpu(requested: str, num_ranks: int) -> None:
    """Refuse to run several ranks on the one GPU that run.device names.

    Raises:
        ConfigError: saying so.
    """
    if ":" in requested and num_ranks > 1:
        raise ConfigError(
            f"run.device: {requested} is one GPU, but there are {num_ranks} ranks, which take one each; set "
            "run.device: cuda, or run.num_processes: 1"
        )


def check_gpus(wanted: int) -> None:
    """Refuse more ranks on this machine than it has GPUs.

    Raises:
        ConfigError: with both numbers.
    """
    found = torch.cuda.device_count()
    if wanted > found:
        raise ConfigError(
            f"run.num_processes {wanted}: this machine has {found} GPUs, and each rank takes one; lower it, or set "
            "run.device: cpu"
        )
