"""The training run: steps, evaluations, checkpoints, and an export at the end."""

import json
import resource
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import torch

from fastrm.config import Config
from fastrm.data.loader import LoadedPack, PackBuilder, Waiting, load_packs
from fastrm.data.order import StepOrder
from fastrm.data.packing import Pack
from fastrm.data.plan import plan_steps
from fastrm.data.prepare import PreparedSet, refuse
from fastrm.data.quarantine import Quarantine
from fastrm.errors import ConfigError, InterruptedRun, RecordError, StorageError
from fastrm.evaluate.flips import Flips, compare_fp8
from fastrm.evaluate.scoring import run_packs
from fastrm.model.export import save_model
from fastrm.model.precision import token_multiple
from fastrm.train.checkpoint import load_checkpoint, prune, save_checkpoint, set_newer_aside
from fastrm.train.display import Display
from fastrm.train.engine import LocalEngine
from fastrm.train.guard import RunLock, StepGuard, StopFlag
from fastrm.train.metrics import MetricsLog, PreferenceMeter, check_loggers, keep_rows, read_rows
from fastrm.train.optim import learning_rate
from fastrm.train.report import draw_report, summary_table
from fastrm.train.resume import check_config, find_start
from fastrm.train.setup import Job, set_up

# Saves in a row that may fail, for a full disk say, before the run stops.
MAX_FAILED_SAVES = 3


@dataclass
class Progress:
    """What a checkpoint holds besides tensors. `position` alone says where the data stands."""

    step: int = 0
    position: int = 0
    preferences: int = 0
    tokens_processed: int = 0
    tokens_unshared: int = 0
    train_seconds: float = 0.0
    skipped_in_a_row: int = 0
    best_accuracy: float | None = None
    best_checkpoint: str | None = None
    last_eval: dict = field(default_factory=dict)
    # The row of metrics.jsonl that is being collected: a resumed run writes the same one.
    window_losses: list[list[float]] = field(default_factory=list)  # (loss, gradient norm) of each step
    window_meter: dict = field(default_factory=dict)
    window_seconds: float = 0.0
    window_wait_seconds: float = 0.0  # of these, waiting for packs


def train(config: Config, resume: str = "no", display: Display | None = None) -> dict:
    """Run a configuration to its end; returns what summary.json holds.

    Args:
        resume: no, auto, required, or the path of a checkpoint.

    Raises:
        InterruptedRun: after SIGTERM or SIGINT, when a checkpoint has been saved.
        FastrmError: another subclass, for everything else that stops a run.
    """
    run_dir = Path(config.run.dir)
    lock = RunLock(run_dir)
    try:
        with StopFlag() as stop, display or Display() as shown:
            start = find_start(run_dir, resume, shown.say)
            if start is None:
                _clear_failed_start(run_dir)
            with Quarantine(run_dir / "quarantine.jsonl") as quarantine:
                return _Run(config, run_dir, start, quarantine, shown, stop).to_the_end()
    finally:
        lock.release()


def _clear_failed_start(run_dir: Path) -> None:
    """What a start that reached no checkpoint has left would count in this run, or be taken for its own."""
    for name in ("quarantine.jsonl", "incidents.jsonl"):
        (run_dir / name).unlink(missing_ok=True)
    shutil.rmtree(run_dir / "tokenizer", ignore_errors=True)


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
    ):
        self.config, self.run_dir, self.quarantine = config, run_dir, quarantine
        self.display, self.stop = display, stop
        check_loggers(config.run.report_to)
        display.poll = self._leave_before_the_first_step
        self.job: Job = set_up(config, run_dir, quarantine, display)
        display.poll = None
        self.engine = LocalEngine(self.job.network, config)
        self.progress = Progress()
        if start is not None:
            self._restore(start)
        self.order = StepOrder(
            [group.num_preferences for group in self.job.train.groups], config.optim.batch_pairs, config.run.seed
        )
        epochs = range(config.run.epochs)
        self.num_steps = config.run.max_steps or sum(self.order.steps_in_epoch(epoch) for epoch in epochs)
        (run_dir / "config.yaml").write_text(config.to_yaml())
        self.log = MetricsLog(
            run_dir / "metrics.jsonl", self.progress, config.run.report_to, run_dir, config.model_dump(mode="json")
        )
        keep_rows(run_dir / "incidents.jsonl", lambda row: row["step"] <= self.progress.step)
        self.guard = StepGuard(run_dir / "incidents.jsonl", self.progress.skipped_in_a_row)
        self.meter, self.saved_step = PreferenceMeter(), self.progress.step if start else -1
        if self.progress.window_meter:
            self.meter.restore(self.progress.window_meter)
        self.failed_saves = 0
        self.step_meter = PreferenceMeter()  # of the step under way
        self.step_rewards: list[tuple[Pack, torch.Tensor]] = []  # the same, until its update
        self._announce(start)

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
        finally:
            self.log.close()

    def _steps(self) -> None:
        if self.progress.step >= self.num_steps:
            return
        if self.progress.step > 0 and self.progress.last_eval.get("step") != self.progress.step:
            # The run was stopped during the evaluation that belongs to this step.
            self._evaluate_and_save_when_due()
        update = self.display.task("training")
        groups, data = self.job.train.groups, self.config.data
        plans = plan_steps(groups, self.order, self.progress.position, self.config.optim.tokens_per_pack)
        builder = self._builder(self.job.train)
        members: list[int] = []
        waiting, pin = Waiting(), self.job.network.device.type != "cpu"
        step_started = time.perf_counter()
        for loaded in load_packs(builder, plans, data.num_workers, pin_memory=pin, waiting=waiting):
            if self.stop.signal:
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
            if self.progress.step >= self.num_steps:
                return
            step_started = time.perf_counter()

    def _builder(self, prepared: PreparedSet) -> PackBuilder:
        records, share = [group.record for group in prepared.groups], self.config.data.share_prefixes
        multiple = token_multiple(self.config.precision.fp8)
        network = self.job.network
        return PackBuilder(records, network.encoder, share, multiple=multiple, finish=network.planner)

    def _accumulate(self, loaded: LoadedPack) -> None:
        self._note_refusals(loaded, self.job.train)
        if loaded.pack is None:
            return
        rewards = self.engine.accumulate(loaded.pack)
        # Patches are most of a pack, and no longer needed; nor are layouts, whose tensors may be open files.
        self.step_rewards.append((replace(loaded.pack, patches=None, prepared=None), rewards))

    def _update(self, position: int, members: list[int]) -> None:
        """Take the optimizer step, and only then count it: half a step has processed nothing."""
        rate = learning_rate(self.progress.step, self.num_steps, self.config.optim)
        done = self.engine.update(rate, self.progress.step)
        for pack, rewards in self.step_rewards:
            self.step_meter.add(pack, rewards)
        self.step_rewards.clear()
        self.progress.step += 1
        self.progress.position = position
        self.progress.preferences += self.step_meter.num_preferences
        self.progress.tokens_processed += self.step_meter.num_tokens
        self.progress.tokens_unshared += self.step_meter.num_unshared_tokens
        self.meter.merge(self.step_meter)
        self.step_meter.clear()
        self.progress.window_losses.append([done.loss, done.grad_norm])
        groups = self.job.train.groups
        names = [origin for number in members for origin, _ in groups[number].members]
        try:
            self.guard.after_step(self.progress.step, done.finite, done.loss, done.grad_norm, names)
        finally:
            self.progress.skipped_in_a_row = self.guard.skipped_in_a_row

    def _log_row(self) -> str:
        losses, seconds = self.progress.window_losses, self.progress.window_seconds
        row = {
            "step": self.progress.step,
            "epoch": self.progress.position / self.order.num_groups,
            "loss": sum(loss for loss, _ in losses) / len(losses),
            **self.meter.means(),
            "grad_norm": sum(norm for _, norm in losses) / len(losses),
            "lr": learning_rate(self.progress.step - 1, self.num_steps, self.config.optim),
            "preferences_per_second": self.meter.num_preferences / seconds,
            "tokens_per_second": self.meter.num_tokens / seconds,
            "data_wait_share": self.progress.window_wait_seconds / seconds,
        }
        self.log.write(row)
        self.meter.clear()
        losses.clear()
        self.progress.window_seconds = self.progress.window_wait_seconds = 0.0
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
        meter, loss, weight = PreferenceMeter(), 0.0, 0.0
        packs = run_packs(
            self.engine.rewards, builder, prepared.groups, config.optim.tokens_per_pack, config.data.num_workers
        )
        for loaded, rewards in packs:
            if self.stop.signal:
                network.train()
                self._interrupt()
            self._note_refusals(loaded, prepared)
            if loaded.pack is not None:
                meter.add(loaded.pack, rewards)
                pack_weight = float(loaded.pack.weight.sum())
                loss += float(self.engine.loss(rewards, loaded.pack)) * pack_weight
                weight += pack_weight
        network.train()
        row = {
            "step": self.progress.step,
            "eval/loss": loss / max(weight, 1e-12),
            "eval/accuracy": meter.accuracy,
            "eval/margin": meter.means()["rewards/margins"],
            "eval/sources": meter.by_source(),
        }
        self.log.write(row)
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
        save_checkpoint(folder, self.progress.step, self.engine, state)
        self.saved_step = self.progress.step
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
        set_newer_aside(self.run_dir / "checkpoints", self.progress.step)

    def _interrupt(self) -> None:
        self.engine.discard()
        self._save()
        raise InterruptedRun(
            f"stopped by {self.stop.signal} after step {self.progress.step}; checkpoint saved; continue with "
            "--resume auto"
        )

    def _leave_if_stopped(self) -> None:
        if self.stop.signal:
            self._interrupt()

    def _leave_before_the_first_step(self) -> None:
        if self.stop.signal:
            raise InterruptedRun(f"stopped by {self.stop.signal} before the first step; start again with --resume auto")

    def _note_refusals(self, loaded: LoadedPack, prepared) -> None:
        for refusal in loaded.refused:
            group = prepared.groups[refusal.group]
            refuse(self.quarantine, group.record.source, group.members, RecordError(refusal.code, refusal.message))

    def _announce(self, start: Path | None) -> None:
        job, say = self.job, self.display.say
        parameters = sum(p.numel() for p in job.network.parameters())
        trainable = sum(p.numel() for p in job.network.parameters() if p.requires_grad)
        say(f"model: {parameters:,} parameters, {trainable:,} trained, on {job.network.device}")
        for part, (choice, why) in (("attention", job.network.attention), ("head and loss", job.network.head_kernels)):
            say(f"{part}: {choice} ({why})")
        for line in job.network.fp8.lines(self.config.compile == "layers") if job.network.fp8 else ():
            say(line)
        say(
            f"data: {len(job.train.groups):,} groups with {job.train.num_preferences:,} preferences from "
            f"{job.train.num_records:,} records; {job.train.num_ties_ignored:,} ties ignored; "
            f"{self.quarantine.total:,} records in quarantine"
        )
        say(f"run: {self.num_steps:,} steps of {self.config.optim.batch_pairs:,} preferences in {self.run_dir}")
        if start is not None:
            say(f"resumed from {start}")

    def _finish(self, flips: Flips | None) -> dict:
        save_model(self.job.network, self.run_dir / "model")
        progress = self.progress
        summary = {
            "eval_accuracy": progress.last_eval.get("eval/accuracy"),
            "steps": progress.step,
            "preferences": progress.preferences,
            "tokens_processed": progress.tokens_processed,
            "tokens_unshared": progress.tokens_unshared,
            "train_seconds": progress.train_seconds,
            "preferences_per_second": progress.preferences / max(progress.train_seconds, 1e-9),
            "peak_memory_bytes": peak_memory_bytes(self.job.network.device),
            "quarantined": self.quarantine.total,
            "eval_by_source": progress.last_eval.get("eval/sources", {}),
            "fp8_flip_rate": flips.rate if flips else None,
            "best_checkpoint": progress.best_checkpoint,
            "versions": versions(),
        }
        (self.run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        rows = read_rows(self.run_dir / "metrics.jsonl")
        draw_report(
            [row for row in rows if "loss" in row],
            [row for row in rows if "eval/accuracy" in row],
            self.run_dir / "report.png",
            f"{self.run_dir.name}: {progress.step:,} steps, {progress.preferences:,} preferences",
        )
        self.display.console.print(summary_table(summary, summary["eval_by_source"]))
        self.display.say(f"model, report.png and summary.json are in {self.run_dir}")
        return summary


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of this process: allocated CUDA memory, or resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def versions() -> dict[str, str]:
    names = ("fastrm", "torch", "transformers", "tokenizers", "numpy", "pillow")
    return {"python": sys.version.split()[0], **{name: version(name) for name in names}}
