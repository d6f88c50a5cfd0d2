"""Measuring training steps: the gate, the rounds, memory, and the device's own matmul rate."""

import gc
import math
import statistics
import time
from dataclasses import asdict

import torch

from kernel_timing import MIB, Budget, RedGate, clean_memory, describe, synchronize
from measure import peak_mib as resident_peak_mib
from training_models import make_network, training_config
from training_shapes import TrainingShape, Variant
from training_variants import TrainingStep

ROUNDS = 5
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # float32
FP8_DECIBEL = 15  # of the whole gradient; each product has 20 or more
GATE_LAYERS = 4  # of a large model, so that a float32 copy and its gradients fit beside it
MATMUL_SIZES = ((8192, 8192, 8192), (16384, 3584, 18944))
VARIANT_RESERVE_SECONDS = 40  # a variant of a large model is not begun with less


class Measured:
    """What one run on one device has found.

    Attributes:
        model: small, 3B or 7B.
        device: cuda or cpu.
        matmul_flops: per second, the best of MATMUL_SIZES.
        entries: of the results file.
    """

    def __init__(self, model: str, seconds: float):
        self.model = model
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.budget = Budget(seconds)
        self.checkpointing = "none" if model == "small" else large_checkpointing()
        self.matmul_flops = matmul_rate(self.device, torch.float32 if model == "small" else torch.bfloat16)
        self.entries: list[dict] = []
        self.left_out: list[str] = []
        self._gate = Gate(model, self.device)
        self._verdicts: dict[str, str | None] = {}

    def make(self, variant: Variant, shape: TrainingShape) -> TrainingStep:
        """The variant's step, with a network of its own."""
        clean_memory()
        # Stock transformers knows no selective checkpointing: peers recompute whole layers.
        mode = "full" if variant.plain and self.checkpointing != "none" else self.checkpointing
        return TrainingStep(variant, make_network(self.model, self.device), training_config(self.model, mode), shape)

    def measure(self, shape: TrainingShape, variants: list[Variant], kind: str) -> dict:
        """Gate and time the variants on one shape; the entry is kept in `entries`.

        Args:
            kind: main, or features for variants that lack one.
        """
        found: dict[str, dict] = {variant.name: {"failed": None} for variant in variants}
        for variant in variants:
            found[variant.name]["failed"] = self._check(variant)
        if self.model == "small":
            self._interleaved(shape, variants, found)
        else:
            self._one_by_one(shape, variants, found)
        entry = {"kind": kind, "model": self.model, "name": shape.name, "shape": asdict(shape), "variants": found}
        self.entries.append(entry)
        return entry

    def _check(self, variant: Variant) -> str | None:
        """None, or why the variant's loss or gradient is wrong; once for a variant, on a small shape."""
        if variant.name not in self._verdicts:
            self._verdicts[variant.name] = None
            try:
                self._gate.check(variant)
            except Exception as error:
                self._verdicts[variant.name] = describe(error)
            gc.collect()
        return self._verdicts[variant.name]

    def _interleaved(self, shape, variants, found) -> None:
        """All variants in memory, in turns, so that a slow phase of the machine falls on all."""
        steps = {v.name: self.make(v, shape) for v in variants if found[v.name]["failed"] is None}
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
        for number in range(ROUNDS + 1):
            for name, step in steps.items():
                seconds[name].append(timed(step, number))
        for name, step in steps.items():
            peak = resident_peak_mib(lambda step=step: step.step(0))
            found[name] |= self._figures(step, seconds[name][1:], peak)

    def _one_by_one(self, shape, variants, found) -> None:
        """One model in memory at a time."""
        for variant in variants:
            if found[variant.name]["failed"] is None and self.budget.left < VARIANT_RESERVE_SECONDS:
                found[variant.name]["failed"] = "left out: out of time"
                self.left_out.append(f"{shape.name}, {variant.name}: out of time")
            if found[variant.name]["failed"] is not None:
                continue
            try:
                step = self.make(variant, shape)
                timed(step, 0)  # compiles
                timed(step, 0)
                torch.cuda.reset_peak_memory_stats()
                seconds = [timed(step, number) for number in range(ROUNDS)]
                peak = torch.cuda.max_memory_allocated() / MIB
                found[variant.name] |= self._figures(step, seconds, peak)
            except Exception as error:
                found[variant.name]["failed"] = describe(error)
            step = None

    def _figures(self, step: TrainingStep, seconds: list[tuple[float, float]], peak: float | None) -> dict:
        wall, cpu = ([sample[part] for sample in seconds] for part in (0, 1))
        low, median, high = statistics.quantiles(wall, n=4, method="inclusive")
        return {
            "seconds": {"median": median, "quartiles": [low, high], "rounds": len(wall), "cpu": statistics.median(cpu)},
            "peak_mib": peak,
            "pairs_per_second": step.shape.num_pairs / median,
            "useful_tokens_per_second": step.shape.useful_tokens / median,
            "processed_tokens": step.num_tokens(0),
            "flops": step.flops,
            "matmul_share": step.flops / median / self.matmul_flops,
            "graphs": None if step.graphs is None else step.graphs.count,
        }


def timed(step: TrainingStep, number: int) -> tuple[float, float]:
    """Seconds by the clock, and of CPU time, of one step; it ends with a reading of the loss."""
    synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    step.step(number)
    synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


class Gate:
    """Loss and gradient of a variant against the plain trainer in float32, on two small groups.

    In float32 the two agree to rounding. In bf16 the error is at most twice that of the plain trainer in
    bf16. In FP8 the gradient's signal stands FP8_DECIBEL above its error.
    """

    def __init__(self, model: str, device: str):
        self.model, self.device = model, device
        self.shape = TrainingShape(2, 2, 300 if model == "small" else 640, 300)
        plain = Variant("plain", plain=True, fuse=False, kernels="eager")
        self.loss, self.truth = self._gradients(plain, exact=True)
        self.loss_error, self.error = LOSS_TOLERANCE * self.loss, GRADIENT_TOLERANCE
        if model != "small":
            loss, gradients = self._gradients(plain)
            # The loss is one number, and can be exact by luck: a rounding of bf16 is allowed besides.
            self.loss_error = 2 * (abs(loss - self.loss) + torch.finfo(torch.bfloat16).eps * self.loss)
            self.error = 2 * self._distance(gradients)

    def check(self, variant: Variant) -> None:
        """Raises RedGate if the variant computes something else."""
        if abs(self.loss - math.log(2)) < 0.01:
            raise RedGate(f"loss {self.loss:.4f} says nothing: it is that of equal rewards")
        loss_error, allowed = self.loss_error, self.error
        if variant.fp8 != "off":
            loss_error, allowed = 0.1 * self.loss, 10 ** (-FP8_DECIBEL / 20)
        loss, gradients = self._gradients(variant)
        if not abs(loss - self.loss) <= loss_error:  # true for NaN as well
            raise RedGate(f"loss {loss:.6f}, wanted {self.loss:.6f} within {loss_error:.1e}")
        if gradients.keys() != self.truth.keys():
            raise RedGate(f"gradients of one variant only: {sorted(gradients.keys() ^ self.truth.keys())[:3]}")
        error = self._distance(gradients)
        if not error <= allowed:
            raise RedGate(f"gradient: relative error {error:.2e}, wanted at most {allowed:.2e}")

    def _gradients(self, variant: Variant, exact: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
        settings = {"precision": {"dtype": "fp32", "weights": "fp32"}} if exact else None
        config = training_config(self.model, "none", settings)
        network = make_network(self.model, self.device, None if self.model == "small" else GATE_LAYERS)
        if self.model != "small":
            for parameter in network.score.parameters():
                # Rewards of about 1: with rewards near 0 the loss is log 2, whatever the model does.
                parameter.data.mul_(3.0)
        return TrainingStep(variant, network, config, self.shape).gradients(0)

    def _distance(self, gradients: dict[str, torch.Tensor]) -> float:
        """Norm of the difference from the truth, over the norm of the truth."""
        error = sum(float((gradients[name] - truth).double().square().sum()) for name, truth in self.truth.items())
        return math.sqrt(error / sum(float(truth.double().square().sum()) for truth in self.truth.values()))


def large_checkpointing() -> str:
    """What the GPU has room for: `fastrm plan` puts the 7B at 113 GiB with selective checkpointing here."""
    total = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    return "selective" if total >= 120 * 2**30 else "full"


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOPs per second of the device's best large matrix product."""
    best = 0.0
    for rows, inner, columns in MATMUL_SIZES if device == "cuda" else ((2048, 2048, 2048),):
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
