"""Ways to run a configuration, and the memory that each takes."""

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

    Several processes store only float32, and nothing in NF4.
    """
    if num_gpus > 1 and config.model.quantize is not None:
        return []
    if num_gpus > 1:
        return [Way({"engine.zero_stage": stage}, num_gpus) for stage in (1, 2, 3)]
    exact = "auto" if config.precision.weights == "auto" else "fp32"
    is_open = config.precision.dtype == "bf16" and config.model.quantize is None
    weights = (exact, "bf16") if is_open else (exact,)
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
