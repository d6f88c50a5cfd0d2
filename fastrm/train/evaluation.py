"""Evaluations of a run: held-out preferences while it trains, and FP8 against bf16 at its end."""

from contextlib import closing
from dataclasses import dataclass, field
from itertools import zip_longest

import torch

from fastrm.config import LossConfig
from fastrm.data.loader import RefusedGroup
from fastrm.data.packing import Pack
from fastrm.data.prepared.stored import PreparedSet
from fastrm.evaluate.accuracy import Flips, PreferenceMeter
from fastrm.evaluate.flips import compare_fp8
from fastrm.evaluate.ratings import FIGURES, RatingMeter, TextMeter, shown
from fastrm.evaluate.scoring import NON_FINITE, refuse_non_finite, run_packs
from fastrm.model.head import total_weight
from fastrm.model.reward_statistics import reward_statistics
from fastrm.stopping_config import LOSS_PARTS
from fastrm.train.run import Run


@dataclass
class _HeldOut:
    """The counts of one rank, or of all together, on the held-out preferences; `losses` are those of a step's parts."""

    meter: PreferenceMeter | RatingMeter | TextMeter
    refused: list[RefusedGroup] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    weight: float = 0.0
    rewards: list[float] = field(default_factory=list)

    def add(self, pack: Pack, rewards: torch.Tensor, losses: list[float], settings: LossConfig) -> None:
        self.meter.add(pack, rewards)
        self.rewards += rewards.tolist()
        self._add_losses(losses)
        self.weight += total_weight(pack, settings)

    def merge(self, other: "_HeldOut") -> None:
        self.meter.merge(other.meter)
        self.refused += other.refused
        self._add_losses(other.losses)
        self.weight += other.weight
        self.rewards += other.rewards

    def _add_losses(self, losses: list[float]) -> None:
        self.losses = [a + b for a, b in zip_longest(self.losses, losses, fillvalue=0.0)]

    def figures(self, prefix: str) -> dict[str, float | None]:
        """Return loss, accuracy, margin and preferences, or agreement with ratings, as metrics.jsonl names them."""
        if isinstance(self.meter, PreferenceMeter):
            margin = self.meter.means().get("rewards/margins", 0.0)
            figures = {"accuracy": self.meter.accuracy, "margin": margin, "preferences": self.meter.num_scored}
        else:
            figures = self.meter.figures()
        losses = [loss / max(self.weight, 1e-12) for loss in self.losses]
        parts = dict(zip(LOSS_PARTS, losses, strict=True)) if len(losses) > 1 else {}
        figures = {"loss": sum(losses), **parts, **figures}
        return {f"{prefix}/{name}": value for name, value in figures.items()}


def evaluate(run: Run) -> bool:
    """Evaluate the weights of this step on data.eval, on all ranks; return whether they are the best so far.

    Raises:
        InterruptedRun: if a rank was asked to stop.
        DataError: if a reward is not finite; a checkpoint without figures has been saved then.
    """
    network, parts = run.job.network.eval(), run.job.eval.parts(run.config.run.eval_groups)
    found, total = {name: _nothing_yet(run) for name in parts}, _nothing_yet(run)
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
    row = {"step": run.progress.step, "preferences": run.progress.preferences, **total.figures("eval")}
    row["eval/sources"] = total.meter.by_source()
    lines = [f"step {row['step']:,}: held-out {_in_words(row, 'eval')}"]
    for name in filter(None, found):
        own = found[name].figures(place := f"eval/{name}")
        row |= own
        lines.append(f"  {name}: {_in_words(own, place)}")
    if run.config.paradigm != "judge" and (statistics := reward_statistics(total.rewards)) is not None:
        row["eval/rewards"] = statistics
    run.write(row)
    for line in lines:
        run.display.say(line)
    return run.progress.note_evaluation(row, run.config.run)


def _nothing_yet(run: Run) -> _HeldOut:
    meters = {"mse": RatingMeter, "cross_entropy": TextMeter}
    losses = [0.0] * (len(LOSS_PARTS) if run.config.paradigm == "critic" else 1)
    return _HeldOut(meters.get(run.config.loss.kind, PreferenceMeter)(), losses=losses)


def _in_words(row: dict, place: str) -> str:
    if f"{place}/accuracy" in row:
        return f"accuracy {row[f'{place}/accuracy']:.4f}, loss {row[f'{place}/loss']:.4f}"
    if f"{place}/mse" not in row:
        return f"loss {row[f'{place}/loss']:.4f}"
    return ", ".join(f"{text} {shown(row[f'{place}/{name}'])}" for name, text in FIGURES.items())


def _count_held_out(run: Run, prepared: PreparedSet) -> _HeldOut:
    config, found, engine = run.config, _nothing_yet(run), run.engine
    losses: list[float] = []

    def forward(pack: Pack | None) -> torch.Tensor | None:
        if config.paradigm != "critic":
            return engine.rewards(pack)
        total, rewards = engine.loss_and_rewards(pack)  # the loss of critiques does not follow from rewards
        losses[:] = total.tolist()
        return rewards

    packs = run_packs(
        forward, run.builder(prepared), prepared.groups, config.optim.tokens_per_pack,
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
                own = losses if config.paradigm == "critic" else [float(engine.loss(rewards, loaded.pack))]
                found.add(loaded.pack, rewards, own, config.loss)
    return found


def count_fp8_flips(run: Run) -> Flips | None:
    """Compare FP8 with bf16 under the final weights on the held-out preferences; None if either is missing."""
    network, prepared, config = run.job.network, run.job.eval, run.config
    if network.fp8 is None or prepared is None or config.loss.kind in ("mse", "cross_entropy"):
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
