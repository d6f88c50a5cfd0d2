"""The file of a grid: what it resolves to, and what it is refused for."""

from pathlib import Path

import pytest

from fastrm.ablate.grid import load_grid
from fastrm.config import load_config
from fastrm.errors import ConfigError
from tests.helpers.ablation_grids import AXES, write_grid
from tests.helpers.project import PROJECT

GRIDS = sorted((PROJECT / "configs" / "ablations").glob("*.yaml"))
TWO_AXES = {**AXES, "rate": {"low": {"optim.lr": 1e-4}, "high": {"optim.lr": 1e-2}}}


def complaint(path: Path, *overrides) -> str:
    with pytest.raises(ConfigError) as error:
        load_grid(path, overrides)
    return str(error.value)


def test_grid_is_the_product_of_axes_and_seeds_with_seeds_outermost(tmp_path):
    grid = load_grid(write_grid(tmp_path, axes=TWO_AXES, seeds=[4, 7]))
    assert [cell.name for cell in grid.cells] == [
        f"{rate}-{head}-seed{seed}" for seed in (4, 7) for rate in ("low", "high") for head in ("1_layer", "2_layers")
    ]
    found = [(cell.config.model.head.layers, cell.config.optim.lr, cell.config.run.seed) for cell in grid.cells]
    assert found == [(n, lr, seed) for seed in (4, 7) for lr in (1e-4, 1e-2) for n in (1, 2)]
    assert [cell.config.run.dir for cell in grid.cells] == [str(tmp_path / "grid" / cell.name) for cell in grid.cells]


def test_cell_is_the_configuration_of_train_with_its_overrides(tmp_path):
    cell = load_grid(write_grid(tmp_path, overrides={"optim.betas": [0.8, 0.9], "model.freeze": []})).cells[1]
    assert cell.config == load_config(cell.base, cell.overrides)
    assert cell.config.optim.betas == [0.8, 0.9] and cell.config.model.head.layers == 2


def test_override_of_the_command_line_is_for_all_cells_or_for_the_grid(tmp_path):
    path = write_grid(tmp_path, overrides={"optim.lr": 1e-4})
    grid = load_grid(path, ["optim.lr=5e-4", "kernels=eager", "seeds=[3]", "num_parallel=2"])
    assert {cell.config.optim.lr for cell in grid.cells} == {5e-4}
    assert {cell.config.kernels for cell in grid.cells} == {"eager"}
    assert {cell.seed for cell in grid.cells} == {3} and grid.settings.num_parallel == 2


def test_folder_is_named_by_the_file_unless_it_is_set(tmp_path, monkeypatch):
    path = write_grid(tmp_path, dir=None)
    assert load_grid(path).dir == Path("runs/ablations/grid")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"reference": "3 layers"}, "reference: there is no row '3 layers'; rows: 1 layer, 2 layers"),
        ({"ensembles": {"both": {"members": ["1 layer", "x"]}}}, "ensembles.both.members: there is no row 'x'"),
        ({"ensembles": {"1 layer": {"members": ["1 layer", "2 layers"]}}}, "an ensemble has the name of another row"),
        ({"published": {"source": "s", "rows": {"y": {"Acc": 1.0}}}}, "published.rows: there is no row 'y'"),
        ({"seeds": [1, 1]}, "seeds: 1 stands twice"),
        ({"evaluate": ["bench:a", "bench:a"]}, "evaluate: a stands twice"),
        ({"axes": {"head": {}}}, "axes.head has no settings; name at least one"),
        ({"overrides": {"run.seed": 3}}, "overrides: run.seed is the grid's own to set; use seeds and dir"),
        ({"axes": {"d": {"a": {"run.dir": "x"}}}}, "axes.d.a: run.dir is the grid's own to set"),
        (
            {"overrides": {"model.head": {"layers": 3}}},
            "model.head is set by overrides and by axes.head; leave it to one of them",
        ),
        (
            {"axes": {**AXES, "b": {"x": {"model.head.layers": 3}}}},
            "model.head.layers is set by axes.head and by axes.b; leave it to one of them",
        ),
        ({"seed": [1]}, "grid.yaml:10: unknown key seed; did you mean seeds?"),
        ({"columns": {"a": {"metric": "x", "bets": "lowest"}}}, "did you mean columns.a.best?"),
        ({"columns": {"a": {"metric": "x", "groups": ["b"]}}}, "columns.a.groups: there is no setting 'b'"),
        ({"evaluate": [{"name": "c", "target": "f", "groups": ["b"]}]}, "evaluate.c.groups: there is no setting 'b'"),
        ({"evaluate": [{"name": "c", "target": "held_out", "costs": True}]}, "costs and groups: the target held_out"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_makes_no_sense_is_refused_by_name(tmp_path, keys, expected):
    assert expected in complaint(write_grid(tmp_path, **keys))


def test_command_line_cannot_set_what_an_axis_sets(tmp_path):
    assert "model.head.layers is set by overrides and by axes.head" in complaint(
        write_grid(tmp_path), "model.head.layers=3"
    )


def test_wrong_setting_names_the_cell_and_the_key(tmp_path):
    path = write_grid(tmp_path, axes={"rate": {"good": {"optim.lr": 1e-4}, "bad": {"optim.lt": 1e-4}}})
    assert complaint(path) == (
        f"{path}: cell bad-seed0: override 'optim.lt=0.0001': unknown key optim.lt; did you mean optim.lr?"
    )


def test_settings_that_would_share_a_folder_are_refused(tmp_path):
    path = write_grid(tmp_path, axes={"head": {"a b": {}, "a-b": {"model.head.layers": 1}}})
    assert complaint(path) == (
        f"{path}: the settings 'a b' and 'a-b' would share the folder a_b-seed0; names must differ in letters or digits"
    )


@pytest.mark.parametrize("path", [path for path in GRIDS if path.stem != "tiny"], ids=lambda path: path.stem)
def test_grid_of_the_project_loads(path, monkeypatch):
    monkeypatch.chdir(path.parents[2])
    grid = load_grid(path)
    cells = [cell for cell in grid.cells if cell.seed == grid.settings.seeds[0]]
    configs = [cell.config.model_dump(exclude={"run": {"dir", "seed"}}) for cell in cells]
    assert all(config not in configs[:number] for number, config in enumerate(configs)), "two cells are the same run"
    metrics = {column.metric.partition("/")[0] for column in grid.settings.shown.values()}
    assert metrics <= {evaluation.name for evaluation in grid.settings.evaluate}
