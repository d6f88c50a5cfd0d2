"""What a configuration says that a run reads: is it here, and how many preferences is it?"""

import importlib.util
from itertools import islice
from pathlib import Path

from fastrm.config import Config, ModelConfig, SourceConfig
from fastrm.data.quarantine import Quarantine
from fastrm.data.sources import read_source
from fastrm.data.sources.digits import PREFIX as DIGITS_PREFIX
from fastrm.data.sources.files import data_files
from fastrm.errors import DataError

# Sources that are larger take minutes to read, which is no part of a plan.
MOST_BYTES_TO_COUNT = 256 * 2**20


def check_inputs(config: Config) -> list[tuple[str, str, str]]:
    """(name, "found" or "missing", detail) of everything that the configuration says a run reads."""
    rows = [("data.train", "missing", "no source is named")] if not config.data.train else []
    for split, sources in (("train", config.data.train), ("eval", config.data.eval)):
        for number, source in enumerate(sources):
            rows.append((f"data.{split}.{number}", *_check_source(source)))
    rows += _check_model(config.model)
    for logger in config.run.report_to:
        found = importlib.util.find_spec(logger) is not None
        rows.append(("run.report_to", "found" if found else "missing", f"Python package {logger}"))
    return rows


def _check_source(source: SourceConfig) -> tuple[str, str]:
    """State and detail of one source: its files and images exist, no row is read."""
    try:
        records = read_source(source.path, format=source.format, images=source.images, quarantine=Quarantine(None))
        if source.path.startswith(DIGITS_PREFIX):
            # Ships with a package; only making the first record tells whether it is there.
            list(islice(records, 1))
            return "found", f"{source.path}, built in"
        files = data_files(source.path)
    except DataError as error:
        return "missing", str(error)
    num_bytes = sum(Path(file).stat().st_size for file in files)
    return "found", f"{source.path}: {len(files):,} file{'s' * (len(files) > 1)}, {num_bytes / 2**20:,.1f} MiB"


def _check_model(model: ModelConfig) -> list[tuple[str, str, str]]:
    rows = []
    if model.path is not None:
        rows.append(("model.path", *_check_folder(model.path, "config.json", "*.safetensors")))
    if isinstance(model.tokenizer, str):
        rows.append(("model.tokenizer", *_check_folder(model.tokenizer, "tokenizer.json", "tokenizer_config.json")))
    return rows


def _check_folder(path: str, *patterns: str) -> tuple[str, str]:
    folder = Path(path)
    if not folder.is_dir():
        return "missing", f"{path}: no such folder here; a run asks the hub for it"
    absent = [pattern for pattern in patterns if not any(folder.glob(pattern))]
    return ("missing", f"{path}: has no {' and no '.join(absent)}") if absent else ("found", path)


def count_preferences(config: Config) -> int | None:
    """Preferences of data.train without ties, or None if a source is missing or too large to be read for that."""
    sources = config.data.train
    if not sources or any(_check_source(source)[0] == "missing" for source in sources):
        return None
    files = [
        file for source in sources if not source.path.startswith(DIGITS_PREFIX) for file in data_files(source.path)
    ]
    if sum(Path(file).stat().st_size for file in files) > MOST_BYTES_TO_COUNT:
        return None
    return sum(
        not preference.tie
        for source in sources
        for record in read_source(source.path, format=source.format, images=source.images, quarantine=Quarantine(None))
        for preference in record.preferences
    )
