"""The configuration of a model that writes: the weights of its texts, and the prompt that an export keeps."""

from typing import Any

from fastrm.config import Config
from fastrm.data.template import TurnLoss
from fastrm.paradigm_config import section_of
from fastrm.prompts.spec import load_spec

# Settings of a SPEC that name other models; the export is both itself.
_OF_OTHERS = {"generator", "scorer"}
# Those by which an export is evaluated, and of which nothing is learnt: a judge's training has an order of its own.
_OF_EVALUATION = {"decoding", "votes", "order"}


def turn_loss_of(config: Config) -> TurnLoss | None:
    """Return how tokens that the model writes weigh; None for a model that writes nothing."""
    if (section := section_of(config)) is None:
        return None
    return TurnLoss(per_token=True) if config.paradigm == "judge" else TurnLoss(False, section.lm_weight)


def writer_of(config: Config) -> dict[str, Any] | None:
    """Return the paradigm of a model that writes, as the config.json of its export states it: its kind and SPEC.

    `fastrm eval` has the export write by that SPEC.

    Raises:
        ConfigError: for a SPEC that cannot be used.
    """
    if (section := section_of(config)) is None:
        return None
    spec = load_spec(section.spec).model_dump(mode="json", exclude_defaults=True, exclude=_OF_OTHERS)
    return {"kind": config.paradigm, "spec": spec}


def learnt_from(writer: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what training depends on of what `writer_of` returns."""
    if writer is None:
        return None
    return writer | {"spec": {key: value for key, value in writer["spec"].items() if key not in _OF_EVALUATION}}
