"""The training run: steps with evaluations and checkpoints between them, and an export at the end.

`_train_steps` is one step after the other. Nothing of a step counts until its update has been taken: a run that is
stopped before begins it anew when it resumes. Several ranks go through all of this alike; what one of them learns
alone, such as a signal, it tells the others at the end of the step.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

from fastrm.config import Config
from fastrm.data.batching import StepOrder, plan_steps
from fastrm.data.loader import LoadedPack, Waiting, load_packs
from fastrm.data.quarantine import Quarantine
from fastrm.errors import InterruptedRun
from fastrm.model.adopt import adopt_for
from fastrm.stop import StopFlag, StopRequest
from fastrm.train.checkpoint import CHECKPOINTS, Checkpoints
from fastrm.train.engine import Update
from fastrm.train.evaluation import count_fp8_flips, evaluate
from fastrm.train.metrics import MetricsLog
from fastrm.train.optim import learning_rate, part_rates
from fastrm.train.overwrite import check_overwrite, delete_run
from fastrm.train.progress import Progress, StepReport, StepTally
from fastrm.train.ranks import Ranks, joined
from fastrm.train.report import announce, finish, progress_note, stopping_note, versions
from fastrm.train.resume import check_writer, find_start, restore
from fastrm.train.run import INCIDENTS, Run, StepGuard, locked
from fastrm.train.run_pages import try_to_write_run_page
from fastrm.train.setup import check_exactness, make_engine, set_up
from fastrm.train.step_cost import make_cost_model
from fastrm.train.trackers import check_trackers
from fastrm.ui import Display, counted


def train(
    config: Config,
    resume: str = "no",
    display: Display | None = None,
    check: Callable[[Ranks], None] = lambda ranks: None,
) -> dict:
    """Run a configuration to its end; return the content of summary.json.

    Args:
        resume: no, auto, required, or the path of a checkpoint.
        check: called on the first rank before anything is written; what it raises stops the run on all ranks.

    Raises:
        InterruptedRun: after SIGTERM or SIGINT, when a checkpoint has been saved.
        FastrmError: another subclass, for everything else that stops a run.
    """
    with StopFlag() as stop, joined(config.run.device) as ranks, ExitStack() as opened:
        stop.is_forced = ranks.num_ranks == 1
        try:
            with stop.breakable(patience=0):
                ranks.on_first(lambda: check(ranks))
                opened.enter_context(locked(Path(config.run.dir), ranks))
                shown = opened.enter_context(display or Display(silent=not ranks.is_first))
                run = _begin(config, resume, shown, stop, ranks, opened)
        except StopRequest as request:
            raise InterruptedRun(
                f"stopped by {request.name} before the first step; start again with --resume auto"
            ) from None
        try:
            return _run_to_the_end(run)
        except StopRequest:
            run.interrupt()


def _begin(config: Config, resume: str, display: Display, stop: StopFlag, ranks: Ranks, opened: ExitStack) -> Run:
    """Make everything that the first step needs; files that stay open are closed with `opened`."""
    run_dir = Path(config.run.dir)
    if starts_over := config.run.overwrite and resume == "no":
        ranks.on_first(lambda: check_overwrite(config))
    start = ranks.on_first(lambda: find_start(run_dir, resume, display.say, starts_over))
    ranks.on_first(lambda: check_writer(start, config))  # before data are prepared anew in place of the run's own
    # Checked before hours of other work: the files of model.path are there, whole, and fit the configuration.
    config, head = ranks.on_first(lambda: adopt_for(config))
    if head:
        display.say(head)
    quarantine = opened.enter_context(Quarantine(run_dir / "quarantine.jsonl" if ranks.is_first else None))
    ranks.on_first(lambda: check_trackers(config.run.report_to))
    job = set_up(config, quarantine, display, ranks)
    config, fingerprint = job.config, job.train.fingerprint
    engine = make_engine(job.network, config, ranks)
    saved = None if start is None else restore(start, config, fingerprint, engine, ranks)
    if starts_over and ranks.is_first:  # only now: whatever might have stopped the new run has not
        delete_run(run_dir, display.say)
    about = {"config": config.model_dump(mode="json"), "data_fingerprint": fingerprint, "versions": versions()}
    about |= {"base_digest": job.network.base_digest, "writer": job.network.writer}
    checkpoints = Checkpoints(
        run_dir / CHECKPOINTS, engine, about, config.run.keep_checkpoints,
        saved=saved, stop=stop, ranks=ranks, say=display.say,
    )  # fmt: skip
    progress = saved or Progress()
    order = StepOrder(job.train.preference_counts, config.optim.batch_pairs, config.run.seed)
    num_steps = config.run.max_steps or sum(order.steps_in_epoch(epoch) for epoch in range(config.run.epochs))
    log = _open_log(config, progress, display, ranks, opened)
    guard = StepGuard(run_dir / INCIDENTS if ranks.is_first else None, progress.step, progress.skipped_in_a_row)
    run = Run(job, engine, order, num_steps, progress, checkpoints, guard, log, quarantine, display, stop, ranks)
    announce(run, start)
    for _ in counted("comparing with the stock model", range(1), 1):
        check_exactness(job, engine, ranks, display.say)
    return run


def _open_log(config: Config, progress: Progress, display: Display, ranks: Ranks, opened: ExitStack):
    """Open metrics.jsonl and the trackers on the first rank; return None on the others, which learn of a failure."""
    logs = []
    ranks.on_first(lambda: logs.append(opened.enter_context(MetricsLog(config, progress, display.say))))
    return logs[0] if logs else None


def _run_to_the_end(run: Run) -> dict:
    _train_steps(run)
    if run.progress.is_stopped_early(run.config.run):
        run.display.say(stopping_note(run))
    if run.job.eval is not None and not run.progress.is_evaluated:
        evaluate(run)
    flips = count_fp8_flips(run)
    # The export comes before the checkpoint: if the disk has room for only one of them, it is the one to keep.
    summary = finish(run, flips)
    run.checkpoints.save(run.progress)
    if run.ranks.is_first:
        try_to_write_run_page(run.folder, run.display.say)
    return summary


def _train_steps(run: Run) -> None:
    """Take the steps that are left, each with the evaluation and the checkpoint that are due after it."""
    progress, engine, settings = run.progress, run.engine, run.config.run
    if progress.step >= run.num_steps:
        return
    if not progress.is_evaluated:
        # At the start; or the run was stopped during the evaluation that belongs to this step.
        _evaluate_and_save_when_due(run)
    if progress.is_stopped_early(settings):
        return
    show, note, waiting = run.display.task("training"), "", Waiting()
    show(progress.step, run.num_steps)
    with closing(_steps(run, waiting)) as steps:
        for step in steps:
            started, tally = time.perf_counter(), StepTally()
            for loaded in step:
                if run.stop.signal and run.ranks.num_ranks == 1:
                    run.interrupt()  # alone, a run stops inside a step; several ranks at its end
                run.note_refusals(loaded.refused, run.job.train)
                run.seed_dropout(loaded.plan)
                with run.breakable():
                    rewards = engine.accumulate(loaded.pack)
                tally.add(loaded, rewards)
            rate = learning_rate(progress.step, run.num_steps, run.config.optim)
            done = engine.update(rate, progress.step)
            report = _exchange(run, tally)
            progress.count_step(tally.position, report.meter, done)  # a step cut short does not count
            _guard(run, done, report)
            progress.count_seconds(time.perf_counter() - started, waiting.take())
            if _is_due(progress.step, settings.log_every) or progress.step == run.num_steps:
                row = progress.take_row(run.order.num_groups, rate) | part_rates(rate, run.config.optim)
                run.write(row)
                note = progress_note(row, run.job.network.device)
            show(progress.step, run.num_steps, note)
            _evaluate_and_save_when_due(run)
            if progress.is_stopped_early(settings):
                return
            if report.stop:
                run.interrupt()


def _steps(run: Run, waiting: Waiting) -> Iterator[Iterator[LoadedPack]]:
    """Yield the packs of each step that is left; the packs of a step must be taken before the next step."""
    job, config, ranks = run.job, run.config, run.ranks
    cost = make_cost_model(job.network.model.config, config.model, config.paradigm)
    plans = plan_steps(
        job.train.groups, run.order, run.progress.position, config.optim.tokens_per_pack,
        rank=ranks.rank, num_ranks=ranks.num_ranks, cost=cost,
    )  # fmt: skip
    pin = job.network.device.type != "cpu"
    packs = load_packs(run.builder(job.train), plans, config.data.num_workers, pin_memory=pin, waiting=waiting)
    with closing(packs):
        for _ in range(run.progress.step, run.num_steps):
            yield _packs_of_step(run, packs)


def _packs_of_step(run: Run, packs: Iterator[LoadedPack]) -> Iterator[LoadedPack]:
    is_last = False
    while not is_last:
        with run.breakable():
            loaded = next(packs)
        is_last = loaded.plan.is_last
        yield loaded


def _exchange(run: Run, tally: StepTally) -> StepReport:
    """Tell the other ranks the counts of this one in the step; return those of all, the same on each rank."""
    report = StepReport.of_all(run.ranks.gather(tally.take_report(stop=run.stop.signal is not None)))
    run.note_refusals(report.refused, run.job.train)
    return report


def _guard(run: Run, done: Update, report: StepReport) -> None:
    """Name the records of a skipped step, and stop a run whose steps are skipped one after another."""
    members = [] if done.finite else report.members
    origins = [origin for number in members for _, origin, _ in run.job.train.members(number)]
    run.guard.after_step(run.progress.step, done.finite, done.loss, done.grad_norm, origins)
    run.progress.skipped_in_a_row = run.guard.skipped_in_a_row


def _evaluate_and_save_when_due(run: Run) -> None:
    progress, settings = run.progress, run.config.run
    at_start = progress.step == 0
    is_due = settings.eval_at_start if at_start else _is_due(progress.step, settings.eval_every)
    if run.job.eval is not None and is_due:
        before = progress.best_accuracy, progress.best_checkpoint, progress.best_value
        # A checkpoint that is not on the disk cannot be the best one.
        if evaluate(run) and not run.checkpoints.try_to_save(progress):
            progress.best_accuracy, progress.best_checkpoint, progress.best_value = before
    if not at_start and _is_due(progress.step, settings.save_every):
        run.checkpoints.try_to_save(progress)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
