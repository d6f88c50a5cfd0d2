"""The settings of a training run's model, with what the files of model.path say of its reward head."""

from dataclasses import replace

from fastrm.config import Config, ModelConfig
from fastrm.data.tokenizer import load_tokenizer
from fastrm.errors import ConfigError
from fastrm.model.loading import has_weights, open_backbone, shortened
from fastrm.model.stored_head import find_head


def adopt(settings: ModelConfig) -> tuple[ModelConfig, str]:
    """Complete a run's settings of the model by the head in the files of model.path; return them with a line about it.

    The line is empty for a backbone, for an export, and for random weights. No weight is read.

    Raises:
        ConfigError: if settings contradict the files, or as `find_head`.
        StorageError: as `open_backbone` and `find_head`.
    """
    if settings.path is None:
        return settings, ""
    opened = open_backbone(settings.path)
    if settings.head.new:
        lost = f"; left out on purpose: {shortened(opened.rest, 8)}" if opened.rest else ""
        return settings, f"head: new, {settings.head.layers} layers{lost}" if lost else ""
    tokenizer = load_tokenizer(settings.tokenizer or opened.place.tokenizer)
    found = find_head(opened, tokenizer, settings)
    if found is None:
        return settings, ""
    wanted = {
        **{name: getattr(found.head, name) for name in ("layers", "bias")},
        **({"activation": found.head.activation} if found.head.layers > 1 else {}),
    }
    _check_agreement(settings, "head.", settings.head, wanted)
    places = {"anchor": found.anchor, "pooling": found.pooling}
    _check_agreement(settings, "", settings, {name: value for name, value in places.items() if value is not None})
    found = replace(found, anchor=found.anchor or settings.anchor, pooling=found.pooling or settings.pooling)
    adopted = settings.model_copy(update={"head": found.head, "anchor": found.anchor, "pooling": found.pooling})
    return adopted, "" if found.is_export else found.describe()


def adopt_for(config: Config) -> tuple[Config, str]:
    """Apply `adopt` to a configuration with model.path, as its paradigm has it: a judge takes no head.

    Raises:
        ConfigError, StorageError: as `adopt`, or for a critic on a model whose head reads means.
    """
    if config.paradigm == "judge" and config.model.path is not None:
        rest = open_backbone(config.model.path).rest
        return config, f"left out, since a judge has no reward head: {shortened(rest, 8)}" if rest else ""
    settings, line = adopt(config.model)
    if config.paradigm != "reward" and settings.pooling != "anchor":
        raise ConfigError(
            f"paradigm {config.paradigm}: the head in {settings.path} reads the mean over all tokens, a critic's the "
            "last one; set model.head: new"
        )
    return config.model_copy(update={"model": settings}), line


def adopt_what_is_here(config: Config) -> tuple[Config, str]:
    """Apply `adopt` to a whole configuration if model.path is a folder with weights; else return it unchanged.

    Raises:
        ConfigError, StorageError: as `adopt`.
    """
    if config.model.path is None or not has_weights(config.model.path):
        return config, ""
    return adopt_for(config)


def _check_agreement(settings: ModelConfig, prefix: str, section, wanted: dict) -> None:
    """Refuse settings that contradict the files; settings that are not given are taken from the files."""
    if prefix and "head" not in settings.model_fields_set:
        return
    for name, value in wanted.items():
        if name in section.model_fields_set and (got := getattr(section, name)) != value:
            raise ConfigError(
                f"model.{prefix}{name}: got {got!r}, but the reward head in {settings.path} has {value!r}; remove the "
                "key, or set model.head: new to train a new head in its place"
            )
