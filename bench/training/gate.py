"""The gate of the training-step benchmark: no speed figure for a variant that computes something else."""

import math

import torch

from bench.harness.gate import GRADIENT_TOLERANCE, LOSS_TOLERANCE, RedGate
from bench.training.models import checkpointing_modes, make_network, training_config
from bench.training.shapes import PLAIN, TrainingShape, Variant
from bench.training.variants import CompiledLayers, TrainingStep

LAYERS = 3  # layers of a large model and its tower: enough for every kind of layer, and quick in float32
FLOAT32, BF16 = ({"precision": {"dtype": dtype, "weights": dtype}} for dtype in ("fp32", "bf16"))
# Rounding of a product's operands: three bits of mantissa in FP8 e4m3, seven in bf16.
FP8_ROUNDING, BF16_ROUNDING = (torch.finfo(dtype).eps for dtype in (torch.float8_e4m3fn, torch.bfloat16))


class Gate:
    """Loss and gradient of a variant against the plain trainer in float32, on two small groups.

    In float32 the two agree to rounding. In bf16 the error is at most twice that of the plain trainer in
    bf16; in FP8 at most twice that times 16, by which FP8 rounds more coarsely. So a model that amplifies
    roundings is not taken for a wrong variant, nor is a wrong variant excused by its dtype.

    Args:
        model: small, 3B or 7B.
        device: cuda or cpu.
    """

    def __init__(self, model: str, device: str):
        self._model, self._device = model, device
        self._shape = TrainingShape(2, 2, 300 if model == "small" else 640, 300)
        self._loss, truth = self._gradients(PLAIN, FLOAT32)
        if abs(self._loss - math.log(2)) < 0.01:
            raise RedGate(f"loss {self._loss:.4f} says nothing: it is that of equal rewards")
        # Kept outside of the memory that variants are measured in.
        self._truth = {name: gradient.cpu() for name, gradient in truth.items()}
        del truth
        loss, gradients = self._gradients(PLAIN, BF16)
        self._bf16_loss_error, self._bf16_error = abs(loss - self._loss), self._distance(gradients)

    def check(self, variant: Variant, compiled: CompiledLayers | None = None) -> float:
        """Return the norm of the gradient's error over the gradient's norm, on the gate's groups.

        Args:
            compiled: what compiles the layers, if the variant does; by default its own.

        Raises:
            RedGate: if the variant computes something else.
        """
        loss_error, allowed = self._limits(variant)
        loss, gradients = self._gradients(variant, compiled=compiled)
        if not abs(loss - self._loss) <= loss_error:  # true for NaN as well
            raise RedGate(f"loss {loss:.6f}, wanted {self._loss:.6f} within {loss_error:.1e}")
        if gradients.keys() != self._truth.keys():
            raise RedGate(f"gradients of one variant only: {sorted(gradients.keys() ^ self._truth.keys())[:3]}")
        error = self._distance(gradients)
        if not error <= allowed:
            raise RedGate(f"gradient: relative error {error:.2e}, wanted at most {allowed:.2e}")
        return error

    def _limits(self, variant: Variant) -> tuple[float, float]:
        """Return the largest allowed errors of loss and gradient."""
        if variant.fp8 == "off" and self._model == "small":
            return LOSS_TOLERANCE * self._loss, GRADIENT_TOLERANCE
        rounding = BF16_ROUNDING if variant.fp8 == "off" else FP8_ROUNDING
        coarser = rounding / BF16_ROUNDING
        # The loss is one number, and can be exact by luck: a rounding is allowed in addition.
        return 2 * (coarser * self._bf16_loss_error + rounding * self._loss), 2 * coarser * self._bf16_error

    def _gradients(
        self, variant: Variant, settings: dict | None = None, compiled: CompiledLayers | None = None
    ) -> tuple[float, dict[str, torch.Tensor]]:
        network = make_network(self._model, self._device, None if self._model == "small" else LAYERS)
        if self._model != "small":
            for parameter in network.score.parameters():
                # Rewards of about 1: with rewards near 0 the loss is log 2, whatever the model does.
                parameter.data.mul_(3.0)
        # The same recomputation as when it is timed.
        config = training_config(self._model, checkpointing_modes(self._model, variant.plain)[0], settings)
        return TrainingStep(variant, network, config, self._shape, compiled or CompiledLayers()).gradients(0)

    def _distance(self, gradients: dict[str, torch.Tensor]) -> float:
        """Return the norm of the difference from the truth over the norm of the truth."""
        error = norm = 0.0
        for name, truth in self._truth.items():
            truth = truth.to(self._device)
            error += float((gradients[name] - truth).double().square().sum())
            norm += float(truth.double().square().sum())
        return math.sqrt(error / norm)
