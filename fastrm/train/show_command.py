"""The command `fastrm data show`: rows as a model reads them, in the terminal or as a page."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from fastrm.config import Config, LossConfig, ModelConfig, OptimConfig
from fastrm.data.paradigm import reading_of
from fastrm.data.prepared.records import read_refusals
from fastrm.data.prepared.settings import FORMAT
from fastrm.data.prepared.stored import MANIFEST, REFUSED, SPLITS, PreparedSet, read_manifest
from fastrm.data.show import ShownRow, as_example, first_rows, print_row, refused_row, show_or_refuse
from fastrm.data_config import DataConfig
from fastrm.errors import DataError, StorageError
from fastrm.limits import MediaLimits
from fastrm.report.page import Paragraph, Section, write_page
from fastrm.storage import check_output
from fastrm.train.check_command import encoder_of, listed_sources
from fastrm.ui import make_console, say


class _Part(NamedTuple):
    """The first rows of a source, or of a split of a prepared set."""

    title: str
    counted: str
    rows: list[ShownRow]
    limits: MediaLimits


def show_data(name: str, *, model: str | None = None, reading: dict, count: int = 20, out: Path | None = None) -> None:
    """Print the first rows of data, or write them as a page.

    Args:
        name: a data file or folder, the folder of a prepared set or of a run that has one, or a configuration (.yaml),
            whose sources are all shown.
        model: folder or hub id whose tokenizer reads the rows. Default: model.path of a configuration.
        reading: further settings of the source, as `SourceConfig` names them.
        count: rows of each source.
        out: the HTML file to write in place of printing.

    Raises:
        ConfigError, DataError, StorageError: for data, a model or a file that cannot be used.
    """
    if out is not None:
        check_output(out)
    folders = [folder for folder in (Path(name), Path(name) / "prepared") if (folder / MANIFEST).is_file()]
    parts = list(_prepared(folders[0], model, count) if folders else _parts(name, model, reading, count))
    if not any(part.rows for part in parts):
        raise DataError(f"{name}: has no rows; name a file with rows")
    console = make_console()
    if out is not None:
        sections = [
            Section(part.title, [Paragraph(part.counted), *(as_example(row, part.limits) for row in part.rows)])
            for part in parts
        ]
        write_page(out, "Rows as they are read", f"{name}, at most {count:,} rows of each source", sections)
        say(console, f"{sum(len(part.rows) for part in parts):,} rows written to {out}")
        return
    for part in parts:
        say(console, f"{part.title}: {part.counted}")
        console.print()
        for row in part.rows:
            print_row(console, row)


def _parts(name: str, model: str | None, reading: dict, count: int) -> Iterator[_Part]:
    for title, source, config in listed_sources([name], reading):
        encoder = encoder_of(config, model)
        limits = MediaLimits() if config is None else config.data.limits
        rows = first_rows(source, limits, encoder, count, None if config is None else reading_of(config))
        counted = _counted(None if encoder is None else model or config.model.path)
        yield _Part(title, f"first rows: {len(rows):,}; {counted}", rows, limits)


def _prepared(folder: Path, model: str | None, count: int) -> Iterator[_Part]:
    """Yield the groups of each split, read with the settings of the set, and what was refused."""
    manifest = read_manifest(folder)
    if manifest["format"] != FORMAT:
        raise StorageError(f"{folder}: has format {manifest['format']}, wanted {FORMAT}; prepare the data again")
    settings = manifest["settings"]
    data = DataConfig(**settings["data"])
    config = Config(
        data=data, loss=LossConfig(**settings["loss"]), model=ModelConfig(path=model or "none"),
        optim=OptimConfig(tokens_per_pack=data.max_tokens_per_group, **settings["optim"]),
    )  # fmt: skip
    encoder = None if model is None else encoder_of(config, model)
    for split in SPLITS:
        groups, rows = PreparedSet(folder, split, manifest, config), []
        for number in range(min(count, len(groups))):
            notes = [f"{groups.groups[number].num_tokens:,} tokens in the prefix tree when it was prepared"]
            if others := [origin for _, origin, _ in groups.members(number)[1:]]:
                notes.append(f"merged with {', '.join(others)}")
            rows.append(show_or_refuse(groups.records[number], data.limits, encoder, notes))
        title = f"first groups: {len(rows):,} of {len(groups):,}; {_counted(model)}"
        yield _Part(split, title, rows, data.limits)
    refused = islice(read_refusals(folder / REFUSED), count)
    rows = [refused_row(row.origin, row.code, row.message) for row in refused]
    yield _Part("refused", f"first refused rows and parts of rows: {len(rows):,}", rows, data.limits)


def _counted(model: str | None) -> str:
    if model is None:
        return "no model is named, so words and characters are counted: --model counts tokens"
    return f"texts and tokens are those that {model} reads"
