"""The state that steps, evaluations and checkpoints of a run share, its lock, and what ends it early."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from fastrm.config import Config
from fastrm.data.batching import PackPlan, StepOrder
from fastrm.data.loader import PackBuilder, RefusedGroup
from fastrm.data.prepared.stored import PreparedSet
from fastrm.data.quarantine import Quarantine
from fastrm.errors import DivergedError, InterruptedRun
from fastrm.json_files import to_json
from fastrm.model.precision import token_multiple
from fastrm.stop import StopFlag
from fastrm.storage import locked_folder
from fastrm.train.checkpoint import Checkpoints
from fastrm.train.engine import LocalEngine
from fastrm.train.metrics import MetricsLog, keep_rows
from fastrm.train.progress import Progress
from fastrm.train.ranks import Ranks
from fastrm.train.setup import Job
from fastrm.ui import Display

INCIDENTS = "incidents.jsonl"  # file in the run folder
# The most steps in a row that may be skipped for a non-finite loss or gradient before the run stops.
MAX_SKIPPED_STEPS = 3


@contextmanager
def locked(run_dir: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the run folder's lock on rank 0.

    Raises:
        StorageError: on all ranks, if another process holds it, or the folder cannot be written.
    """
    lock = locked_folder(run_dir, "the run folder", "stop it or choose another run.dir")
    with ExitStack() as held:
        ranks.on_first(lambda: held.enter_context(lock))
        yield


class StepGuard:
    """A guard that writes incidents.jsonl for skipped steps and stops a run that does nothing else.

    A skipped step changed no weight and no moment; its records are named.

    Args:
        path: of incidents.jsonl; None on a rank that only counts.
        step: that the run continues from; incidents of later ones are removed, since they will be taken again.
    """

    def __init__(self, path: Path | None, step: int = 0, skipped_in_a_row: int = 0):
        self._path = path
        if path is not None:
            keep_rows(path, lambda row: row["step"] <= step)
        self.skipped_in_a_row = skipped_in_a_row

    def after_step(self, step: int, finite: bool, loss: float, grad_norm: float, records: list[str]) -> None:
        """Note one step.

        Raises:
            DivergedError: after MAX_SKIPPED_STEPS skipped steps in a row.
        """
        if finite:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        row = {"step": step, "loss": repr(loss), "grad_norm": repr(grad_norm), "records": records}
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(to_json(row) + "\n")
        if self.skipped_in_a_row >= MAX_SKIPPED_STEPS:
            way_on = "the last checkpoint holds finite weights: lower optim.lr, or look at those records"
            if step == self.skipped_in_a_row:  # a rate that was never applied is not the cause
                way_on = (
                    "no step has changed a weight yet: a weight of model.path is no finite number, or a value is too "
                    "large for precision.dtype: look at the weights, or set precision.dtype: fp32"
                )
            raise DivergedError(
                f"step {step}: loss {loss} and gradient norm {grad_norm} are not finite, as in the "
                f"{MAX_SKIPPED_STEPS - 1} steps before; the records are named in incidents.jsonl; {way_on}"
            )


@dataclass
class Run:
    """A run in progress on this rank.

    Attributes:
        engine: of one process, or a `DeepSpeedEngine` of one rank.
        order: which groups a step has.
        num_steps: steps in all.
        log: metrics.jsonl; None on a rank that is not the first.
    """

    job: Job
    engine: LocalEngine
    order: StepOrder
    num_steps: int
    progress: Progress
    checkpoints: Checkpoints
    guard: StepGuard
    log: MetricsLog | None
    quarantine: Quarantine
    display: Display
    stop: StopFlag
    ranks: Ranks

    @property
    def config(self) -> Config:
        """The configuration, with the values that were decided at the first start."""
        return self.job.config

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.run.dir)

    def builder(self, prepared: PreparedSet) -> PackBuilder:
        """Return a builder of packs from a prepared set, with the layouts that this run's network needs."""
        network = self.job.network
        return PackBuilder(
            prepared.records, network.encoder, self.config.data.share_prefixes, check=prepared.check,
            multiple=token_multiple(self.config.precision.fp8), lay_out=network.lay_out,
        )  # fmt: skip

    def seed_dropout(self, plan: PackPlan) -> None:
        """Set torch's seed for the dropout of adapters in a pack, by run.seed, the step and the pack's first group."""
        if self.config.model.lora is not None and self.config.model.lora.dropout:
            key = self.config.run.seed, self.progress.step, *plan.groups[:1]
            torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))

    def write(self, row: dict) -> None:
        """Append a row to metrics.jsonl, on the first rank."""
        if self.log is not None:
            self.log.write(row)

    def note_refusals(self, refused: Iterable[RefusedGroup], prepared: PreparedSet) -> None:
        """Name in the quarantine every record of groups that could not be used."""
        for refusal in refused:
            for source, origin, record_id in prepared.members(refusal.group):
                self.quarantine.add(
                    source=source, origin=origin, record_id=record_id, code=refusal.code, message=refusal.message
                )

    def breakable(self) -> AbstractContextManager:
        """Return the context of a long pass, in which a signal may break it off.

        Several ranks are not broken off: the others would wait for this one.
        """
        return self.stop.breakable() if self.ranks.num_ranks == 1 else nullcontext()

    def leave_if_stopped(self) -> None:
        """Leave on all ranks if one of them was asked to stop; called on all.

        Raises:
            InterruptedRun: as `interrupt`.
        """
        if self.ranks.any(self.stop.signal is not None):
            self.interrupt()

    def interrupt(self) -> NoReturn:
        """Save the state after the last whole step, and leave; called on all ranks.

        Raises:
            InterruptedRun: naming the signal and the step.
        """
        self.engine.discard()  # a step that was cut short does not count
        self.checkpoints.save(self.progress)
        signal = next(filter(None, self.ranks.gather(self.stop.signal)))
        raise InterruptedRun(
            f"stopped by {signal} after step {self.progress.step}; checkpoint saved; continue with --resume auto"
        )
