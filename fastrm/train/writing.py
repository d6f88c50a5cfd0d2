"""The configuration of a model that writes: the weights of its texts, and the prompt that an export keeps."""

from typing import Any

from fastrm.config import Config
from fastrm.data.template import TurnLoss
from fastrm.paradigm_config import section_of
from fastrm.prompts.spec import load_spec

# Settings of a SPEC that say where and how texts are generated, and not what a model learns.
_OF_WRITING = {"generator", "decoding", "votes", "scorer"}


def turn_loss_of(config: Config) -> TurnLoss | None:
    """Return how tokens that the model writes weigh; None for a model that writes nothing."""
    if (section := section_of(config)) is None:
        return None
    return TurnLoss(per_token=True) if config.paradigm == "judge" else TurnLoss(False, section.lm_weight)


def writer_of(config: Config) -> dict[str, Any] | None:
    """Return the paradigm of a model that writes, as the config.json of its export states it: its kind and SPEC.

    Raises:
        ConfigError: for a SPEC that cannot be used.
    """
    if (section := section_of(config)) is None:
        return None
    spec = load_spec(section.spec).model_dump(mode="json", exclude_defaults=True, exclude=_OF_WRITING)
    return {"kind": config.paradigm, "spec": spec}
