"""Small prepared sets for tests, made by the command's own function."""

import json
import multiprocessing
from pathlib import Path

from rich.console import Console

from fastrm.config import load_config
from fastrm.data.prepared import build, units
from fastrm.data.prepared.stored import PreparedSet, read_manifest
from fastrm.train.data import make_set
from fastrm.train.encoder import prepared_folder
from fastrm.ui import Display
from tests.helpers.runs import colour_rows, text_rows, tiny_config, write_rows


class Made:
    """A prepared set and what was said while it was made; `overrides` change the configuration."""

    def __init__(self, config: Path, *overrides: str, workers: int = 1):
        self.config = load_config(config, overrides)
        console = Console(record=True, quiet=False, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
        self.report = make_set(self.config, Display(console), workers)
        self.said = console.export_text()
        self.folder = prepared_folder(self.config)
        self.train, self.eval = (
            PreparedSet(self.folder, split, read_manifest(self.folder), self.config) for split in ("train", "eval")
        )

    @property
    def refused(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "refused.jsonl").read_text().splitlines()]

    def row(self, source: str, split: str = "train") -> dict:
        """The report's row of a source."""
        return next(row for row in self.report["sources"] if (row["source"], row["split"]) == (source, split))


def small_pieces(monkeypatch, rows: int = 16, groups: int = 8) -> None:
    """Many units and pieces from few rows."""
    monkeypatch.setattr(units, "ROWS_PER_UNIT", rows)
    monkeypatch.setattr(build, "GROUPS_PER_PIECE", groups)


def config_of(folder: Path, *sources: dict, eval: list[dict] | None = None, **sections) -> Path:
    """A tiny configuration with these training sources."""
    path = tiny_config(folder, "unused", **sections)
    import yaml

    tree = yaml.safe_load(path.read_text())
    tree["data"]["train"] = list(sources)
    if eval is not None:
        tree["data"]["eval"] = eval
    path.write_text(yaml.safe_dump(tree))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a prepared set but the report, which holds times."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith(("report.", ".lock"))
    }


def ids(prepared: PreparedSet) -> list[list[str]]:
    """Ids of the members of every group, in order."""
    return [[record.id for record in prepared.records.parts(number)] for number in range(len(prepared))]


def mixed_sources(folder) -> list[dict]:
    """Images and text, bad rows, copies, prompts in several rows."""
    colour_rows(folder, 40)
    rows = text_rows(30)
    rows += [{**rows[3], "id": "again"}, {**rows[4], "id": "other", "rejected": "never"}, "{not json"]
    write_rows(folder / "text.jsonl", rows)
    return [{"path": str(folder / "colours.jsonl")}, {"path": str(folder / "text.jsonl"), "held_out": 0.2}]


def in_child(function, *arguments) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process
