"""The inputs that a configuration names: whether they are here, and their number of preferences."""

import importlib.util
from pathlib import Path

from fastrm.config import Config, ModelConfig
from fastrm.data.prepared.stored import read_manifest
from fastrm.data.prepared.units import open_source
from fastrm.data.sources import RefusedRow, SourceFile, hub_name, is_on_hub
from fastrm.data.sources.files import stored_in
from fastrm.data_config import SourceConfig
from fastrm.errors import DataError, looked_for
from fastrm.model.places import locate

# Larger sources take minutes to read, which a plan should not.
MOST_BYTES_TO_COUNT = 256 * 2**20


def check_inputs(config: Config) -> list[tuple[str, str, str]]:
    """Return (name, state, detail) of every input that the configuration names.

    The state is found or missing; of a prepared set that a run would make, not yet.
    """
    rows = [("data.train", "missing", "no source is named")] if not config.data.train else []
    for split, sources in (("train", config.data.train), ("eval", config.data.eval)):
        for number, source in enumerate(sources):
            rows.append((f"data.{split}.{number}", *_check_source(source)))
    if config.data.prepared is not None:
        rows.append(("data.prepared", *_check_prepared(config.data.prepared)))
    rows += _check_model(config.model)
    for logger in config.run.report_to:
        found = importlib.util.find_spec(logger) is not None
        rows.append(("run.report_to", "found" if found else "missing", f"Python package {logger}"))
    return rows


def _check_source(source: SourceConfig) -> tuple[str, str]:
    """Return state and detail of one source: whether its files and images exist. No row is read.

    The hub is not asked.
    """
    if is_on_hub(source.path, source.set):
        return "missing", f"{hub_name(source.path, source.set)}: not looked for; a run downloads it from the hub"
    try:
        files = open_source(source)
        if not isinstance(files[0], SourceFile):
            # The data comes with a package; only making the first record shows whether that is there.
            next(files[0].read(0, 1))
            return "found", f"{source.path}, built in"
    except DataError as error:
        return "missing", str(error)
    paths = _paths(files)
    num_bytes = sum(path.stat().st_size for path in paths)
    name = f"{source.set}, {source.path}" if source.set else source.path
    return "found", f"{name}: {len(files):,} file{'s' * (len(files) > 1)}, {num_bytes / 2**20:,.1f} MiB"


def _paths(files: list) -> set[Path]:
    """Return the data files on disk; several may be in one archive."""
    return {Path(path) for file in files if isinstance(file, SourceFile) for path in stored_in(file.path)}


def _check_prepared(folder: str) -> tuple[str, str]:
    manifest = read_manifest(Path(folder))
    if manifest is None:
        return "not yet", f"{folder}: made by fastrm data prepare, or when a run starts"
    train = manifest["splits"]["train"]
    return "found", f"{folder}: {train['num_groups']:,} groups, {train['num_preferences']:,} preferences"


def _check_model(model: ModelConfig) -> list[tuple[str, str, str]]:
    rows = []
    if model.path is not None:
        base = locate(model.path).base if Path(model.path).is_dir() else model.path
        rows.append(("model.path", *_check_folder(base, "config.json", "*.safetensors")))
    if isinstance(model.tokenizer, str):
        rows.append(("model.tokenizer", *_check_folder(model.tokenizer, "tokenizer.json", "tokenizer_config.json")))
    return rows


def _check_folder(path: str, *patterns: str) -> tuple[str, str]:
    folder = Path(path)
    if not folder.is_dir():
        return "missing", f"{path}: no such folder{looked_for(path) or ' here'}; a run asks the hub for it"
    absent = [pattern for pattern in patterns if not any(folder.glob(pattern))]
    return ("missing", f"{path}: has no {' and no '.join(absent)}") if absent else ("found", path)


def count_preferences(config: Config) -> int | None:
    """Count the preferences of data.train without ties; None if a source is missing or too large for that."""
    sources = config.data.train
    if not sources or any(_check_source(source)[0] == "missing" for source in sources):
        return None
    if config.data.prepared is not None and (manifest := read_manifest(Path(config.data.prepared))) is not None:
        return manifest["splits"]["train"]["num_preferences"]
    files = [file for source in sources for file in open_source(source)]
    if sum(path.stat().st_size for path in _paths(files)) > MOST_BYTES_TO_COUNT:
        return None
    return sum(
        not preference.tie
        for file in files
        for record in file.read()
        if not isinstance(record, RefusedRow)
        for preference in record.preferences
    )
