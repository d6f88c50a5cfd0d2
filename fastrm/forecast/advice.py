"""Ways to run a configuration: those that fit a GPU, and the changes that help if the configured one does not."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastrm.config import Config
from fastrm.forecast.memory import PeakMemory
from fastrm.ui import gib, gpus


@dataclass(frozen=True)
class Way:
    """A way to run: settings of the training state on a number of GPUs.

    Attributes:
        settings: configuration key -> value.
    """

    settings: dict[str, str | int]
    num_gpus: int

    @property
    def label(self) -> str:
        """The name of the way in a table."""
        named = ", ".join(f"{key}: {value}" for key, value in self.settings.items())
        return f"{gpus(self.num_gpus)}, {named}"

    def config(self, config: Config, checkpointing: str) -> Config:
        """Return the configuration in this way, with another activation checkpointing."""
        return with_settings(config, {**self.settings, "model.activation_checkpointing": checkpointing})


@dataclass(frozen=True)
class Fit:
    """The peak memory of one way to run with one kind of activation checkpointing."""

    way: Way
    checkpointing: str
    peak: PeakMemory

    @property
    def text(self) -> str:
        """The settings and the peak memory, in words."""
        return f"{self.way.label}, model.activation_checkpointing: {self.checkpointing}: {gib(self.peak.total)} GiB"


def ways(config: Config, num_gpus: int) -> list[Way]:
    """Return all ways on this number of GPUs: the formats that one process stores, or the stages of ZeRO.

    Several processes store only float32.
    """
    if num_gpus > 1:
        return [Way({"engine.zero_stage": stage}, num_gpus) for stage in (1, 2, 3)]
    exact = "auto" if config.precision.weights == "auto" else "fp32"
    weights = (exact, "bf16") if config.precision.dtype == "bf16" else (exact,)
    return [
        Way({"precision.weights": weight, "optim.states": states}, 1)
        for weight in weights
        for states in ("fp32", "8bit")
    ]


def with_settings(config: Config, settings: dict[str, str | int]) -> Config:
    """Return the configuration with other values for `section.key` names, validated again."""
    tree = config.model_dump()
    for key, value in settings.items():
        section, name = key.split(".")
        tree[section][name] = value
    return Config.model_validate(tree)


def advise(
    config: Config, num_gpus: int, peak: PeakMemory, fits: Sequence[Fit], usable: int, largest_pack: int | None
) -> list[str]:
    """Return sentences: whether the configured way fits a GPU's usable bytes, and if not, the least changes that do.

    Args:
        peak: of the configured way.
        largest_pack: tokens of the largest pack that fits in the configured way; None if none does.
    """
    needed = f"{gib(peak.total)} GiB of {gib(usable)} GiB"
    if peak.total <= usable:
        return [f"fits: {needed}.", *_lighter(config, num_gpus, fits, usable)]
    lines = [f"does not fit: {needed}, at its fullest in: {peak.when}."]
    if largest_pack is not None:
        lines.append(f"optim.tokens_per_pack and data.max_tokens_per_group: {largest_pack} would fit.")
    mode = config.model.activation_checkpointing
    possible = [fit for fit in fits if fit.peak.total <= usable]
    # First the fits that recompute no more than they must, on as many GPUs as were asked for.
    possible.sort(key=lambda fit: (fit.way.num_gpus != num_gpus, fit.checkpointing != mode, fit.peak.total))
    seen: set[str] = set()
    for fit in possible:
        if fit.way.label not in seen:
            seen.add(fit.way.label)
            lines.append(f"fits: {fit.text}.")
    if not possible:
        lines.append("no other way fits packs of this size either: smaller packs, or a GPU with more memory.")
    return lines


def _lighter(config: Config, num_gpus: int, fits: Sequence[Fit], usable: int) -> list[str]:
    """Return sentences on a mode of checkpointing that recomputes less and fits as well."""
    costs = {"none": 0, "selective": 1, "full": 2}
    mode = config.model.activation_checkpointing
    tree = config.model_dump()
    for fit in sorted(fits, key=lambda fit: costs[fit.checkpointing]):
        same = fit.way.num_gpus == num_gpus and all(
            tree[key.split(".")[0]][key.split(".")[1]] == value for key, value in fit.way.settings.items()
        )
        if same and costs[fit.checkpointing] < costs[mode] and fit.peak.total <= usable:
            text = f"model.activation_checkpointing: {fit.checkpointing} fits too ({gib(fit.peak.total)} GiB)"
            return [f"{text} and computes less again."]
    return []
