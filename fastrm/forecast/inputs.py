"""The inputs that a configuration names: whether they are here, their first rows, and their preferences.

Of the first rows, images are opened for their headers, and conversations are tokenised; nothing is decoded or written.
"""

from collections import Counter
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from fastrm.config import Config, ModelConfig, TrainedTokenizer
from fastrm.data.group import GroupSize, check_length, encode_group
from fastrm.data.paradigm import TextReading, reading_of
from fastrm.data.prepared.stored import read_manifest
from fastrm.data.prepared.units import open_source
from fastrm.data.record import Record
from fastrm.data.sources import KeyTally, RefusedRow, SourceFile, hub_name, is_on_hub, unread_lines
from fastrm.data.sources.columns import understood
from fastrm.data.sources.files import stored_in
from fastrm.data.template import ConversationEncoder
from fastrm.data.tokenizer import load_tokenizer, train_tokenizer
from fastrm.data_config import SourceConfig
from fastrm.errors import ConfigError, DataError, RecordError, looked_for
from fastrm.model.architectures import find_architecture
from fastrm.model.families import chat_layout
from fastrm.model.places import locate
from fastrm.train.encoder import make_data_encoder
from fastrm.train.trackers import check_trackers

# Larger sources take minutes to read, which a plan should not.
MOST_BYTES_TO_COUNT = 256 * 2**20
# The rows read of a source: enough to meet a mistake that most rows share, few enough to be quick.
ROWS = 200
_NAMED = 2  # the most refusals of a source that are shown in full


def check_inputs(config: Config) -> list[tuple[str, str, str]]:
    """Return (name, state, detail) of every input that the configuration names.

    The state is found or missing; of a prepared set that a run would make, not yet.
    """
    rows = [("data.train", "missing", "no source is named")] if not config.data.train else []
    for place, source in (config.data.sources("train") | config.data.sources("eval")).items():
        rows.append((place, *_check_source(source)))
    if config.data.prepared is not None:
        rows.append(("data.prepared", *_check_prepared(config.data.prepared)))
    rows += _check_model(config.model)
    rows += [("run.report_to", *_check_tracker(name)) for name in config.run.report_to]
    return rows


def _check_tracker(name: str) -> tuple[str, str]:
    """Return state and detail of a tracker: installed, and logged in or reachable."""
    try:
        check_trackers([name])
    except ConfigError as error:
        return "missing", str(error).removeprefix("run.report_to: ")
    return "found", name


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
    reading = reading_of(config)
    files = [file for source in sources for file in open_source(source, reading)]
    if sum(path.stat().st_size for path in _paths(files)) > MOST_BYTES_TO_COUNT:
        return None
    return sum(
        not preference.tie
        for file in files
        for record in file.read()
        if not isinstance(record, RefusedRow)
        for preference in record.preferences
    )


def check_rows(config: Config) -> list[tuple[str, str, str]]:
    """Return (name, state, detail) of each local source's first rows.

    The state is usable, refused in part, or missing if none is usable.

    Raises:
        ConfigError: the tokenizer, its template or the image processor cannot be used, as in a run.
    """
    sources = config.data.sources("train") | config.data.sources("eval")
    reading = reading_of(config)
    read = {name: _read(source, reading) for name, source in sources.items() if not is_on_hub(source.path, source.set)}
    read = {name: rows for name, rows in read.items() if rows is not None}
    encoder = _encoder(config, [row for first in read.values() for row in first.rows if isinstance(row, Record)])
    return [(name, *_judge(rows, encoder, config)) for name, rows in read.items()]


class _FirstRows(NamedTuple):
    """The first rows of a source, with the findings about their keys and its `columns`."""

    rows: list[Record | RefusedRow]
    notes: list[str]
    problem: str | None = None


def _read(source: SourceConfig, reading: TextReading | None) -> _FirstRows | None:
    """Read the first rows of a source; None if it is missing, which is reported elsewhere."""
    try:
        files, keys = open_source(source, reading), {}
        read = chain.from_iterable(file.read(keys=keys.setdefault(file.path, KeyTally())) for file in files)
        rows = list(islice((row for row in read if isinstance(row, Record) or not row.partial), ROWS))
    except DataError:
        return None
    try:
        notes = [line for file in files if (line := understood(file)) is not None]
    except (ConfigError, DataError) as error:
        return _FirstRows(rows, [], str(error))
    return _FirstRows(rows, notes + unread_lines(keys))


def _encoder(config: Config, records: list[Record]) -> ConversationEncoder | None:
    """Make the encoder; None if the model or its tokenizer is not here: the hub is not asked."""
    path = config.model.path
    if not records or (path is not None and not Path(path).is_dir()):
        return None
    named = config.model.tokenizer or locate(path).tokenizer
    if isinstance(named, str) and not Path(named).is_dir():
        return None
    if isinstance(named, str) and not (Path(named) / "tokenizer_config.json").exists():
        return None
    try:
        architecture, _ = find_architecture(config.model)
    except LookupError:
        return None
    if isinstance(named, TrainedTokenizer):
        conversations = (response.messages for record in records for response in record.responses)
        layout = chat_layout(config.model.init["model_type"])
        tokenizer = train_tokenizer(conversations, named.train_vocab_size, layout)
    else:
        tokenizer = load_tokenizer(named)
    return make_data_encoder(config, architecture, tokenizer)


def _judge(first_rows: _FirstRows, encoder: ConversationEncoder | None, config: Config) -> tuple[str, str]:
    if first_rows.problem is not None:
        return "missing", first_rows.problem
    rows, notes = first_rows.rows, "".join(f"; {note}" for note in first_rows.notes)
    refusals = [(row.code, row.message, row.origin) for row in rows if isinstance(row, RefusedRow)]
    for record in (row for row in rows if isinstance(row, Record)):
        try:
            if encoder is not None:
                check_length(GroupSize.of(encode_group(record, encoder)).num_tokens, config)
        except RecordError as error:
            refusals.append((error.code, error.message, record.origin))
    if not rows:
        return "missing", "no usable row: the source is empty"
    first = f"{'all' if len(rows) < ROWS else 'the first'} {len(rows):,} rows"
    if not refusals:
        unread = "" if encoder is not None else ", not tokenised: the model or its tokenizer is not here"
        return "usable", f"{first} looked at{unread}{notes}"
    counts = ", ".join(f"{code} {number:,}" for code, number in Counter(code for code, _, _ in refusals).most_common())
    examples = "; ".join(f"{origin}: {message}" for _, message, origin in refusals[:_NAMED])
    state = "missing" if len(refusals) >= len(rows) else "refused"
    return state, f"of {first} {len(refusals):,} cannot be used ({counts}): {examples}{notes}"
