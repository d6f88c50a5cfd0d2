"""The state that steps, evaluations and checkpoints of a run share, and the way out when a signal comes."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from fastrm.config import Config
from fastrm.data.batching import StepOrder
from fastrm.data.loader import PackBuilder, RefusedGroup
from fastrm.data.prepared.stored import PreparedSet
from fastrm.data.quarantine import Quarantine
from fastrm.errors import InterruptedRun
from fastrm.model.precision import token_multiple
from fastrm.stop import StopFlag
from fastrm.train.checkpoint import Checkpoints
from fastrm.train.engine import LocalEngine
from fastrm.train.guard import StepGuard
from fastrm.train.metrics import MetricsLog
from fastrm.train.progress import Progress
from fastrm.train.ranks import Ranks
from fastrm.train.setup import Job
from fastrm.ui import Display


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
