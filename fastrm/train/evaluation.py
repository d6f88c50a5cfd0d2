"""Evaluations of a run: held-out preferences while it trains, and FP8 against bf16 at its end."""

from contextlib import closing
from dataclasses import dataclass, field

from fastrm.data.loader import LoadedPack, RefusedGroup
from fastrm.data.prepared.stored import PreparedSet
from fastrm.evaluate.accuracy import Flips, PreferenceMeter
from fastrm.evaluate.flips import compare_fp8
from fastrm.evaluate.scoring import NON_FINITE, refuse_non_finite, run_packs
from fastrm.train.run import Run


@dataclass
class _HeldOut:
    """The counts of one rank, or of all together, on the held-out preferences."""

    meter: PreferenceMeter = field(default_factory=PreferenceMeter)
    refused: list[RefusedGroup] = field(default_factory=list)
    loss: float = 0.0
    weight: float = 0.0

    def add(self, loaded: LoadedPack, rewards, loss) -> None:
        self.meter.add(loaded.pack, rewards)
        self.loss += float(loss)
        self.weight += float(loaded.pack.weight.sum())

    def merge(self, other: "_HeldOut") -> None:
        self.meter.merge(other.meter)
        self.refused += other.refused
        self.loss += other.loss
        self.weight += other.weight

    def figures(self, prefix: str) -> dict[str, float]:
        """Return loss, accuracy and margin, as metrics.jsonl names them."""
        return {
            f"{prefix}/loss": self.loss / max(self.weight, 1e-12),
            f"{prefix}/accuracy": self.meter.accuracy,
            f"{prefix}/margin": self.meter.means()["rewards/margins"],
        }


def evaluate(run: Run) -> bool:
    """Evaluate the weights of this step on data.eval, on all ranks; return whether they are the best so far.

    Raises:
        InterruptedRun: if a rank was asked to stop.
        DataError: if a reward is not finite; a checkpoint without figures has been saved then.
    """
    network, parts = run.job.network.eval(), run.job.eval.parts(run.config.run.eval_groups)
    found, total = {name: _HeldOut() for name in parts}, _HeldOut()
    for report in run.ranks.gather({name: _count_held_out(run, prepared) for name, prepared in parts.items()}):
        for name, counts in report.items():
            found[name].merge(counts)
    for name, counts in found.items():
        total.merge(counts)
        run.note_refusals(counts.refused, parts[name])
        if broken := [refusal for refusal in counts.refused if refusal.code == NON_FINITE]:
            run.checkpoints.save(run.progress)  # without figures: they would choose a checkpoint
            refuse_non_finite(f"evaluation, {parts[name].members(broken[0].group)[0][1]}", broken[0])
    network.train()
    row = {"step": run.progress.step, **total.figures("eval"), "eval/sources": total.meter.by_source()}
    lines = [f"step {row['step']:,}: held-out accuracy {row['eval/accuracy']:.4f}, loss {row['eval/loss']:.4f}"]
    for name in filter(None, found):
        own = found[name].figures(place := f"eval/{name}")
        row |= own
        lines.append(f"  {name}: accuracy {own[f'{place}/accuracy']:.4f}, loss {own[f'{place}/loss']:.4f}")
    run.write(row)
    for line in lines:
        run.display.say(line)
    return run.progress.note_evaluation(row, run.config.run)


def _count_held_out(run: Run, prepared: PreparedSet) -> _HeldOut:
    config, found = run.config, _HeldOut()
    packs = run_packs(
        run.engine.rewards, run.builder(prepared), prepared.groups, config.optim.tokens_per_pack,
        config.data.num_workers, run.ranks.rank, run.ranks.num_ranks,
        pin_memory=run.job.network.device.type != "cpu",
    )  # fmt: skip
    show, done, total = run.display.task("evaluating", is_brief=True), 0, len(prepared.groups)
    with run.breakable(), closing(packs):
        for loaded, rewards in packs:
            run.leave_if_stopped()
            done += len(loaded.plan.groups) * run.ranks.num_ranks  # others do as much
            show(min(done, total), total)
            found.refused += loaded.refused
            if loaded.pack is not None:
                found.add(loaded, rewards, run.engine.loss(rewards, loaded.pack))
    return found


def count_fp8_flips(run: Run) -> Flips | None:
    """Compare FP8 with bf16 under the final weights on the held-out preferences; None if either is missing."""
    network, prepared, config = run.job.network, run.job.eval, run.config
    if network.fp8 is None or prepared is None:
        return None
    with run.breakable():
        flips = compare_fp8(
            network, run.engine.rewards, run.builder(prepared), prepared.groups, config.optim.tokens_per_pack,
            config.data.num_workers, run.leave_if_stopped,
        )  # fmt: skip
    fp8, bf16 = flips.accuracies
    run.display.say(
        f"FP8 against bf16, same weights: {flips.lost + flips.gained:,} of {flips.num_preferences:,} held-out "
        f"preferences flipped ({flips.rate:.2%}); accuracy {fp8:.4f} against {bf16:.4f}"
    )
    return flips
