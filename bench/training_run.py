"""Measuring training steps: gate, rounds, memory and profile of each variant, and the device's own matmul rate."""

import contextlib
import statistics
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch

from kernel_timing import MIB, Budget, Stats, attempt, clean_memory, describe, synchronize
from measure import peak_mib as resident_peak_mib
from training_gate import Gate
from training_models import checkpointing_modes, make_network, matmul_sizes, training_config
from training_profile import profile_step
from training_shapes import TrainingShape, Variant
from training_variants import CompiledLayers, TrainingStep

MIN_ROUNDS, MAX_ROUNDS = 3, 5
VARIANT_SECONDS = 10  # of timing one variant; MIN_ROUNDS may take longer
VARIANT_RESERVE_SECONDS = 45  # a variant of a large model is not begun with less: it may have to be compiled
OUT_OF_TIME = "left out: out of time"


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
    """What one run on one device has found.

    Attributes:
        model: small, 3B or 7B.
        device: cuda or cpu.
        matmul_flops: per second, of the best large matrix product.
        entries: of the results file.
        left_out: what was not measured, and why.
    """

    def __init__(self, model: str, seconds: float):
        self.model = model
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.budget = Budget(seconds)
        self.matmul_flops = matmul_rate(model, self.device)
        self.entries: list[dict] = []
        self.left_out: list[str] = []
        self._gate = Gate(model, self.device)
        self._verdicts: dict[str, tuple[float | None, str | None]] = {}
        self._compiled: tuple[tuple, CompiledLayers] = ((), CompiledLayers())

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
        trials = [Trial(variant) for variant in variants]
        measure = self._in_turns if self.model == "small" else self._one_by_one
        measure(shape, trials, profiled)
        found = {trial.name: {"failed": trial.failed, **trial.figures} for trial in trials}
        entry = {"kind": kind, "model": self.model, "name": shape.name, "shape": asdict(shape), "variants": found}
        self.entries.append(entry)
        return entry

    def _in_turns(self, shape: TrainingShape, trials: list[Trial], profiled: Collection[str]) -> None:
        """All variants in memory, in turns, so that a slow phase of the machine falls on all."""
        steps: dict[str, TrainingStep] = {}
        for trial in trials:
            self._check(trial)
            if (made := attempt(trial, lambda trial=trial: self._make(trial.variant, shape, "none"))) is not None:
                steps[trial.name] = made
        for step in steps.values():
            timed(step)
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
        for _ in rounds(VARIANT_SECONDS * len(steps)):
            for name, step in steps.items():
                samples[name].append(timed(step))
        for trial in trials:
            if (step := steps.get(trial.name)) is not None:
                peak = resident_peak_mib(lambda step=step: step.step(0))
                trial.figures |= self._figures(step, samples[trial.name], peak, trial.name in profiled)

    def _one_by_one(self, shape: TrainingShape, trials: list[Trial], profiled: Collection[str]) -> None:
        """One model in memory at a time, and each gated right before, while its layers are compiled."""
        for trial in trials:
            if (known := self._known(shape, trial.name)) is not None:
                trial.figures, trial.failed = known, known.pop("failed")
            elif self.budget.left < VARIANT_RESERVE_SECONDS:
                trial.failed = OUT_OF_TIME
                self.left_out.append(f"{shape.name}, {trial.name}: out of time")
            else:
                self._check(trial)
                run = attempt(trial, lambda trial=trial: self._alone(trial.variant, shape, trial.name in profiled))
                trial.figures |= run or {}

    def _known(self, shape: TrainingShape, name: str) -> dict | None:
        """Figures of this run, of a variant that belongs to both kinds of entries."""
        for entry in self.entries:
            if entry["name"] == shape.name and name in entry["variants"]:
                return dict(entry["variants"][name])
        return None

    def _check(self, trial: Trial) -> None:
        """Note how far off the variant's gradient is, or why the gate refuses it; once for each variant."""
        if trial.name not in self._verdicts:
            clean_memory()
            variant, mode = trial.variant, checkpointing_modes(self.model, trial.variant.plain)[0]
            error = attempt(trial, lambda: self._gate.check(variant, self._compiled_for(variant, mode)))
            self._verdicts[trial.name] = error, trial.failed
        trial.figures["gradient_error"], trial.failed = self._verdicts[trial.name]

    def _compiled_for(self, variant: Variant, checkpointing: str) -> CompiledLayers:
        """Compiled layers for all variants whose layers are alike, to save the time of compiling."""
        key = variant.fuse, variant.attention, variant.fp8, checkpointing
        if self._compiled[0] != key:
            torch._dynamo.reset()
            self._compiled = key, CompiledLayers()
        return self._compiled[1]

    def _make(self, variant: Variant, shape: TrainingShape, checkpointing: str) -> TrainingStep:
        """The variant's step, with a network of its own."""
        clean_memory()
        network, config = make_network(self.model, self.device), training_config(self.model, checkpointing)
        return TrainingStep(variant, network, config, shape, self._compiled_for(variant, checkpointing))

    def _alone(self, variant: Variant, shape: TrainingShape, profiled: bool) -> dict:
        """Figures of a variant of a large model, with as little recomputation as the memory allows."""
        *first, last = checkpointing_modes(self.model, variant.plain)
        for mode in first:
            with contextlib.suppress(torch.OutOfMemoryError):
                return self._rounds(self._make(variant, shape, mode), profiled)
        return self._rounds(self._make(variant, shape, last), profiled)

    def _rounds(self, step: TrainingStep, profiled: bool) -> dict:
        for _ in range(2 if step.graphs else 1):  # the first compiles
            timed(step)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        samples = [timed(step) for _ in rounds(min(VARIANT_SECONDS, self.budget.left))]
        peak = torch.cuda.max_memory_allocated() / MIB if self.device == "cuda" else None
        return self._figures(step, samples, peak, profiled)

    def _figures(
        self, step: TrainingStep, samples: list[tuple[float, float]], peak: float | None, profiled: bool
    ) -> dict:
        wall, cpu = ([sample[part] for sample in samples] for part in (0, 1))
        stats, num_tokens = Stats.of(wall), step.num_tokens(0)
        figures = {
            "seconds": {
                "median": stats.median, "quartiles": [stats.low, stats.high], "rounds": stats.rounds,
                "cpu": statistics.median(cpu),
            },
            "peak_mib": peak,
            "pairs_per_second": step.shape.num_pairs / stats.median,
            "useful_tokens_per_second": step.shape.useful_tokens / stats.median,
            "processed_tokens": num_tokens,
            "processed_tokens_per_second": num_tokens / stats.median,
            "flops": step.flops,
            "matmul_share": step.flops / stats.median / self.matmul_flops,
            "checkpointing": step.checkpointing,
            "graphs": None if step.graphs is None else step.graphs.count,
        }  # fmt: skip
        return figures | (_profile(step) if profiled else {})


def _profile(step: TrainingStep) -> dict:
    """The profile, or why there is none: the figures stand without it."""
    try:
        return {"profile": profile_step(step)}
    except Exception as error:
        return {"profile_failed": describe(error)}


def rounds(seconds: float) -> Iterator[int]:
    """Numbers of rounds: MIN_ROUNDS at least, and up to MAX_ROUNDS while the seconds last."""
    end = time.monotonic() + seconds
    for number in range(MAX_ROUNDS):
        if number < MIN_ROUNDS or time.monotonic() < end:
            yield number


def timed(step: TrainingStep) -> tuple[float, float]:
    """Seconds by the clock, and of CPU time, of one step; it ends with a reading of the loss."""
    synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    step.step(0)
    synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def matmul_rate(model: str, device: str) -> float:
    """FLOPs per second of the best large matrix product, in the precision that the model computes in."""
    best, dtype = 0.0, torch.float32 if model == "small" else torch.bfloat16
    for rows, inner, columns in matmul_sizes(model):
        a = torch.randn(rows, inner, device=device, dtype=dtype)
        b = torch.randn(inner, columns, device=device, dtype=dtype)
        samples = []
        for _ in range(12):
            synchronize()
            start = time.perf_counter()
            a @ b
            synchronize()
            samples.append(time.perf_counter() - start)
        best = max(best, 2 * rows * inner * columns / statistics.median(samples[2:]))
    return best
