"""The figures of docs/paradigms.md: what the grids of paradigms left, kept as JSON, and tables and pictures of it.

    fastrm ablate configs/ablations/paradigm.yaml       the runs, first; paradigm_text.yaml after critiques.py
    python bench/paradigms/results.py digits --save     write bench/results/DEVICE-paradigms-digits.json, of this one
    python bench/paradigms/results.py digits            print the table and draw docs/paradigms-digits.png, of that file
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import ROOT
from bench.harness.results import RESULTS, device_name, environment, file_of, write_json
from fastrm.ablate.curves import SEEN, save_reward_curves
from fastrm.ablate.grid import load_grid
from fastrm.ablate.results import Results, collect
from fastrm.ablate.table import main_table
from fastrm.ablate.work import with_reused_runs

GRIDS = {"digits": "configs/ablations/paradigm.yaml", "text": "configs/ablations/paradigm_text.yaml"}
OF_PAGE = "amd-epyc-2-cores"
# Figures of judges and critics that stand in the text of the page, beside those of the table.
IN_WORDS = ("position_flip_rate", "num_parse_failures", "critiques_cut")


def file_of_page(name: str) -> Path:
    """Return the file with the figures that the page shows."""
    return RESULTS / f"{OF_PAGE}-paradigms-{name}.json"


def save(name: str, overrides: list[str]) -> Path:
    """Write the figures in the folders of a grid, as far as there are any, and return the file: of this device."""
    grid = with_reused_runs(load_grid(GRIDS[name], overrides))
    wanted = [SEEN, *dict.fromkeys(column.metric for column in grid.settings.shown.values())]
    wanted += [f"{evaluation.name}/{figure}" for evaluation in grid.settings.evaluate for figure in IN_WORDS]
    cells = {
        cell: {metric: found[metric] for metric in wanted if metric in found}
        for cell, found in collect(grid, {}).metrics.items()
        if found
    }
    device = device_name()
    file = file_of(device, f"-paradigms-{name}.json", RESULTS)
    seeds = sorted({cell.seed for cell in grid.cells if cell.name in cells})
    write_json(file, {"device": device, **environment("transformers"), "seeds": seeds, "cells": cells})
    return file


def results_of(name: str) -> Results:
    """Return the results of a grid from the file of the page."""
    saved = json.loads(file_of_page(name).read_text())
    grid = load_grid(ROOT / GRIDS[name], [f"seeds={saved['seeds']}"])
    metrics = {cell.name: saved["cells"].get(cell.name, {}) for cell in grid.cells}
    return Results(grid, metrics, {}, dict.fromkeys(metrics, 0.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=GRIDS)
    parser.add_argument("--save", action="store_true", help="keep the figures of the grid's folders first")
    parser.add_argument("override", nargs="*", help="of the grid, as for fastrm ablate")
    options = parser.parse_intermixed_args()
    if options.save:
        print(f"saved {save(options.name, options.override)}")
    if not file_of_page(options.name).exists():
        sys.exit(f"{file_of_page(options.name)} is not there: run {GRIDS[options.name]}, then this with --save")
    results = results_of(options.name)
    print(main_table(results).as_markdown())
    save_reward_curves(results, ROOT / "docs" / f"paradigms-{options.name}.png")


if __name__ == "__main__":
    main()
