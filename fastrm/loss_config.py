"""The sections of the configuration that say what a step computes: the loss, and the optimizer with its rates."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fastrm.sections import Fraction, Positive, Section


class LossConfig(Section):
    """The training objective.

    `loss` and, on held-out data, `eval/loss` in metrics.jsonl are this objective with all that is set here, so that
    one run's two curves can be compared; runs of different settings are compared by accuracy.
    """

    kind: Literal["bradley_terry", "hinge", "plackett_luce", "mse", "cross_entropy"] = "bradley_terry"
    """bradley_terry: -log sigmoid of the difference of rewards, for each preference; hinge: how much the difference is
    below 1; plackett_luce: the log-likelihood of each prompt's whole ranking; mse: squared difference of a reward and
    its response's rating (sources with pairs: ratings); cross_entropy: that of the tokens of a judge's texts (paradigm:
    judge, of which it is the default). The formulas are in fastrm/model/losses.py."""
    center: Annotated[float, Field(ge=0.0)] = 0.0
    """The coefficient of mean((r_w + r_l)^2), the zero-coefficient regulariser: an ablation in the paper."""
    length_normalization: bool = False
    """Divide each reward by log(response tokens + 1) before the loss. An ablation in the paper."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """The probability that a preference label is flipped."""
    ties: Literal["ignore", "half"] = "ignore"
    """The treatment of ties: ignore leaves them out; half makes each two opposite preferences of half weight."""

    @property
    def eval_figures(self) -> tuple[str, ...]:
        """The figures of an evaluation that are always defined, after `eval/` in metrics.jsonl."""
        return {"mse": ("loss", "mse"), "cross_entropy": ("loss",)}.get(self.kind, ("accuracy", "loss", "margin"))

    @property
    def is_rating(self) -> bool:
        """True if it is of ratings of single responses, and not of preferences."""
        return self.kind == "mse"

    @model_validator(mode="after")
    def _check(self):
        others = {
            "bradley_terry": (),
            "hinge": ("label_smoothing",),
            "plackett_luce": ("label_smoothing", "center", "ties"),
            "mse": ("label_smoothing", "center", "ties", "length_normalization"),
            "cross_entropy": ("label_smoothing", "center", "ties", "length_normalization"),
        }
        for name in others[self.kind]:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"loss.{name} is no part of loss.kind {self.kind}; leave it out, or set another kind")
        return self


class OptimConfig(Section):
    """The optimizer AdamW, its learning rate, and the size of a step."""

    lr: Annotated[float, Field(gt=0.0)] = 3e-6
    """The peak learning rate of AdamW. The default is the paper's best of 1e-5, 3e-6, 1e-6 and 3e-7."""
    betas: Annotated[list[Annotated[float, Field(ge=0.0, lt=1.0)]], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """AdamW's decay rates of the first and the second moment; the defaults are AdamW's usual ones."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """AdamW's eps, which is added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """The decay of weight matrices, as in AdamW; biases, norms and embeddings have none."""
    lr_parts: dict[Literal["vision", "projector", "language", "head"], Annotated[float, Field(gt=0.0)]] = {}
    """Peak learning rates of parts, in place of lr, as {head: 1e-4, vision: 1e-6}: the parts of model.freeze, and the
    head. All follow one schedule."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """The learning rate after warm-up: down to min_lr_ratio * lr by half a cosine or a line; wsd (warm-up, stable,
    decay) = constant, then half a cosine down over the last decay_ratio of all steps; or constant."""
    warmup_ratio: Fraction = 0.1
    """The share of all steps over which the rate rises linearly from 0."""
    min_lr_ratio: Fraction = 0.0
    """The rate after the last step, as a share of lr (cosine, linear, wsd)."""
    decay_ratio: Fraction = 0.1
    """The share of all steps over which wsd decays, at the end."""
    max_grad_norm: Annotated[float, Field(ge=0.0)] = 1.0
    """The global gradient norm above which a step's gradient is scaled down to it; 0 = never."""
    batch_pairs: Positive = 128
    """Preferences of a step, over all ranks: it takes whole groups until it has so many. The paper has 128."""
    group_weight: Literal["preference", "group"] = "preference"
    """The weight of a preference. preference: each counts 1. group: each group counts 1, shared by its preferences."""
    tokens_per_pack: Positive = 32768
    """The token budget of one forward pass. It bounds the memory; the gradient of a step does not depend on it."""
    states: Literal["fp32", "8bit"] = "fp32"
    """The storage of AdamW's two moments: float32, or for the backbone's matrices torchao's 8-bit code."""

    @model_validator(mode="after")
    def _check(self):
        if self.schedule == "wsd" and self.warmup_ratio + self.decay_ratio > 1.0:
            raise ValueError(
                f"optim.warmup_ratio {self.warmup_ratio} and optim.decay_ratio {self.decay_ratio} are more than all "
                "steps together; lower one of them"
            )
        return self
