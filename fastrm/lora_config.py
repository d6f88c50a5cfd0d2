"""The typed, checked section `model.lora`."""

from typing import Annotated, Any, Literal

from pydantic import Field

from fastrm.sections import NonEmpty, Positive, Section


class LoraConfig(Section):
    """Low-rank adapters on linear layers of a frozen backbone (LoRA, Hu et al., arXiv 2106.09685), made by PEFT."""

    rank: Positive = 16
    """The rank of each adapter: a layer of N x K trains rank * (N + K) numbers."""
    alpha: Annotated[float, Field(gt=0.0)] | None = None
    """An adapter's output is multiplied by alpha / rank. Default: 2 * rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """The probability with which an element of an adapter's input is 0 in training. Above 0, a step's gradient depends
    on how it is cut into packs."""
    targets: Literal["all-linear"] | Annotated[list[NonEmpty], Field(min_length=1)] = "all-linear"
    """The layers that get an adapter: all-linear = every linear layer of the language model's layers; or the ends of
    their names, as [q_proj, v_proj]."""
    vision: bool = False
    """Choose among the linear layers of the vision tower and its projector as well."""
    dora: bool = False
    """Train the length of each row of a weight besides (DoRA, Liu et al., arXiv 2402.09353)."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (Kalajdzievski, arXiv 2312.03732)."""

    @property
    def alpha_or_default(self) -> float:
        """The alpha that is used."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


def check_lora(model: Any) -> None:
    """Check the model section's `lora` and `quantize` beside its other keys.

    Raises:
        ValueError: naming the keys that contradict each other.
    """
    lora = model.lora
    if lora is None:
        if model.quantize is not None:
            raise ValueError(
                f"model.quantize {model.quantize} without model.lora: rounded weights cannot be trained; add "
                "model.lora: {} to train adapters on them, or remove model.quantize"
            )
        return
    if lora.dora and model.quantize is not None:
        raise ValueError(
            f"model.lora.dora with model.quantize {model.quantize}: DoRA reads whole weights in every step; remove one"
        )
    if model.path is None:
        raise ValueError("model.lora needs model.path: an adapter belongs to a base model whose weights are in files")
    if model.fuse_projections:
        raise ValueError(
            "model.fuse_projections with model.lora: each layer has an adapter of its own; set model.fuse_projections: "
            "false"
        )
    trained = {"language"} | ({"vision", "projector"} if lora.vision else set())
    if clash := sorted(trained & set(model.freeze)):
        raise ValueError(
            f"model.freeze {clash[0]} with adapters on it: model.lora freezes the backbone's own weights by itself; "
            f"remove {clash[0]} from model.freeze"
        )
