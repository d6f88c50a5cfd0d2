"""The date of a chat template that reads the clock, fixed once for a run, on the day of its first start."""

import datetime
from collections.abc import Callable
from pathlib import Path

from fastrm.config import Config, TrainedTokenizer
from fastrm.data.clock import reads_clock, today
from fastrm.data.prepared.stored import read_manifest
from fastrm.data.tokenizer import load_tokenizer
from fastrm.errors import ConfigError
from fastrm.model.export import kept_date
from fastrm.model.places import locate
from fastrm.yaml_files import read_yaml


def fix_date(config: Config, folder: Path, say: Callable[[str], None] = lambda text: None) -> Config:
    """Return the configuration with `model.template_date` set, if the chat template reads the clock.

    If it is not set, it is the date of the run that is in run.dir already, of the prepared set, of the reward model
    that is trained further, or today.

    Args:
        folder: of the prepared set.
        say: called with a line on the date and its source.

    Raises:
        ConfigError: if a date is set for a template that does not ask for it.
    """
    wanted = config.model.template_date
    if isinstance(config.model.tokenizer, TrainedTokenizer) or not reads_clock(
        load_tokenizer(config.model.tokenizer or locate(config.model.path).tokenizer)
    ):
        if wanted is not None:
            raise ConfigError("model.template_date: the chat template does not read the clock; leave it out")
        return config
    if wanted is not None:
        say(f"chat template: reads the clock, which stands at {wanted} (model.template_date)")
        return config
    kept = (
        ("of the run", lambda: _date_of_run(Path(config.run.dir) / "config.yaml")),
        ("of the prepared set", lambda: _date_in((read_manifest(folder) or {}).get("settings", {}).get("model", {}))),
        ("of model.path", lambda: _date_of_model(config.model.path)),
        ("today", today),
    )
    date, origin = next((date, origin) for origin, find in kept if (date := find()) is not None)
    say(f"chat template: reads the clock, which stands at {date} ({origin}; set model.template_date for another date)")
    return config.model_copy(update={"model": config.model.model_copy(update={"template_date": date})})


def _date_in(section: dict) -> datetime.date | None:
    date = section.get("template_date")
    return None if date is None else datetime.date.fromisoformat(str(date))


def _date_of_run(file: Path) -> datetime.date | None:
    return _date_in(read_yaml(file)[0].get("model", {})) if file.is_file() else None


def _date_of_model(path: str | None) -> datetime.date | None:
    return None if path is None else kept_date(path)
