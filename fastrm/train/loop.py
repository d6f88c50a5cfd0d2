"""The training run: steps, evaluations, checkpoints, and an export at the end."""

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

import torch

from fastrm.config import Config
from fastrm.data.batching import plan_steps
from fastrm.data.loader import LoadedPack, PackBuilder, RefusedGroup, Waiting, load_packs
from fastrm.data.order import StepOrder
from fastrm.data.packing import Pack
from fastrm.data.prepared.stored import PreparedSet
from fastrm.data.quarantine import Quarantine
from fastrm.errors import ConfigError, InterruptedRun, StorageError
from fastrm.evaluate.accuracy import Flips, PreferenceMeter
from fastrm.evaluate.flips import compare_fp8
from fastrm.evaluate.scoring import NON_FINITE, refuse_non_finite, run_packs
from fastrm.model.adopt import adopt
from fastrm.model.precision import token_multiple
from fastrm.stop import StopFlag, StopRequest
from fastrm.train.checkpoint import load_checkpoint, prune, save_checkpoint, set_newer_aside
from fastrm.train.guard import StepGuard, locked
from fastrm.train.metrics import MetricsLog, check_loggers, keep_rows
from fastrm.train.opening import opening_lines
from fastrm.train.optim import learning_rate
from fastrm.train.progress import Progress, StepReport
from fastrm.train.ranks import Ranks, joined
from fastrm.train.report import peak_memory_bytes, summary_table, versions, write_report
from fastrm.train.resume import check_config, clear_failed_start, find_start
from fastrm.train.setup import Job, check_exactness, export_model, make_engine, set_up
from fastrm.train.step_cost import make_cost_model
from fastrm.ui import Display

# Saves in a row that may fail, for a full disk say, before the run stops.
MAX_FAILED_SAVES = 3


def train(
    config: Config,
    resume: str = "no",
    display: Display | None = None,
    check: Callable[[Ranks], None] = lambda ranks: None,
) -> dict:
    """Run a configuration to its end; returns what summary.json holds.

    Args:
        resume: no, auto, required, or the path of a checkpoint.
        check: called on the first rank before anything is written; what it raises stops the run on all ranks.

    Raises:
        InterruptedRun: after SIGTERM or SIGINT, when a checkpoint has been saved.
        FastrmError: another subclass, for everything else that stops a run.
    """
    run_dir = Path(config.run.dir)
    with StopFlag() as stop, joined(config.run.device) as ranks:
        stop.is_forced = ranks.num_ranks == 1
        try:
            with stop.breakable(patience=0), ExitStack() as begun:
                ranks.on_first(lambda: check(ranks))
                begun.enter_context(locked(run_dir, ranks))
                shown = begun.enter_context(display or Display(silent=not ranks.is_first))
                start = ranks.on_first(lambda: _find_start(run_dir, resume, shown))
                # Before hours of other work: the files of model.path are there, whole, and fit the configuration.
                model, head = ranks.on_first(lambda: adopt(config.model))
                if head:
                    shown.say(head)
                config = config.model_copy(update={"model": model})
                quarantine = begun.enter_context(Quarantine(run_dir / "quarantine.jsonl" if ranks.is_first else None))
                run, opened = _Run(config, run_dir, start, quarantine, shown, stop, ranks), begun.pop_all()
        except StopRequest as request:
            raise InterruptedRun(
                f"stopped by {request.name} before the first step; start again with --resume auto"
            ) from None
        with opened:
            return run.to_the_end()


def _find_start(run_dir: Path, resume: str, display: Display) -> Path | None:
    start = find_start(run_dir, resume, display.say)
    if start is None:
        clear_failed_start(run_dir)
    return start


class _Run:
    """The state of one run, and the few things that are done with it."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        start: Path | None,
        quarantine: Quarantine,
        display: Display,
        stop: StopFlag,
        ranks: Ranks,
    ):
        self.run_dir, self.quarantine = run_dir, quarantine
        self.display, self.stop, self.ranks = display, stop, ranks
        check_loggers(config.run.report_to)
        self.job: Job = set_up(config, run_dir, quarantine, display, ranks)
        self.config = config = self.job.config
        self.engine = make_engine(self.job.network, config, ranks)
        self.progress = Progress()
        if start is not None:
            self._restore(start)
        self.order = StepOrder(self.job.train.preference_counts, config.optim.batch_pairs, config.run.seed)
        epochs = range(config.run.epochs)
        self.num_steps = config.run.max_steps or sum(self.order.steps_in_epoch(epoch) for epoch in epochs)
        self.log: MetricsLog | None = None
        incidents = run_dir / "incidents.jsonl"
        if ranks.is_first:
            (run_dir / "config.yaml").write_text(config.to_yaml())
            self.log = MetricsLog(
                run_dir / "metrics.jsonl", self.progress, config.run.report_to, run_dir, config.model_dump(mode="json")
            )
            keep_rows(incidents, lambda row: row["step"] <= self.progress.step)
        self.guard = StepGuard(incidents if ranks.is_first else None, self.progress.skipped_in_a_row)
        self.meter, self.saved_step = PreferenceMeter(), self.progress.step if start else -1
        if self.progress.window_meter:
            self.meter.restore(self.progress.window_meter)
        self.failed_saves = 0
        # Of the step under way, until its update: packs of this rank with their rewards, and what it refused.
        self.step_rewards: list[tuple[Pack, torch.Tensor]] = []
        self.step_refusals: list[RefusedGroup] = []
        self.must_stop = False  # by the last step's reports, on all ranks alike
        self._announce(start)
        check_exactness(self.job, self.engine, ranks, display.say)

    def to_the_end(self) -> dict:
        try:
            self._steps()
            if self.job.eval is not None and self.progress.last_eval.get("step") != self.progress.step:
                self._evaluate()
            flips = self._compare_fp8()
            # The export first: if the disk has room for one of the two only, it is the one to keep.
            summary = self._finish(flips)
            self._save()
            return summary
        except StopRequest:
            self._interrupt()
        finally:
            if self.log is not None:
                self.log.close()

    def _steps(self) -> None:
        if self.progress.step >= self.num_steps:
            return
        if self.progress.step > 0 and self.progress.last_eval.get("step") != self.progress.step:
            # The run was stopped during the evaluation that belongs to this step.
            self._evaluate_and_save_when_due()
        update = self.display.task("training")
        groups, data = self.job.train.groups, self.config.data
        cost = make_cost_model(self.job.network.model.config, self.config.model)
        plans = plan_steps(
            groups, self.order, self.progress.position, self.config.optim.tokens_per_pack,
            rank=self.ranks.rank, num_ranks=self.ranks.num_ranks, cost=cost,
        )  # fmt: skip
        builder = self._builder(self.job.train)
        members: list[int] = []
        waiting, pin = Waiting(), self.job.network.device.type != "cpu"
        step_started = time.perf_counter()
        with closing(load_packs(builder, plans, data.num_workers, pin_memory=pin, waiting=waiting)) as packs:
            while self.progress.step < self.num_steps:
                with self._breakable():
                    loaded = next(packs)
                # Alone, a run stops inside a step; several ranks at its end, when they have told one another.
                if self.must_stop or (self.stop.signal and self.ranks.num_ranks == 1):
                    self._interrupt()
                members += loaded.plan.groups
                self._accumulate(loaded)
                if not loaded.plan.is_last:
                    continue
                self._update(loaded.plan.position, members)
                members = []
                seconds = time.perf_counter() - step_started
                self.progress.train_seconds += seconds
                self.progress.window_seconds += seconds
                self.progress.window_wait_seconds += waiting.take()
                if self.progress.step % self.config.run.log_every == 0 or self.progress.step == self.num_steps:
                    update(self.progress.step, self.num_steps, self._log_row())
                self._evaluate_and_save_when_due()
                step_started = time.perf_counter()

    def _breakable(self) -> AbstractContextManager:
        """Of a pass that takes its time. Several ranks are not broken off: the others would wait for this one."""
        return self.stop.breakable() if self.ranks.num_ranks == 1 else nullcontext()

    def _builder(self, prepared: PreparedSet) -> PackBuilder:
        share = self.config.data.share_prefixes
        multiple = token_multiple(self.config.precision.fp8)
        network = self.job.network
        return PackBuilder(
            prepared.records, network.encoder, share, check=prepared.check, multiple=multiple, lay_out=network.lay_out
        )

    def _accumulate(self, loaded: LoadedPack) -> None:
        self._note_refusals(loaded.refused, self.job.train)
        self.step_refusals += loaded.refused
        with self._breakable():
            rewards = self.engine.accumulate(loaded.pack)
        if loaded.pack is not None:
            # Patches are most of a pack, and no longer needed; nor are layouts, whose tensors may be open files.
            self.step_rewards.append((replace(loaded.pack, patches=None, layouts=None), rewards))

    def _update(self, position: int, members: list[int]) -> None:
        """Take the optimizer step, and only then count it: half a step has processed nothing."""
        rate = learning_rate(self.progress.step, self.num_steps, self.config.optim)
        done = self.engine.update(rate, self.progress.step)
        step_meter, reports = self._exchange_reports(members)
        self.progress.step += 1
        self.progress.position = position
        self.progress.preferences += step_meter.num_preferences
        self.progress.tokens_processed += step_meter.num_tokens
        self.progress.tokens_unshared += step_meter.num_unshared_tokens
        if done.finite:  # what a skipped step computed is no number to average
            self.meter.merge(step_meter)
            self.progress.window_losses.append([done.loss, done.grad_norm])
        train = self.job.train
        names = [] if done.finite else [o for report in reports for n in report.members for _, o, _ in train.members(n)]
        try:
            self.guard.after_step(self.progress.step, done.finite, done.loss, done.grad_norm, names)
        finally:
            self.progress.skipped_in_a_row = self.guard.skipped_in_a_row

    def _exchange_reports(self, members: list[int]) -> tuple[PreferenceMeter, list[StepReport]]:
        """What all ranks have counted in the step, and each one's report."""
        meter = PreferenceMeter()
        for pack, rewards in self.step_rewards:
            meter.add(pack, rewards)
        reports = self.ranks.gather(StepReport(members, meter, self.step_refusals, self.stop.signal is not None))
        self.step_rewards, self.step_refusals = [], []
        total = PreferenceMeter()
        for report in reports:
            total.merge(report.meter)
            self._note_refusals(report.refused, self.job.train)
        self.must_stop = any(report.stop for report in reports)
        return total, reports

    def _log_row(self) -> str:
        losses, seconds = self.progress.window_losses, self.progress.window_seconds
        row = {
            "step": self.progress.step,
            "epoch": self.progress.position / self.order.num_groups,
            "loss": sum(loss for loss, _ in losses) / len(losses) if losses else None,
            **self.meter.means(),
            "grad_norm": sum(norm for _, norm in losses) / len(losses) if losses else None,
            "lr": learning_rate(self.progress.step - 1, self.num_steps, self.config.optim),
            "preferences_per_second": self.meter.num_preferences / seconds,
            "tokens_per_second": self.meter.num_tokens / seconds,
            "data_wait_share": self.progress.window_wait_seconds / seconds,
        }
        self._write(row)
        self.meter.clear()
        losses.clear()
        self.progress.window_seconds = self.progress.window_wait_seconds = 0.0
        if row["loss"] is None:
            return "no step was finite"
        return (
            f"loss {row['loss']:.4f}  acc {row['rewards/accuracies']:.3f}  margin {row['rewards/margins']:+.3f}  "
            f"{row['preferences_per_second']:,.0f} pairs/s"
        )

    def _evaluate_and_save_when_due(self) -> None:
        step, run = self.progress.step, self.config.run
        if run.eval_every and self.job.eval is not None and step % run.eval_every == 0:
            before = self.progress.best_accuracy, self.progress.best_checkpoint
            self._evaluate()
            if self.progress.best_checkpoint == f"step-{step:08d}" and not self._try_to_save():
                self.progress.best_accuracy, self.progress.best_checkpoint = before
        if run.save_every and step % run.save_every == 0:
            self._try_to_save()

    def _evaluate(self) -> None:
        network, prepared, config = self.job.network.eval(), self.job.eval, self.config
        builder = self._builder(prepared)
        mine, refused, loss, weight = PreferenceMeter(), [], 0.0, 0.0
        packs = run_packs(
            self.engine.rewards, builder, prepared.groups, config.optim.tokens_per_pack, config.data.num_workers,
            self.ranks.rank, self.ranks.num_ranks, pin_memory=network.device.type != "cpu",
        )  # fmt: skip
        with self._breakable(), closing(packs):
            for loaded, rewards in packs:
                self._leave_if_stopped()
                refused += loaded.refused
                if loaded.pack is not None:
                    mine.add(loaded.pack, rewards)
                    loss += float(self.engine.loss(rewards, loaded.pack))
                    weight += float(loaded.pack.weight.sum())
        meter, reports = PreferenceMeter(), self.ranks.gather((mine, refused, loss, weight))
        for counted, named, _, _ in reports:
            meter.merge(counted)
            self._note_refusals(named, prepared)
        if broken := [refusal for _, named, _, _ in reports for refusal in named if refusal.code == NON_FINITE]:
            self._save()  # without figures: they would choose a checkpoint
            refuse_non_finite(f"evaluation, {prepared.members(broken[0].group)[0][1]}", broken[0])
        loss, weight = (sum(report[part] for report in reports) for part in (2, 3))
        network.train()
        row = {
            "step": self.progress.step,
            "eval/loss": loss / max(weight, 1e-12),
            "eval/accuracy": meter.accuracy,
            "eval/margin": meter.means()["rewards/margins"],
            "eval/sources": meter.by_source(),
        }
        self._write(row)
        self.saved_step = -1  # a checkpoint of this step does not hold the evaluation yet
        self.display.say(f"step {row['step']:,}: held-out accuracy {meter.accuracy:.4f}, loss {row['eval/loss']:.4f}")
        self.progress.last_eval = row
        if self.progress.best_accuracy is None or meter.accuracy > self.progress.best_accuracy:
            self.progress.best_accuracy = meter.accuracy
            self.progress.best_checkpoint = f"step-{row['step']:08d}"

    def _compare_fp8(self) -> Flips | None:
        """FP8 against bf16 with the final weights, on the held-out preferences: one more pass, at the end alone."""
        network, prepared, config = self.job.network, self.job.eval, self.config
        if network.fp8 is None or prepared is None:
            return None
        with self._breakable():
            flips = compare_fp8(
                network, self.engine.rewards, self._builder(prepared), prepared.groups, config.optim.tokens_per_pack,
                config.data.num_workers, self._leave_if_stopped,
            )  # fmt: skip
        fp8, bf16 = flips.accuracies
        self.display.say(
            f"FP8 against bf16, same weights: {flips.lost + flips.gained:,} of {flips.num_preferences:,} held-out "
            f"preferences flipped ({flips.rate:.2%}); accuracy {fp8:.4f} against {bf16:.4f}"
        )
        return flips

    def _try_to_save(self) -> bool:
        """Save, but let training go on if the disk will not: the next save may succeed."""
        try:
            self._save()
            self.failed_saves = 0
            return True
        except StorageError as error:
            self.failed_saves += 1
            self.display.say(f"warning: {error} (failure {self.failed_saves} of {MAX_FAILED_SAVES} in a row)")
            if self.failed_saves >= MAX_FAILED_SAVES:
                raise
            return False

    def _save(self) -> None:
        if self.saved_step == self.progress.step:
            return
        folder = self.run_dir / "checkpoints"
        self.progress.window_meter = self.meter.state()
        state = {
            "progress": asdict(self.progress),
            "config": self.config.model_dump(mode="json"),
            "data_fingerprint": self.job.train.fingerprint,
            "versions": versions(),
        }
        with self.stop.saving():
            save_checkpoint(folder, self.progress.step, self.engine, state, self.ranks)
        self.saved_step = self.progress.step
        if self.ranks.is_first:
            prune(folder, self.config.run.keep_checkpoints, self.progress.best_checkpoint)

    def _restore(self, checkpoint: Path) -> None:
        state = json.loads((checkpoint / "state.json").read_text())
        check_config(state["config"], self.config)
        if state["data_fingerprint"] != self.job.train.fingerprint:
            raise ConfigError(
                f"{checkpoint}: the training data has changed since (texts, images, preferences, order); "
                "restore it, or start a new run.dir"
            )
        load_checkpoint(checkpoint, self.engine)
        self.progress = Progress(**state["progress"])
        if state["config"]["data"]["eval"] != self.config.model_dump(mode="json")["data"]["eval"]:
            self.progress.last_eval, self.progress.best_accuracy, self.progress.best_checkpoint = {}, None, None
        if self.ranks.is_first:
            set_newer_aside(self.run_dir / "checkpoints", self.progress.step)

    def _interrupt(self) -> NoReturn:
        self.engine.discard()
        self._save()
        signal = next(filter(None, self.ranks.gather(self.stop.signal)))
        raise InterruptedRun(
            f"stopped by {signal} after step {self.progress.step}; checkpoint saved; continue with --resume auto"
        )

    def _leave_if_stopped(self) -> None:
        if self.ranks.any(self.stop.signal is not None):
            self._interrupt()

    def _write(self, row: dict) -> None:
        if self.log is not None:
            self.log.write(row)

    def _note_refusals(self, refused: list[RefusedGroup], prepared: PreparedSet) -> None:
        for refusal in refused:
            for source, origin, record_id in prepared.members(refusal.group):
                self.quarantine.add(
                    source=source, origin=origin, record_id=record_id, code=refusal.code, message=refusal.message
                )

    def _announce(self, start: Path | None) -> None:
        for line in opening_lines(self.job, self.ranks.num_ranks, self.quarantine.total):
            self.display.say(line)
        self.display.say(f"run: {self.num_steps:,} steps of {self.order.batch_pairs:,} preferences in {self.run_dir}")
        if start is not None:
            self.display.say(f"resumed from {start}")

    def _finish(self, flips: Flips | None) -> dict:
        self._leave_if_stopped()
        with self._breakable():
            export_model(self.engine, self.run_dir / "model", self.ranks)
        progress = self.progress
        summary = {
            "eval_accuracy": progress.last_eval.get("eval/accuracy"),
            "steps": progress.step,
            "preferences": progress.preferences,
            "tokens_processed": progress.tokens_processed,
            "tokens_unshared": progress.tokens_unshared,
            "train_seconds": progress.train_seconds,
            "preferences_per_second": progress.preferences / max(progress.train_seconds, 1e-9),
            "num_processes": self.ranks.num_ranks,
            "peak_memory_bytes": max(self.ranks.gather(peak_memory_bytes(self.job.network.device))),
            "quarantined": self.quarantine.total,
            "eval_by_source": progress.last_eval.get("eval/sources", {}),
            "fp8_flip_rate": flips.rate if flips else None,
            "compiled_graphs": None if self.job.network.graphs is None else self.job.network.graphs.count,
            "best_checkpoint": progress.best_checkpoint,
            "best_accuracy": progress.best_accuracy,
            "versions": versions(),
        }
        if self.ranks.is_first:
            self._leave_report(summary)
        return summary

    def _leave_report(self, summary: dict) -> None:
        write_report(self.run_dir, summary)
        self.display.console.print(summary_table(summary, summary["eval_by_source"]))
        for line in (*self.quarantine.reasons(), f"model, report.png and summary.json are in {self.run_dir}"):
            self.display.say(line)
