"""What a grid's figures look like, from made-up figures."""

import json

from fastrm.ablate.grid import load_grid
from fastrm.ablate.picture import draw_results
from fastrm.ablate.results import Results, write_json
from fastrm.ablate.table import difference_table, main_table
from tests.helpers.ablation_grids import AXES, write_grid

PUBLISHED = {"source": "A paper, its table", "rows": {"1 layer": {"Acc": 71.2}, "2 layers": {"Acc": 76.5}}}
COLUMNS = {
    "accuracy": "held_out/accuracy",
    "loss": {"metric": "held_out/loss", "best": "lowest", "percent": False},
}


def make_results(folder, accuracies: dict, failed=(), **keys) -> Results:
    """`accuracies`: {(row, group): [of each seed, None for a failed cell]}; a loss is half of 1 - accuracy."""
    grid = load_grid(write_grid(folder, seeds=[0, 1, 2], **{"columns": COLUMNS, **keys}))
    metrics = {}
    for cell in [*grid.cells, *grid.ensembles]:
        value = accuracies[cell.row, cell.group][cell.seed]
        found = {"held_out/accuracy": value, "held_out/loss": (1 - value) / 2} if value is not None else {}
        metrics[cell.name] = found
    return Results(grid, metrics, dict(failed), dict.fromkeys(metrics, 1.5))


def test_table_has_means_intervals_best_and_printed_figures(tmp_path):
    values = {("1 layer", ""): [0.6, 0.7, 0.8], ("2 layers", ""): [0.9, 0.9, 0.9]}
    results = make_results(tmp_path, values, published=PUBLISHED)
    # 24.8 = 100 * 4.3027 * 0.1 / sqrt(3), and half of it for the loss.
    assert main_table(results).as_markdown() == (
        "### A grid\n"
        "\n"
        "| head | accuracy | loss | paper: Acc |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| 1 layer | 70.0 ± 24.8 | 0.150 ± 0.124 | 71.2 |\n"
        "| 2 layers | **90.0 ± 0.0** | **0.050 ± 0.000** | 76.5 |\n"
        "\n"
        "Mean ± half of the 95 % t-interval over n = 3 seeds; the best mean of a column in bold.\n"
        "\n"
        "paper: A paper, its table.\n"
    )


def test_table_names_failed_cells_and_how_many_seeds_are_left(tmp_path):
    values = {("1 layer", ""): [0.6, None, 0.8], ("2 layers", ""): [None, None, None]}
    reasons = {"1_layer-seed1": "out of\n  memory", "2_layers-seed0": "x"}
    text = main_table(make_results(tmp_path, values, reasons)).as_markdown()
    assert "| 1 layer | 70.0 ± 127.1 (n = 2) | 0.150 ± 0.635 (n = 2) |\n| 2 layers | - | - |\n" in text
    assert text.endswith("2 cells failed:\n- 1_layer-seed1: out of memory\n- 2_layers-seed0: x\n")


def test_column_without_a_best_value_has_none_in_bold(tmp_path):
    columns = {"accuracy": {"metric": "held_out/accuracy", "best": "none"}}
    values = {("1 layer", ""): [0.5] * 3, ("2 layers", ""): [0.75] * 3}
    table = main_table(make_results(tmp_path, values, columns=columns))
    assert table.rows == [["1 layer", "50.0 ± 0.0"], ["2 layers", "75.0 ± 0.0"]]


def test_second_axis_makes_groups_of_columns(tmp_path):
    axes = {**AXES, "rate": {"low": {"optim.lr": 1e-4}, "high": {"optim.lr": 1e-2}}}
    values = {(row, group): [0.5, 0.5, 0.5] for row in AXES["head"] for group in ("low", "high")}
    values["2 layers", "high"] = [0.75, 0.75, 0.75]
    table = main_table(make_results(tmp_path, values, axes=axes))
    assert table.header == ["head", "low: accuracy", "low: loss", "high: accuracy", "high: loss"]
    assert table.rows[1][3] == "**75.0 ± 0.0**" and table.rows[0][3] == "50.0 ± 0.0"


def test_differences_are_paired_by_seed(tmp_path):
    # Seeds differ by ten points, the settings by one within each.
    values = {("1 layer", ""): [0.6, 0.7, 0.8], ("2 layers", ""): [0.61, 0.71, 0.81]}
    results = make_results(tmp_path, values, reference="1 layer")
    assert difference_table(results).rows == [["2 layers", "**+1.0 ± 0.0**", "**-0.005 ± 0.000**"]]
    for styles in (True, False):  # where nothing is bold, asterisks say what would be
        row = difference_table(results).as_table(styles).as_lines(80)[-1]
        assert ("**+1.0 ± 0.0**" in row) == (not styles) and "+1.0 ± 0.0" in row
    noisy = {("1 layer", ""): [0.6, 0.7, 0.8], ("2 layers", ""): [0.7, 0.7, 0.7]}
    assert difference_table(make_results(tmp_path, noisy, reference="1 layer")).rows[0][1] == "+0.0 ± 24.8"
    assert difference_table(make_results(tmp_path, noisy)) is None


def test_ensemble_is_a_row_of_its_own(tmp_path):
    values = {("1 layer", ""): [0.6] * 3, ("2 layers", ""): [0.7] * 3, ("both", ""): [0.8] * 3}
    table = main_table(make_results(tmp_path, values, ensembles={"both": {"members": ["1 layer", "2 layers"]}}))
    assert [row[:2] for row in table.rows] == [
        ["1 layer", "60.0 ± 0.0"], ["2 layers", "70.0 ± 0.0"], ["both", "**80.0 ± 0.0**"],
    ]  # fmt: skip


def test_json_holds_every_cell_with_its_difference_from_the_base(tmp_path):
    values = {("1 layer", ""): [0.6, None, 0.8], ("2 layers", ""): [0.9, 0.9, 0.9]}
    results = make_results(tmp_path, values, {"1_layer-seed1": "why"}, reference="2 layers")
    write_json(results, tmp_path / "results.json")
    found = json.loads((tmp_path / "results.json").read_text())
    cells = {cell["name"]: cell for cell in found["cells"]}
    assert len(cells) == 6
    assert cells["1_layer-seed2"]["config"] == {"model.head.layers": 1, "run.seed": 2}
    assert cells["1_layer-seed2"]["metrics"]["held_out/accuracy"] == 0.8 and cells["1_layer-seed2"]["seconds"] == 1.5
    failed = cells["1_layer-seed1"]
    assert (failed["state"], failed["reason"], failed["metrics"]) == ("failed", "why", {})
    entry = found["table"]["1 layer"]["accuracy"]
    assert entry["values"] == {"0": 0.6, "2": 0.8} and entry["estimate"]["num"] == 2
    assert abs(entry["difference"]["mean"] + 0.2) < 1e-12
    assert not (tmp_path / "results.json.part").exists()


def test_picture_has_a_panel_for_each_column_and_a_point_for_each_seed(tmp_path):
    values = {("1 layer", ""): [0.6, None, 0.8], ("2 layers", ""): [None, None, None]}
    figure = draw_results(make_results(tmp_path, values, published=PUBLISHED))
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == ["accuracy", "loss", "paper\nAcc"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["1 layer", "2 layers"]
    assert list(panels[0].lines[0].get_xdata()) == [60.0, 80.0]
    assert [text.get_text() for text in panels[0].texts] == ["no figure"]
    assert [line.get_xdata()[0] for line in panels[2].lines if len(line.get_xdata()) == 1][::3] == [71.2, 76.5]
