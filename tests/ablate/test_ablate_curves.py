"""Grids of paradigms: evaluations of models that write, costs, and reward curves over lengths of training."""

import json
import re

import pytest

from fastrm.ablate.command import _leave_report
from fastrm.ablate.curves import curve_charts, save_reward_curves
from fastrm.ablate.grid import load_grid
from fastrm.ablate.results import Results, cell_metrics
from fastrm.ablate.table import main_table
from fastrm.ablate.work import evaluation_commands
from fastrm.ui import Display, new_figure
from tests.helpers.ablation_grids import AXES, write_grid

AXES = {**AXES, "steps": {"few": {"run.max_steps": 2}, "many": {"run.max_steps": 4}}}
COLUMNS = {
    "accuracy": "e/accuracy",
    "MFLOPs": {
        "metric": "c/pair/flops", "best": "none", "percent": False, "unit": 1e6, "digits": 1, "groups": ["many"],
    },
}
CURVES = {"accuracy": "e/accuracy", "cost": "c/pair/flops"}


@pytest.fixture
def results(tmp_path):
    """Figures of two rows, two lengths of training and three seeds, of which one failed in part."""
    grid = load_grid(write_grid(tmp_path, axes=AXES, seeds=[0, 1, 2], columns=COLUMNS, curves=CURVES))
    metrics = {}
    for cell in grid.cells:
        many, two = cell.group == "many", cell.row == "2 layers"
        metrics[cell.name] = {
            "run/preferences": 32 if many else 16,
            "e/accuracy": 0.6 + 0.2 * many + 0.01 * cell.seed,
            "c/pair/flops": 3e9 if two else 2e6,
        }
    del metrics["many-2_layers-seed1"]["e/accuracy"]
    return Results(grid, metrics, {}, dict.fromkeys(metrics, 1.0))


def drawn(results):
    charts = []
    for draw, _ in curve_charts(results):
        axes = new_figure(4, 3).subplots()
        draw(axes, results)
        charts.append(axes)
    return charts


def test_a_column_of_one_setting_stands_once_in_its_unit(results):
    table = main_table(results)
    assert table.header == ["head", "few: accuracy", "many: accuracy", "many: MFLOPs"]
    assert [row[3] for row in table.rows] == ["2.0 ± 0.0", "3,000.0 ± 0.0"]


def test_curves_are_means_over_seeds_at_the_preferences_trained_on(results):
    axes, _ = drawn(results)
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["1 layer"] == [pytest.approx([16, 0.61]), pytest.approx([32, 0.81])]
    assert lines["2 layers"] == [pytest.approx([16, 0.61]), pytest.approx([32, 0.81])]  # of two seeds
    bands = [path.vertices for band in axes.collections for path in band.get_paths()]
    half = 4.302652729749464 * 0.01 / 3**0.5  # Student's t for two degrees of freedom
    assert bands[0][:, 1].min() == pytest.approx(0.61 - half) and bands[0][:, 1].max() == pytest.approx(0.81 + half)


def test_cost_is_that_of_the_longest_training_on_a_logarithmic_axis(results):
    _, axes = drawn(results)
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "FLOPs for a judged pair"
    found = {bar.get_label(): bar.lines[0].get_xydata()[0].tolist() for bar in axes.containers}
    assert found == {"1 layer": pytest.approx([2e6, 0.81]), "2 layers": pytest.approx([3e9, 0.81])}


def test_a_grid_leaves_a_page_with_its_curves(results, tmp_path):
    results.grid.dir.mkdir()
    _leave_report(results, Display())
    page = (results.grid.dir / "report.html").read_text()
    assert page.count('id="reward-curves"') == 1 and page.count("<svg") == 2
    assert "training preferences seen</text>" in page and re.search(r"<td[^>]*>3,000.0 ± 0.0</td>", page)
    assert (results.grid.dir / "reward-curves.png").stat().st_size > 10_000


def test_a_grid_without_curves_has_none(tmp_path):
    grid = load_grid(write_grid(tmp_path))
    results = Results(grid, {cell.name: {} for cell in grid.cells}, {}, {})
    save_reward_curves(results, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists() and not list(curve_charts(results))


def test_what_models_write_stays_in_their_cell_and_costs_are_a_command_of_their_own(tmp_path):
    evaluate = [{"name": "e", "target": "f.jsonl", "max_tokens": 64}, {"name": "c", "target": "f.jsonl", "costs": True}]
    axes = {"paradigm": {"reward": {}, "judge": {"paradigm": "judge"}}}
    grid = load_grid(write_grid(tmp_path, axes=axes, evaluate=evaluate))
    for cell in grid.cells:
        (texts,), (costs,) = (evaluation_commands(cell, evaluation) for evaluation in grid.settings.evaluate)
        assert costs.arguments[:3] == ("eval", f"{cell.dir}/model", "f.jsonl") and "--costs" in costs.arguments
        assert "--costs" not in texts.arguments and "--generations" not in costs.arguments
        options = dict(zip(texts.arguments, texts.arguments[1:], strict=False))
        # fastrm eval refuses options of scoring for a judge, which scores nothing.
        assert ("--tokens-per-pack" in options) == ("--num-workers" in options) == (cell.row == "reward")
        written = (options.get("--max-tokens"), options.get("--generations"))
        assert written == ((None, None) if cell.row == "reward" else ("64", str(texts.out.with_suffix(".jsonl"))))
    costs.out.parent.mkdir(parents=True)
    costs.out.write_text(json.dumps({"costs": {"pair": {"flops": 1.5}}}))
    assert cell_metrics(cell, grid.settings.evaluate) == {"c/pair/flops": 1.5}


def test_an_evaluation_of_some_settings_is_made_of_those_alone(tmp_path):
    evaluate = [{"name": "c", "target": "f.jsonl", "costs": True, "groups": ["many"]}]
    grid = load_grid(write_grid(tmp_path, axes=AXES, evaluate=evaluate))
    counts = {(cell.group, len(evaluation_commands(cell, grid.settings.evaluate[0]))) for cell in grid.cells}
    assert counts == {("few", 0), ("many", 1)}
    assert [cell_metrics(cell, grid.settings.evaluate) for cell in grid.cells] == [{}] * 4


def test_the_numbers_of_texts_and_preferences_of_a_source_are_no_figures(tmp_path):
    grid = load_grid(write_grid(tmp_path, evaluate=["held_out"]))
    cell = grid.cells[0]
    cell.dir.mkdir(parents=True)
    sources = {"a": {"loss": 0.5, "texts": 4}, "b": {"accuracy": 0.75, "preferences": 4}}
    (cell.dir / "metrics.jsonl").write_text(json.dumps({"step": 1, "eval/loss": 0.5, "eval/sources": sources}) + "\n")
    found = cell_metrics(cell, grid.settings.evaluate)
    assert found == {"held_out/loss": 0.5, "held_out/a/loss": 0.5, "held_out/b/accuracy": 0.75}
