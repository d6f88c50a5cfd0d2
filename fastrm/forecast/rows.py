"""The first rows of every source, read as a run would read them: the data's part of a dry run.

Images are opened for their headers, and conversations are tokenised; nothing is decoded or written.
"""

from collections import Counter
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from fastrm.config import Config, TrainedTokenizer
from fastrm.data.group import GroupSize, check_length, encode_group
from fastrm.data.prepared.units import open_source
from fastrm.data.record import Record
from fastrm.data.sources import KeyTally, RefusedRow, is_on_hub, unread_lines
from fastrm.data.sources.columns import understood
from fastrm.data.template import ConversationEncoder
from fastrm.data.tokenizer import load_tokenizer, train_tokenizer
from fastrm.data_config import SourceConfig
from fastrm.errors import ConfigError, DataError, RecordError
from fastrm.model.architectures import find_architecture
from fastrm.model.families import chat_layout
from fastrm.model.places import locate
from fastrm.train.encoder import make_data_encoder

# The rows read of a source: enough to meet a mistake that most rows share, few enough to be quick.
ROWS = 200
_NAMED = 2  # the most refusals of a source that are shown in full


def check_rows(config: Config) -> list[tuple[str, str, str]]:
    """Return (name, state, detail) of each local source's first rows.

    The state is usable, refused in part, or missing if none is usable.

    Raises:
        ConfigError: the tokenizer, its template or the image processor cannot be used, as in a run.
    """
    sources = {
        f"data.{split}.{number}": source
        for split in ("train", "eval")
        for number, source in enumerate(getattr(config.data, split))
    }
    read = {name: _read(source) for name, source in sources.items() if not is_on_hub(source.path, source.set)}
    read = {name: rows for name, rows in read.items() if rows is not None}
    encoder = _encoder(config, [row for first in read.values() for row in first.rows if isinstance(row, Record)])
    return [(name, *_judge(rows, encoder, config)) for name, rows in read.items()]


class _FirstRows(NamedTuple):
    """The first rows of a source, with the findings about their keys and its `columns`."""

    rows: list[Record | RefusedRow]
    notes: list[str]
    problem: str | None = None


def _read(source: SourceConfig) -> _FirstRows | None:
    """Read the first rows of a source; None if it is missing, which is reported elsewhere."""
    try:
        files, keys = open_source(source), {}
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
