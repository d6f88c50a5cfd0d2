"""Grids at the scale of a second a cell, for the tests of `fastrm ablate`."""

from pathlib import Path

import yaml

from tests.helpers.runs import text_rows, tiny_config, write_rows

AXES = {"head": {"1 layer": {"model.head.layers": 1}, "2 layers": {"model.head.layers": 2}}}


def write_grid(folder: Path, name: str = "grid", *, steps: int = 3, **keys) -> Path:
    """A grid over a tiny text-only run, with its base and data; `keys` are those of the grid's file."""
    data = write_rows(folder / "train.jsonl", text_rows(24)), write_rows(folder / "eval.jsonl", text_rows(9))
    base = tiny_config(folder, *data, run={"max_steps": steps, "device": "cpu"})
    tree = {"title": "A grid", "base": str(base), "axes": AXES, "dir": str(folder / name), **keys}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path
