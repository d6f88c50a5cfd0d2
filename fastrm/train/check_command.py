"""The command `fastrm data check`: pages about data files or a configuration's sources, and the exit code."""

import os
from collections.abc import Sequence

from fastrm.config import Config, ModelConfig, load_config
from fastrm.data.check import SourceCheck, check_source
from fastrm.data.check_page import print_page
from fastrm.data.paradigm import reading_of
from fastrm.data.prepared.units import open_source
from fastrm.data.sources.columns import understood
from fastrm.data.template import ConversationEncoder
from fastrm.data_config import SourceConfig
from fastrm.errors import ConfigError, DataError
from fastrm.limits import MediaLimits
from fastrm.train.encoder import find_backbone_config, make_data_encoder, make_tokenizer
from fastrm.ui import Display, make_console
from fastrm.yaml_files import validate

_CONFIG_SUFFIXES = (".yaml", ".yml")


def check_data(
    names: Sequence[str],
    *,
    model: str | None = None,
    reading: dict | None = None,
    scoring: bool = False,
    max_refused: str = "1%",
    num_workers: int | None = None,
) -> list[SourceCheck]:
    """Print a page about every source.

    Args:
        names: data files and folders as `path` of a source takes them, or configurations (.yaml), of which all
            sources are checked under their own settings.
        model: folder or hub id whose tokenizer reads every row and renders the first. Default: model.path of a
            configuration.
        reading: further settings of the sources that are no configurations, as `SourceConfig` names them.
        scoring: rows need no preference.
        max_refused: the share of rows, as ``1%`` or ``0.01``, that may be refused.

    Returns:
        what was found, in the order of the sources.

    Raises:
        ConfigError: an option cannot be what it is.
        DataError: a source cannot be read at all, or more of its rows are refused.
    """
    limit, console = _share(max_refused), make_console()
    checked, too_many, empty = [], [], []
    for name, source, config in listed_sources(names, reading or {}):
        encoder = encoder_of(config, model)
        with Display() as display:
            reading = None if config is None else reading_of(config)
            for line in filter(None, map(understood, open_source(source, reading))):
                display.say(line)
            found = check_source(
                source, MediaLimits() if config is None else config.data.limits, encoder,
                reading=reading, require_preferences=not scoring, progress=display.task("reading rows"),
                num_workers=num_workers or len(os.sched_getaffinity(0)),
            )  # fmt: skip
        print_page(console, name, found, encoder, MediaLimits() if config is None else config.data.limits)
        checked.append(found)
        if not found.num_rows:
            empty.append(f"{name} has no rows")
        elif found.num_refused > limit * found.num_rows:
            too_many.append(f"{found.num_refused:,} of {found.num_rows:,} rows of {name} are refused")
    faults = []
    if too_many:
        refused = "; ".join(too_many)
        faults.append(f"{refused}: more than --max-refused {max_refused}; mend the rows, or raise the share")
    if empty:
        faults.append(f"{'; '.join(empty)}; name a file with rows")
    if faults:
        raise DataError("; ".join(faults))
    return checked


def listed_sources(names: Sequence[str], reading: dict) -> list[tuple[str, SourceConfig, Config | None]]:
    """Return (name in messages, source, its configuration) for every source that is named."""
    found: list[tuple[str, SourceConfig, Config | None]] = []
    for name in names:
        if not name.lower().endswith(_CONFIG_SUFFIXES):
            found.append((name, validate(SourceConfig, {"path": name, **reading}, {}, "data check"), None))
            continue
        config = load_config(name, [])
        for split in ("train", "eval"):
            for place, source in config.data.sources(split).items():
                found.append((f"{place}: {source.name or source.set or source.path}", source, config))
    return found


def encoder_of(config: Config | None, model: str | None) -> ConversationEncoder | None:
    """Return the encoder that reads the rows as a model does; None: the first row is shown as turns."""
    if model is None and (config is None or config.model.path is None):
        return None
    if config is None:
        config = Config(model=ModelConfig(path=model))
    elif model is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": model, "tokenizer": None})})
    return make_data_encoder(config, find_backbone_config(config.model), make_tokenizer(config))


def _share(text: str) -> float:
    """Return the number that ``1%`` or ``0.01`` stands for; a bare 1 may be meant as 1 % or as all, and is refused."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0.0 <= share <= 1.0 or (share == 1.0 and not text.endswith("%")):
        raise ConfigError(f"--max-refused: got {text!r}, wanted a share such as 1% or 0.01; 100% stands for all rows")
    return share
