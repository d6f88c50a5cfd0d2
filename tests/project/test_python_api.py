"""`fastrm.train` and `fastrm.evaluate`: what the commands do, with the same figures and errors, from Python."""

import asyncio
import inspect
import json
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pandas
import pytest
import yaml

import fastrm
from fastrm.config import load_config
from fastrm.errors import ConfigError, DataError
from tests.helpers.documents import blocks
from tests.helpers.project import PROJECT
from tests.helpers.runs import colour_rows, text_rows, tiny_config, write_rows
from tests.helpers.runs import fastrm as command
from tests.helpers.waiting import PATIENCE, wait_until

ROWS = text_rows(24)
NAMED = {"run": {"dir": "r"}, "model": {"path": "x"}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return fastrm.train(tiny_config(folder, colour_rows(folder), run={"max_steps": 2}), quiet=True)


def tree(folder, **sections) -> dict:
    return yaml.safe_load(tiny_config(folder, "unused", **sections).read_text())


def weights(run) -> bytes:
    return (run.model_folder / "model.safetensors").read_bytes()


def test_a_run_returns_its_folder_and_figures(trained, capsys):
    assert trained.metrics == json.loads((trained.folder / "summary.json").read_text())
    assert trained.metrics["steps"] == 2 and trained.accuracy is None
    assert isinstance(trained.load(check_exactness=False), fastrm.RewardModel)


def test_a_file_a_dict_and_rows_in_memory_train_the_same_weights(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "file").mkdir()
    by_file = fastrm.train(tiny_config(tmp_path / "file", file), "run.max_steps=2", quiet=True)
    config = tree(tmp_path, run={"max_steps": 2})
    for name, source in (("dict", [{"path": file}]), ("rows", [{"rows": ROWS}]), ("frame", pandas.DataFrame(ROWS))):
        config |= {"data": {**config["data"], "train": source}, "run": {**config["run"], "dir": tmp_path / name}}
        before = repr(config)
        run = fastrm.train(config, quiet=True)
        assert weights(run) == weights(by_file) and repr(config) == before


def test_rows_in_memory_may_be_named_evaluation_sets(tmp_path):
    config = tree(tmp_path, run={"max_steps": 1}, data={"train": [{"rows": ROWS}]})
    config["data"]["eval"] = {"frame": pandas.DataFrame(ROWS[:6]), "rows": [{"rows": ROWS[6:9]}]}
    run = fastrm.train(config, quiet=True)
    assert run.metrics["eval_by_set"].keys() == {"frame", "rows"}
    assert sum(figures["preferences"] for figures in run.metrics["eval_by_source"].values()) == 9
    config["data"]["eval"] = {"rows": [{"row": ROWS}]}
    with pytest.raises(ConfigError, match=r"config: data\.eval\.rows\.0: got row"):
        fastrm.train(config, quiet=True)


def test_rows_are_kept_so_that_a_run_goes_on(tmp_path):
    config = tree(tmp_path, run={"max_steps": 2}, data={"train": [{"rows": ROWS, "name": "mine"}]})
    first = fastrm.train(config, quiet=True)
    (kept,) = (first.folder / "rows").iterdir()
    assert [json.loads(line) for line in kept.read_text().splitlines()] == ROWS
    with pytest.raises(ConfigError, match="holds a run already"):
        fastrm.train(config, quiet=True)
    further = fastrm.train(config, "run.max_steps=3", resume="auto", quiet=True)
    assert further.metrics["steps"] == 3 and list((first.folder / "rows").iterdir()) == [kept]


def test_a_dict_extends_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(PROJECT)
    config = load_config(
        {"extends": "configs/quickstart.yaml", "run": {"dir": "x"}, "optim": {"lr": 2e-3}}, ["run.seed=4"]
    )
    stock = load_config("configs/quickstart.yaml")
    assert (config.optim.lr, config.run.seed, config.run.dir) == (2e-3, 4, "x")
    assert config.model == stock.model and config.data == stock.data and config.run.max_steps == stock.run.max_steps


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model": {"path": "x"}}, "config: run.dir is missing"),
        ({**NAMED, "optim": {"lrr": 1}}, "config: unknown key optim.lrr; did you mean optim.lr"),
        ({**NAMED, "optim": {"lr": "high"}}, "config: optim.lr: got 'high'"),
        ({**NAMED, "data": {"train": ROWS}}, r'rows in memory are \{"train": \[\{"rows": \[row, ...'),
        ({"extends": 3}, "config: extends: got 3"),
        ({"extends": "nowhere.yaml"}, "config: extends: nowhere.yaml: cannot read"),
    ],
    ids=["no folder", "misspelt", "wrong type", "bare rows", "extends a number", "extends nothing"],
)
def test_a_dict_that_cannot_work_is_a_config_error(config, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        fastrm.train(config)
    assert list(tmp_path.iterdir()) == []


def test_figures_are_those_of_the_command(trained, tmp_path):
    done = command("eval", trained.model_folder, "digits:eval", "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out.json").read_text())
    table = fastrm.evaluate(str(trained.model_folder), "digits:eval", quiet=True)
    assert json.loads(json.dumps(table.details)) == written
    assert table.accuracy == written["accuracy"] and [table[0]["low"], table[0]["high"]] == written["interval"]
    assert {row["source"]: row["accuracy"] for row in table if row["source"] != "all"} == {
        source: figures["accuracy"] for source, figures in written["sources"].items()
    }
    frame = table.to_pandas()
    assert frame.to_dict("records") == table.rows and "digits/which" in str(table) and "<table" in table._repr_html_()


def test_loaded_models_and_rows_in_memory_are_evaluated(trained, tmp_path):
    model = trained.load(check_exactness=False)
    rows = [*ROWS, {"id": "bad", "prompt": "?"}]
    expected = fastrm.evaluate(trained.model_folder, write_rows(tmp_path / "rows.jsonl", rows), quiet=True)
    assert [row["preferences"] for row in expected] == [24]
    for data in (rows, pandas.DataFrame(rows)):
        table = fastrm.evaluate(model, data, quiet=True)
        assert table.rows == expected.rows and len(table.refused) == 1 and table.refused[0].startswith("rows:25: ")
    both = fastrm.evaluate([trained.model_folder, trained.model_folder], rows, quiet=True)
    assert both.rows == expected.rows and len(both.details["members"]) == 2


def test_a_benchmark_is_a_table_of_its_metrics(trained, tmp_path):
    row = {"id": 1, "prompt": "2 + 2?", "chosen": ["4", "It is 4.", "**4**"], "rejected": ["5", "It is 5.", "**5**"]}
    file = tmp_path / "total_dataset.json"
    file.write_text(json.dumps([{**row, "domain": "math"}]))
    table = fastrm.evaluate(trained.model_folder, "bench:rm_bench", benchmark_data=str(file), quiet=True)
    assert table[0]["metric"] == "overall" and 0 <= table.accuracy <= 1
    assert {row["metric"]: row["value"] for row in table} == table.details["metrics"]
    with pytest.raises(ConfigError, match="benchmark_data is for a benchmark"):
        fastrm.evaluate(trained.model_folder, ROWS, benchmark_data=str(file))


def test_data_that_cannot_be_evaluated_is_named(trained):
    with pytest.raises(DataError, match="rows: it has no rows"):
        fastrm.evaluate(trained.model_folder, [], quiet=True)
    with pytest.raises(DataError, match="rows: no preference could be evaluated; rows:1: "):
        fastrm.evaluate(trained.model_folder, [{"prompt": "?"}], quiet=True)
    with pytest.raises(ConfigError, match="no such folder"):
        fastrm.evaluate("./nowhere", ROWS, quiet=True)


def test_a_running_event_loop_is_no_obstacle(tmp_path):
    async def cell():
        run = fastrm.train(tree(tmp_path, run={"max_steps": 1}, data={"train": [{"rows": ROWS}]}), quiet=True)
        return run, fastrm.evaluate(run.load(check_exactness=False), ROWS, quiet=True)

    run, table = asyncio.run(cell())
    assert run.metrics["steps"] == 1 and table[0]["preferences"] == 24


def test_a_script_needs_no_main_guard(tmp_path):
    """The workers that prepare and read ahead are processes of their own."""
    config = tree(tmp_path, run={"max_steps": 2}, data={"train": [{"rows": ROWS}], "num_workers": 1})
    script = tmp_path / "script.py"
    script.write_text(
        f"import fastrm\nrun = fastrm.train({config!r}, quiet=True)\n"
        f"print(run.metrics['steps'], len(fastrm.evaluate(run.model_folder, {ROWS!r}, quiet=True)))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0 and done.stdout == "2 1\n", done.stderr


def test_an_interrupt_saves_and_the_program_goes_on(tmp_path):
    """As when a notebook's user stops a cell: the kernel lives, and the next cell resumes."""
    config = tree(tmp_path, run={"max_steps": 100_000}, data={"train": [{"rows": ROWS}]})
    script = tmp_path / "script.py"
    script.write_text(
        f"import re, fastrm\nconfig = {config!r}\ntry:\n    fastrm.train(config, quiet=True)\n"
        "except fastrm.InterruptedRun as error:\n    step = int(re.search('step ([0-9]+)', str(error))[1])\n"
        "run = fastrm.train(config, f'run.max_steps={step + 1}', resume='auto', quiet=True)\n"
        "print(run.metrics['steps'] - step)\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: (metrics.exists() and metrics.stat().st_size) or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    said, problem = process.communicate(timeout=PATIENCE)
    assert (process.returncode, said) == (0, "1\n"), problem


def test_a_thread_may_train(tmp_path):
    config = tree(tmp_path, run={"max_steps": 1}, data={"train": [{"rows": ROWS}]})
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(fastrm.train, config, quiet=True).result().metrics["steps"] == 1


def test_functions_and_packages_share_their_names():
    """`import fastrm.train.loop` makes the package an attribute of fastrm, which is still called as the function."""
    import fastrm.evaluate.files
    import fastrm.train.loop

    assert fastrm.train.loop.train is not fastrm.train and inspect.ismodule(fastrm.train)
    assert list(inspect.signature(fastrm.train).parameters) == ["config", "overrides", "resume", "quiet"]
    assert list(inspect.signature(fastrm.evaluate).parameters)[:2] == ["model", "data"]
    assert {"RewardModel", "Ensemble", "train", "evaluate", "EvaluationTable"} <= set(dir(fastrm))
    for name in dir(fastrm):
        getattr(fastrm, name)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = fastrm.trian


TYPES = """
from typing import assert_type
import torch
assert_type(model.score(groups), list[list[float]])
assert_type(model.score(groups, convert_to_tensor=True), list[torch.Tensor])
assert_type(model.best_of_n(group), fastrm.Best)
assert_type(model.best_of_n([group]), list[fastrm.Best])
assert_type(model.rank([chat_1, chat_2]), list[int])
assert_type(model.compare(chat_1, None, chat_2), bool)
assert_type(model.max_tokens, int | None)
assert_type(fastrm.evaluate(model, pairs), fastrm.EvaluationTable)
assert_type(fastrm.train("x.yaml"), fastrm.TrainedRun)
assert_type(run.load(dtype="bf16"), fastrm.RewardModel)
fastrm.Ensemble.from_pretrained(["a", "b"]).best_of_n(group).response
"""


def pyright(file) -> list[str]:
    """Return what pyright finds in a file, in the project's folder."""
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", str(file)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=PATIENCE)
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] == 1
    return [one["message"] for one in found["generalDiagnostics"]]


@pytest.mark.skipif(shutil.which("node") is None, reason="pyright needs node, and would fetch it from the network")
def test_pyright_finds_nothing_in_the_page_and_knows_what_comes_back(tmp_path):
    file = tmp_path / "page.py"
    file.write_text("\n".join([*blocks("docs/python.md", "python"), TYPES]))
    assert pyright(file) == []
    file.write_text("import fastrm\nfastrm.evaluate('model')\nfastrm.train('x.yaml', resume=3)\nfastrm.trian\n")
    assert len(pyright(file)) == 3
