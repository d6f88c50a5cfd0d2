"""The processes of a run: which of them this one is, and what they tell one another on the host.

Gradients and weights are the engine's affair. Here are the small things: whether anyone was asked to
stop, what each has counted, what the first has found on the disk.
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
# What one rank may do while the others wait: verify a checkpoint, write one, train a tokenizer.
PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """This process among `num_ranks`; every method but `close` must be called on all of them.

    Attributes:
        group: of gloo, for Python objects in the host's memory; None for one rank.
    """

    rank: int = 0
    num_ranks: int = 1
    group: Any = None

    @property
    def is_first(self) -> bool:
        """Does this process write the run's files and speak to the user?"""
        return self.rank == 0

    @property
    def num_local(self) -> int:
        """How many of them are on this machine, as the launcher says; all, where it does not."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.num_ranks)) if self.num_ranks > 1 else 1

    def any(self, flag: bool) -> bool:
        """Is it true on some rank?"""
        if self.num_ranks == 1:
            return flag
        found = torch.tensor([int(flag)])
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.group)
        return bool(found)

    def gather(self, value: T) -> list[T]:
        """What every rank has given, in order of the ranks."""
        if self.num_ranks == 1:
            return [value]
        values: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(values, value, group=self.group)
        return values

    def on_first(self, function: Callable[[], T]) -> T:
        """What `function` returns on rank 0, where alone it is called.

        Raises:
            FastrmError: on every rank what it raised there; InterruptedRun where a signal broke it off.
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
        """Leave the others. A process that ends without it is aborted by its communication threads."""
        if self.num_ranks > 1:
            dist.destroy_process_group()


ALONE = Ranks()


def is_launched() -> bool:
    """Was this process started as a rank, by `fastrm train`, torchrun or the deepspeed launcher?"""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def joined(requested: str) -> Iterator[Ranks]:
    """Among the other ranks, until the block ends."""
    ranks = join(requested)
    try:
        yield ranks
    finally:
        ranks.close()


def join(requested: str) -> Ranks:
    """Meet the other ranks, where the launcher's environment names any, and take this one's GPU.

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
        # Named, because NCCL would guess the device of a barrier, and warn that it does.
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
