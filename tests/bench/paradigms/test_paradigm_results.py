"""The comparison of paradigms: the page shows the tables of what the grids left."""

import json

import pytest

from bench.paradigms import results
from fastrm.ablate.table import main_table
from fastrm.json_files import to_json
from tests.helpers.ablation_grids import write_grid
from tests.helpers.documents import text_of

SHOWN = ["digits", "text"]  # grids whose table the page has


@pytest.mark.parametrize("name", SHOWN)
def test_the_page_shows_the_table_of_the_results(name):
    table = main_table(results.results_of(name)).as_markdown()
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert "\n".join(lines) in text_of("docs/paradigms.md")


def test_figures_are_collected_from_the_cells_that_have_some(tmp_path, monkeypatch):
    monkeypatch.setitem(results.GRIDS, "digits", str(write_grid(tmp_path, seeds=[0, 1, 2])))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(results, "device_name", lambda: "Some CPU, 3 cores")
    monkeypatch.setattr(results, "OF_PAGE", "some-cpu-3-cores")
    cell = tmp_path / "grid" / "1_layer-seed0"
    cell.mkdir(parents=True)
    (cell / "summary.json").write_text(to_json({"preferences": 24, "steps": 3}))
    rows = [{"step": 3, "eval/loss": 0.5, "eval/accuracy": 0.75, "eval/sources": {}}]
    (cell / "metrics.jsonl").write_text("".join(to_json(row) + "\n" for row in rows))
    file = results.save("digits", [])
    assert file == results.file_of_page("digits")
    found = json.loads(file.read_text())
    assert found["cells"] == {"1_layer-seed0": {"run/preferences": 24, "held_out/accuracy": 0.75}}
    assert found["seeds"] == [0], "the table is of the seeds that ran"
    table = main_table(results.results_of("digits"))
    assert table.rows == [["1 layer", "75.0"], ["2 layers", "-"]]
