"""Worker processes that decode, tokenise and pack ahead of the training step.

Workers get plans (which groups make which pack) and return packs in the order of the plans; what
they return is a pure function of the plan, so the number of workers changes nothing but the speed.
"""

import functools
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import thread as pool_threads
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import active_children
from multiprocessing.queues import Queue
from typing import Any

import torch

from fastrm.data.batching import PackPlan
from fastrm.data.group import encode_group
from fastrm.data.media.format import MediaSize, Patches
from fastrm.data.media.images import media_error
from fastrm.data.packing import EncodedGroup, Pack, build_pack
from fastrm.data.record import Record
from fastrm.data.template import ConversationEncoder
from fastrm.errors import RecordError, StorageError
from fastrm.stop import StopRequest, end_with_parent

# The number of packs that each worker prepares ahead.
PREFETCH_PACKS = 4
_SIGNALS = {signal.SIGINT, signal.SIGTERM}
# The limit of open files that is asked for.
OPEN_FILES = 65_536


@dataclass(frozen=True)
class RefusedGroup:
    """A group that could not be used when its pack was built."""

    group: int
    code: str
    message: str


@dataclass
class LoadedPack:
    """The result of a plan.

    Attributes:
        pack: None if every group of the plan was refused.
        packed: the numbers of the groups in the pack, in its order.
    """

    plan: PackPlan
    pack: Pack | None
    refused: list[RefusedGroup] = field(default_factory=list)
    packed: tuple[int, ...] = ()

    def pin_memory(self) -> "LoadedPack":
        """Return a copy whose pack is in page-locked memory (the interface of torch's DataLoader)."""
        return self if self.pack is None else replace(self, pack=self.pack.pin_memory())


class PackBuilder(torch.utils.data.Dataset):
    """A builder of packs by plan, which runs in the workers: `builder[plan]` is a LoadedPack.

    Args:
        records: of all groups.
        encoder: tokeniser and vision format.
        share: pack responses as prefix trees.
        encoded: the records' groups, if they are tokenised already.
        multiple: rows are padded to a multiple of this many tokens.
        check: raises RecordError for a group, by its number, that is not what it was when it was counted.
        lay_out: makes of a pack what the model wants to find in `Pack.layouts`; picklable.
    """

    def __init__(
        self,
        records: Sequence[Record],
        encoder: ConversationEncoder,
        share: bool,
        encoded: Sequence[EncodedGroup] | None = None,
        *,
        multiple: int = 1,
        check: Callable[[int, EncodedGroup], None] | None = None,
        lay_out: Callable[[Pack], Any] | None = None,
    ):
        self.records = records
        self.encoder = encoder
        self.share = share
        self.encoded = encoded
        self.multiple = multiple
        self.check = check
        self.lay_out = lay_out
        self._format = None if encoder.vision is None else encoder.vision.patch_format

    def __getitem__(self, plan: PackPlan) -> LoadedPack:
        groups, refused = [], []
        decoded: dict[str, Patches] = {}
        sizes: dict[str, MediaSize] = {}
        for number in plan.groups:
            record = self.records[number]
            try:
                group = encode_group(record, self.encoder) if self.encoded is None else self.encoded[number]
                if self.check is not None:
                    self.check(number, group)
                for span in (span for response in group.responses for span in response.media):
                    if span.ref.key not in decoded:
                        decoded[span.ref.key] = self.encoder.vision.cut(span.ref, span.size, self.encoder.limits)
                        sizes[span.ref.key] = span.size
                    elif span.size != sizes[span.ref.key]:  # the file was replaced between two groups
                        raise media_error(span.ref, "CHANGED", "has another size than when it was first read")
                groups.append(group)
            except RecordError as error:
                refused.append(RefusedGroup(number, error.code, error.message))
        if not groups:
            return LoadedPack(plan, None, refused)
        pixels = {key: decoded[key] for group in groups for key in group.media}
        options = {"share": self.share, "multiple": self.multiple, "turns": self.encoder.turns}
        pack = build_pack(groups, pixels, self._format, **options)
        if self.lay_out is not None:
            pack.layouts = self.lay_out(pack)
        packed = tuple(number for number in plan.groups if number not in {refusal.group for refusal in refused})
        return LoadedPack(plan, pack, refused, packed)


# Threads that score start their workers in turn: a worker forked while another thread sets up queues and locks finds
# multiprocessing's registers half changed, and the worker ends before it has begun.
_STARTING = threading.Lock()


@dataclass
class Waiting:
    """The seconds for which the taker of packs has waited."""

    seconds: float = 0.0

    def take(self) -> float:
        """Return the seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def load_packs(
    builder: PackBuilder,
    plans: Iterable[PackPlan],
    num_workers: int,
    *,
    pin_memory: bool = False,
    waiting: Waiting | None = None,
) -> Iterator[LoadedPack]:
    """Yield packs in the order of `plans`.

    Args:
        num_workers: processes that build packs ahead of time; 0 builds each here, when asked for.
        pin_memory: hand packs over in page-locked memory; needs an accelerator.
        waiting: told how long the taker waits.

    Raises:
        StorageError: if a worker process dies.
    """
    assert not pin_memory or torch.accelerator.is_available(), "page-locked memory is for an accelerator"
    if num_workers:
        _raise_open_file_limit()
    loader = torch.utils.data.DataLoader(
        builder,
        batch_size=None,
        sampler=plans,
        num_workers=num_workers,
        prefetch_factor=PREFETCH_PACKS if num_workers else None,
        multiprocessing_context="fork" if num_workers else None,
        worker_init_fn=functools.partial(_start_worker, os.getpid()),
        pin_memory=pin_memory,
    )
    workers = set()
    try:
        with _STARTING, _signals_held():
            before = set(active_children())
            packs = iter(loader)
            workers = set(active_children()) - before
        yield from packs if waiting is None else _timed(packs, waiting)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise StorageError(
            f"a data worker died ({str(error).splitlines()[0]}); it was killed or ran out of memory, or of shared "
            "memory (/dev/shm; docker run --shm-size): use fewer workers"
        ) from error
    except StopRequest:  # it came while waiting for a worker, which may be stuck
        for worker in workers:
            worker.terminate()
        raise


def _raise_open_file_limit() -> None:
    """Raise the limit of open files to OPEN_FILES, where the system allows it.

    A tensor that comes from a worker is an open file, and a pack has two dozen: 40 packs of a step would meet the usual
    limit of 1,024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _timed(packs: Iterator[LoadedPack], waiting: Waiting) -> Iterator[LoadedPack]:
    while True:
        started = time.perf_counter()
        loaded = next(packs, None)
        waiting.seconds += time.perf_counter() - started
        if loaded is None:
            return
        yield loaded


@contextmanager
def _signals_held() -> Iterator[None]:
    """Block signals while a worker starts: it unblocks them when it has left the group that they are sent to."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(parent: int, worker: int) -> None:
    """Put a worker into a process group of its own, and let it end with its parent.

    Ctrl-C, and a scheduler's SIGTERM, reach a whole process group. The training process decides what they mean, and its
    own SIGTERM, which torch answers without Python, ends a worker that is stuck.
    """
    os.setpgid(0, 0)
    while came := signal.sigpending() & _SIGNALS:
        signal.sigwait(came)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    end_with_parent(parent)
    # Begun in a thread of a pool, a worker would wait for the pool's threads at its end, and so for itself: an error.
    pool_threads._threads_queues.clear()
    # A pack that cannot be sent, as for lack of shared memory, would be left out and waited for, for ever.
    Queue._on_queue_feeder_error = staticmethod(_end_unsent)
    sys.excepthook = _report_but_lost_connections


def _end_unsent(error: Exception, pack) -> None:
    print(f"a data worker cannot send a pack: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def _report_but_lost_connections(kind, error, trace) -> None:
    """Report an exception, unless the connection is lost: then the training process is gone."""
    if not isinstance(error, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)
