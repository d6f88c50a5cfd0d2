"""The sections of the configuration for models that write: critics and judges."""

from typing import Annotated, Any, Literal

from pydantic import Field

from fastrm.sections import NonEmpty, NonNegative, Section

Paradigm = Literal["reward", "critic", "judge"]


class CriticConfig(Section):
    """A critic writes a critique of a response; its reward is read behind the critique (MM-RLHF, arXiv 2502.10391).

    It trains on critiques that rows hold, such as `chosen_reason` and `rejected_reason`.
    """

    spec: NonEmpty = "mm_rlhf_reward"
    """The prompt that asks for a critique of one response: a shipped SPEC of kind critic, or the path of one
    (docs/judges.md)."""
    lm_weight: Annotated[float, Field(ge=0.0)] = 1.0
    """The factor of the critiques' loss beside that of the preferences: for each preference the mean cross entropy of
    the tokens of its two critiques, added."""
    missing: Literal["refuse", "empty"] = "refuse"
    """Rows without a critique: refuse names them in the quarantine; empty trains on their preference behind an empty
    critique, which adds nothing to the critiques' loss."""


class JudgeConfig(Section):
    """A judge reads two responses and writes which one is better. It trains on such texts, and has no reward head."""

    spec: NonEmpty = "r1_reward"
    """The prompt, and the form of the verdict: a shipped SPEC of kind pairwise, or the path of one (docs/judges.md)."""
    order: Literal["random", "both"] = "random"
    """The order in which two responses are shown: random, by the seed and the row; or both, one text each."""
    seed: NonNegative = 0
    """The seed of random orders."""


def section_of(config: Any) -> CriticConfig | JudgeConfig | None:
    """Return the section of a configuration's paradigm, with its defaults where it has none; None for reward."""
    if config.paradigm == "reward":
        return None
    return getattr(config, config.paradigm) or {"critic": CriticConfig, "judge": JudgeConfig}[config.paradigm]()


def with_loss(tree: Any) -> Any:
    """Return the raw values of a configuration with the loss of its paradigm, where they name none."""
    if isinstance(tree, dict) and tree.get("paradigm") == "judge" and isinstance(tree.get("loss", {}), dict):
        return tree | {"loss": {"kind": "cross_entropy"} | tree.get("loss", {})}
    return tree


def check_paradigm(config: Any) -> None:
    """Check `paradigm` and the sections that belong to it.

    Raises:
        ValueError: naming the keys that contradict each other.
    """
    for name in ("critic", "judge"):
        if getattr(config, name) is not None and config.paradigm != name:
            raise ValueError(f"{name}: is for paradigm: {name}, got paradigm: {config.paradigm}; set one of them")
    if (config.loss.kind == "cross_entropy") != (config.paradigm == "judge"):
        raise ValueError(
            f"loss.kind {config.loss.kind} with paradigm {config.paradigm}: cross_entropy is the loss of paradigm "
            "judge, and its only one; leave loss.kind out"
        )
    if config.paradigm == "reward":
        return
    model = config.model
    if model.pooling != "anchor":
        raise ValueError(f"paradigm {config.paradigm} with model.pooling {model.pooling}; set model.pooling: anchor")
    if config.loss.length_normalization:
        raise ValueError(f"paradigm {config.paradigm} with loss.length_normalization; remove it")
    if config.paradigm == "judge" and model.anchor != "last_token":
        raise ValueError(f"paradigm judge with model.anchor {model.anchor}: it reads no reward; remove model.anchor")
    has_head = config.model.head != type(config.model.head)() or "head" in config.optim.lr_parts
    if config.paradigm == "judge" and has_head:
        raise ValueError("paradigm judge has no reward head; remove model.head, and head from optim.lr_parts")
    sources = {**config.data.sources("train"), **config.data.sources("eval")}
    for place, source in sources.items() if config.paradigm == "judge" else ():
        if source.margin is not None:
            raise ValueError(f"{place}.margin with paradigm judge, which has no rewards; remove it")
    if config.paradigm == "critic" and config.loss.kind != "bradley_terry":
        raise ValueError(f"paradigm critic with loss.kind {config.loss.kind}; set loss.kind: bradley_terry")
