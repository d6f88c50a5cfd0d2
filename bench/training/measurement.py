"""The measurement of training steps: gate, rounds, memory and profile of each variant, and the matmul rate."""

import contextlib
import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch

from bench.harness.gate import RedGate, attempt, describe
from bench.harness.memory import MIB, clean_memory, resident_peak_mib
from bench.harness.rates import product_seconds
from bench.harness.timing import Budget, Rounds, Stats, Stopwatch, in_turns
from bench.training.gate import Gate
from bench.training.models import checkpointing_modes, make_network, matmul_sizes, training_config
from bench.training.plan import planned_bytes
from bench.training.profiling import profile_step
from bench.training.shapes import TrainingShape, Variant
from bench.training.variants import CompiledLayers, TrainingStep

ROUNDS = Rounds(3, 5)
VARIANT_SECONDS = 10  # of timing one variant; the least rounds may take longer
# A variant of a large model is not begun with less, its gate, its network and its rounds included.
VARIANT_RESERVE_SECONDS = 45
# The same where layers have yet to be compiled. Estimates for 16 cores: FP8 makes four times the kernels of bf16.
COMPILED_RESERVE_SECONDS, FP8_RESERVE_SECONDS = 60, 100
OUT_OF_TIME = "left out: out of time"
UNFINISHED = "left out: the run ended before it was measured"


@dataclass
class Trial:
    """A variant on one workload.

    Attributes:
        figures: of the results file.
        failed: why there are none.
    """

    variant: Variant
    figures: dict = field(default_factory=dict)
    failed: str | None = None

    @property
    def name(self) -> str:
        return self.variant.name


class Measured:
    """The findings of one run on one device. The object exists from the first moment, and grows in place.

    Args:
        keep: called with (entry, name of a variant) whenever that variant's figures have changed, so that a
            run which is killed later has them on disk.

    Attributes:
        model: small, 3B or 7B.
        device: cuda or cpu.
        matmul_flops: per second, of the best large matrix product; None if measuring it failed.
        entries: of the results file.
        left_out: what was not measured, and why.
    """

    def __init__(self, model: str, seconds: float, keep: Callable[[dict, str], None] = lambda entry, name: None):
        self.model = model
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.budget = Budget(seconds)
        self.entries: list[dict] = []
        self.left_out: list[str] = []
        self.matmul_flops: float | None = None
        self._keep = keep
        self._gate: Gate | None = None
        self._red: str | None = None  # the reason, if the gate itself is red
        self._verdicts: dict[str, tuple[float | None, str | None]] = {}
        self._compiled: dict[tuple, CompiledLayers] = {}
        try:
            self.matmul_flops = matmul_rate(model, self.device)
        except Exception as error:
            self.left_out.append(f"the rate of large matrix products: {describe(error)}")

    def measure(
        self, shape: TrainingShape, variants: Sequence[Variant], kind: str, profiled: Collection[str] = ()
    ) -> dict:
        """Gate and time the variants on one shape; the entry is kept in `entries`.

        Args:
            kind: main, or features for variants that lack one.
            profiled: names of variants whose time is looked into.

        Raises:
            DeviceLost: if the device answers nothing any more.
        """
        found = {variant.name: {"failed": UNFINISHED} for variant in variants}
        entry = {"kind": kind, "model": self.model, "name": shape.name, "shape": asdict(shape), "variants": found}
        self.entries.append(entry)
        measure = self._in_turns if self.model == "small" else self._one_by_one
        for trial in measure(shape, [Trial(variant) for variant in variants], profiled):
            found[trial.name] = {"failed": trial.failed, **trial.figures}
            self._keep(entry, trial.name)
        return entry

    def _in_turns(self, shape: TrainingShape, trials: list[Trial], profiled: Collection[str]) -> Iterator[Trial]:
        """Time all variants in memory, in turns, so that a slow phase of the machine falls on all; yield each."""
        steps: dict[str, TrainingStep] = {}
        for trial in trials:
            self._check(trial)
            if (made := attempt(trial, lambda trial=trial: self._make(trial.variant, shape, "none"))) is not None:
                steps[trial.name] = made
        for step in steps.values():
            timed(step)
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
        in_turns(
            [lambda name=name, step=step: samples[name].append(timed(step)) for name, step in steps.items()],
            ROUNDS.during(VARIANT_SECONDS * len(steps)),
        )
        for trial in trials:
            if (step := steps.get(trial.name)) is not None:
                peak = resident_peak_mib(lambda step=step: step.step(0))
                trial.figures |= self._figures(step, samples[trial.name], peak)
                yield from self._profiled(trial, step, profiled)
            else:
                yield trial

    def _one_by_one(self, shape: TrainingShape, trials: list[Trial], profiled: Collection[str]) -> Iterator[Trial]:
        """Time one model in memory at a time, each gated right before, while its layers are compiled; yield each."""
        for trial in trials:
            if (known := self._known(shape, trial.name)) is not None:
                trial.figures, trial.failed = known, known.pop("failed")
                yield trial
            elif self.budget.left < self._reserve(trial.variant):
                trial.failed = OUT_OF_TIME
                self.left_out.append(f"{shape.name}, {trial.name}: out of time")
                yield trial
            else:
                self._check(trial)
                step = attempt(trial, lambda trial=trial: self._alone(trial, shape))
                yield from self._profiled(trial, step, profiled)
                del step

    def _profiled(self, trial: Trial, step: TrainingStep | None, profiled: Collection[str]) -> Iterator[Trial]:
        """Yield the trial with its figures, and once more with its profile, which may take long or hang."""
        yield trial
        if step is not None and trial.name in profiled:
            trial.figures |= _profile(step)
            yield trial

    def _reserve(self, variant: Variant) -> float:
        """Return the seconds without which a variant of a large model is not begun."""
        mode = checkpointing_modes(self.model, variant.plain)[0]
        if not variant.compile or self._compiled_for(variant, mode).graphs is not None:
            return VARIANT_RESERVE_SECONDS
        return COMPILED_RESERVE_SECONDS if variant.fp8 == "off" else FP8_RESERVE_SECONDS

    def _known(self, shape: TrainingShape, name: str) -> dict | None:
        """Return this run's figures of a variant that belongs to both kinds of entries."""
        for entry in self.entries:
            found = entry["variants"].get(name) if entry["name"] == shape.name else None
            if found is not None and found["failed"] not in (UNFINISHED, OUT_OF_TIME):
                return dict(found)
        return None

    def _check(self, trial: Trial) -> None:
        """Note the error of the variant's gradient, or why the gate refuses it; once for each variant."""
        if trial.name not in self._verdicts:
            clean_memory()
            variant, mode = trial.variant, checkpointing_modes(self.model, trial.variant.plain)[0]
            error = attempt(trial, lambda: self._open_gate().check(variant, self._compiled_for(variant, mode)))
            self._verdicts[trial.name] = error, trial.failed
        trial.figures["gradient_error"], trial.failed = self._verdicts[trial.name]

    def _open_gate(self) -> Gate:
        """Return the gate of all variants, made for the first of them.

        A gate that is red by itself stays so. Another failure, such as of memory, counts only for the variant that met
        it; the next one tries again.
        """
        if self._red is not None:
            raise RedGate(self._red)
        if self._gate is None:
            try:
                self._gate = Gate(self.model, self.device)
            except RedGate as error:
                self._red = str(error)
                raise
        return self._gate

    def _compiled_for(self, variant: Variant, checkpointing: str) -> CompiledLayers:
        """Return the compiled layers that variants with the same layers share, for all later workloads."""
        key = variant.fuse, variant.attention, variant.fp8, checkpointing
        return self._compiled.setdefault(key, CompiledLayers())

    def _make(self, variant: Variant, shape: TrainingShape, checkpointing: str) -> TrainingStep:
        """Make the variant's step, with a network of its own."""
        clean_memory()
        network, config = make_network(self.model, self.device), training_config(self.model, checkpointing)
        return TrainingStep(variant, network, config, shape, self._compiled_for(variant, checkpointing))

    def _alone(self, trial: Trial, shape: TrainingShape) -> TrainingStep:
        """Measure a variant of a large model with as little recomputation as the memory allows."""
        *first, last = checkpointing_modes(self.model, trial.variant.plain)
        for mode in first:
            with contextlib.suppress(torch.OutOfMemoryError):
                return self._rounds(trial, self._make(trial.variant, shape, mode))
        return self._rounds(trial, self._make(trial.variant, shape, last))

    def _rounds(self, trial: Trial, step: TrainingStep) -> TrainingStep:
        """Note the step's figures and return the step."""
        for _ in range(2 if step.graphs else 1):  # the first run compiles
            timed(step)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        samples = [timed(step) for _ in ROUNDS.during(min(VARIANT_SECONDS, self.budget.left))]
        peak = torch.cuda.max_memory_allocated() / MIB if self.device == "cuda" else None
        trial.figures |= self._figures(step, samples, peak)
        return step

    def _figures(self, step: TrainingStep, samples: list[tuple[float, float]], peak: float | None) -> dict:
        wall, cpu = ([sample[part] for sample in samples] for part in (0, 1))
        stats, num_tokens = Stats.of(wall), step.num_tokens(0)
        return {
            "seconds": {**stats.to_json(), "cpu": Stats.of(cpu).median},
            "peak_mib": peak,
            "planned_mib": self._planned_mib(step),
            "pairs_per_second": step.shape.num_pairs / stats.median,
            "useful_tokens_per_second": step.shape.useful_tokens / stats.median,
            "processed_tokens": num_tokens,
            "processed_tokens_per_second": num_tokens / stats.median,
            "flops": step.flops,
            "matmul_share": step.flops / stats.median / self.matmul_flops if self.matmul_flops else None,
            "checkpointing": step.checkpointing,
            "graphs": None if step.graphs is None else step.graphs.count,
        }  # fmt: skip

    def _planned_mib(self, step: TrainingStep) -> float | None:
        """Return the peak that `fastrm plan` predicts for a large model; a small one is measured above rest."""
        if self.model == "small":
            return None
        planned = planned_bytes(self.model, step.engine.config, step.shape, step.variant)
        return None if planned is None else planned / MIB


def _profile(step: TrainingStep) -> dict:
    """Return the profile, or why there is none: the figures are valid without it."""
    try:
        return {"profile": profile_step(step)}
    except Exception as error:
        return {"profile_failed": describe(error)}


def timed(step: TrainingStep) -> tuple[float, float]:
    """Return the seconds by the clock, and of CPU time, of one step, which ends by reading the loss."""
    with Stopwatch() as watch:
        step.step(0)
    return watch.wall, watch.cpu


def matmul_rate(model: str, device: str) -> float:
    """Return FLOPs per second of the best large matrix product, in the precision of the model."""
    dtype = torch.float32 if model == "small" else torch.bfloat16
    return max(
        2 * rows * inner * columns / statistics.median(product_seconds(rows, inner, columns, device, dtype))
        for rows, inner, columns in matmul_sizes(model)
    )
