"""Trackers: each package itself, on this machine alone, gets a run's rows, its settings and tags, and goes on with it.

TensorBoard and wandb are among the tests' packages, and mlflow-skinny where it is 3 or newer. trackio holds Pillow back
(below 13), so that the tests' packages are without it: docs/training.md has the command that runs its tests.
"""

import json
import subprocess
import sys

import pytest

from fastrm.config import load_config
from fastrm.errors import ConfigError
from fastrm.train.metrics import read_rows
from fastrm.train.trackers import IDS, Trackers, check_trackers
from tests.helpers.runs import run, text_rows, tiny_config, write_rows
from tests.helpers.waiting import PATIENCE, wait_until

NAMES = ["tensorboard", "wandb", "mlflow", "trackio"]
TAGS = ["small", "text"]


def installed(name: str):
    """Return the name as a parameter that is skipped where the package is not here, or too old."""
    from importlib import metadata

    from packaging.requirements import Requirement

    from fastrm.train.trackers import _TRACKERS

    def is_there(need: Requirement) -> bool:
        try:
            return metadata.version(need.name) in need.specifier
        except metadata.PackageNotFoundError:
            return False

    needs = _TRACKERS[name].needs
    is_missing = not any(map(is_there, map(Requirement, needs)))
    return pytest.param(name, marks=pytest.mark.skipif(is_missing, reason=f"needs {needs[0]}: docs/training.md"))


@pytest.fixture(autouse=True)
def at_home(tmp_path, monkeypatch):
    """Trackers that keep all on this machine, below the test's folder, and know no account."""
    for name, value in {
        "HOME": tmp_path, "WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "TRACKIO_DIR": tmp_path / "trackio",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    for name in ("WANDB_API_KEY", "WANDB_DISABLED", "NETRC", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def tracked_config(folder, *names, **settings):
    rows = write_rows(folder / "rows.jsonl", text_rows(24))
    settings = {"max_steps": 4, "eval_every": 2, "save_every": 2, "report_to": list(names), "tags": TAGS, **settings}
    return tiny_config(folder, rows, rows, run=settings)


def _tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator

    events = EventAccumulator(str(folder / "run" / "tensorboard"), size_guidance={TENSORS: 0})
    events.Reload()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    texts = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    settings = json.loads(texts["settings/text_summary"].strip("`").removeprefix("json"))
    project, *tags = texts["run/text_summary"].split()
    return project, tags, settings, scalars


def _wandb(folder):
    """Read the records of the runs that `wandb sync` would send, which are one: of one id."""
    from wandb.proto.wandb_internal_pb2 import Record


    def read() -> list[list[Record]]:
        files = sorted((folder / "run" / "wandb").glob("offline-run-*/*.wandb"))
        return [[Record.FromString(data) for data in _leveldb_log(file.read_bytes()[7:])] for file in files]

    # Its own process writes the files, and may still do so when the run has ended.
    wait_until(lambda: all(any(record.HasField("exit") for record in file) for file in read()))
    rows, ids, about = {}, set(), None
    for file in read():
        for record in file:
            if record.HasField("run"):
                about = record.run
                ids.add(about.run_id)
            if record.HasField("history"):
                found = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                row = {key: json.loads(value) for key, value in found.items()}
                for name, value in row.items():
                    rows.setdefault(name, []).append((row["step"], value))
    assert len(ids) == 1
    settings = {item.key: json.loads(item.value_json) for item in about.config.update}
    return f"{about.project}/{about.display_name}", list(about.tags), settings, rows


def _leveldb_log(data: bytes):
    """Yield the records of a log in LevelDB's format, whose first block lacks the 7 bytes of the file's own header."""
    place, record = 7, b""
    data = bytes(7) + data
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if place + 7 + size > len(data):  # it is being written
            return
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # the whole record, or its last part
            yield record
            record = b""


def _mlflow(folder):
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("fastrm")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    history = {key: client.get_metric_history(found.info.run_id, key) for key in found.data.metrics}
    rows = {key: [(metric.step, metric.value) for metric in metrics] for key, metrics in history.items()}
    tags = [tag for tag in found.data.tags if not tag.startswith(("mlflow.", "changed."))]
    changed = {key: value for key, value in found.data.tags.items() if key.startswith("changed.")}
    settings = {"run": {"tags": TAGS, "max_steps": int(changed.get("changed.run.max_steps", 0))}}
    assert found.data.params["optim.lr"] == "0.001" and found.data.params["data.train.0.weight"] == "1.0"
    return f"fastrm/{found.info.run_name}", tags, settings, rows


def _trackio(folder):
    """Read in a process of its own: trackio takes its folder from the environment once."""
    program = (
        "import json, trackio; from trackio.sqlite_storage import SQLiteStorage as s; (run,) = trackio.Api().runs("
        "'fastrm'); print(json.dumps([run.name, run.config, s.get_logs('fastrm', run.name, run_id=run.id)]))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    name, settings, logs = json.loads(found.stdout)
    rows = {}
    for row in logs:
        for key, value in row.items():
            rows.setdefault(key, []).append((row["step"], value))
    return f"fastrm/{name}", settings["run"]["tags"], settings, rows


READERS = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio}


@pytest.mark.parametrize("name", map(installed, NAMES))
def test_a_tracker_has_every_row_once_and_a_resumed_run_goes_on_in_it(tmp_path, name):
    path = tracked_config(tmp_path, name, name="first")
    run(path)
    before = json.loads((tmp_path / "run" / IDS).read_text())
    run(path, "run.max_steps=6", resume="auto")
    assert json.loads((tmp_path / "run" / IDS).read_text()) == before and set(before) == {name}
    project, tags, settings, rows = READERS[name](tmp_path)
    assert project == "fastrm/first" and sorted(tags) == TAGS
    assert settings["run"]["tags"] == TAGS and settings["run"]["max_steps"] == 6
    written = read_rows(tmp_path / "run" / "metrics.jsonl")
    for figure in ("loss", "rewards/accuracies", "lr", "eval/accuracy"):
        wanted = [(row["step"], pytest.approx(row[figure], rel=1e-6)) for row in written if figure in row]
        assert sorted(rows[figure]) == wanted, figure
    (source,) = [figure for figure in rows if figure.startswith("eval/sources/") and figure.endswith("accuracy")]
    assert sorted(rows[source]) == sorted(rows["eval/accuracy"])


@pytest.mark.parametrize("name", map(installed, NAMES))
def test_a_tracker_that_a_resumed_run_adds_gets_the_rows_before(tmp_path, name):
    path = tracked_config(tmp_path)
    run(path)
    assert not (tmp_path / "run" / IDS).exists()
    run(path, "run.max_steps=6", f"run.report_to=[{name}]", resume="auto")
    rows = READERS[name](tmp_path)[3]
    assert [step for step, _ in sorted(rows["loss"])] == [1, 2, 3, 4, 5, 6]


def test_a_package_that_is_missing_or_too_old_is_named_before_any_work(tmp_path, monkeypatch):
    from importlib import metadata

    installed_version = metadata.version

    def version(name):
        if name == "trackio":
            return "0.0.6"
        if name == "wandb":
            raise metadata.PackageNotFoundError(name)
        return installed_version(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(ConfigError, match=r'report_to: wandb is not installed; pip install "wandb>=\S+", or leave it'):
        run(tracked_config(tmp_path, "wandb"))
    assert not (tmp_path / "run" / "prepared").exists()
    with pytest.raises(ConfigError, match=r'report_to: trackio 0\.0\.6 is too old, trackio>=\S+ is wanted; pip'):
        check_trackers(["trackio"])


@pytest.mark.parametrize("name", [installed("wandb")])
def test_wandb_that_is_not_logged_in_is_named_before_any_work(tmp_path, name):
    """In a process of its own: wandb reads its environment once."""
    program = "from fastrm.train.trackers import check_trackers; check_trackers(['wandb'])"
    done = subprocess.run(
        [sys.executable, "-c", program], env={"HOME": str(tmp_path), "WANDB_MODE": "online"}, cwd=tmp_path,
        capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert "ConfigError: run.report_to: wandb: it is not logged in; run `wandb login`" in done.stderr, done.stderr


@pytest.mark.parametrize("name", [installed("mlflow")])
def test_a_server_of_mlflow_that_is_away_is_named_before_any_work(tmp_path, monkeypatch, name):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"report_to: mlflow: .*127\.0\.0\.1.*; mend that, or leave mlflow out of"):
        run(tracked_config(tmp_path, "mlflow"))
    assert not (tmp_path / "run" / "prepared").exists()


@pytest.mark.parametrize("name", [installed("trackio")])
def test_a_space_without_an_account_is_named_before_any_work(tmp_path, monkeypatch, name):
    monkeypatch.setenv("TRACKIO_SPACE_ID", "someone/board")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match="TRACKIO_SPACE_ID is someone/board, but you are not logged in"):
        run(tracked_config(tmp_path, "trackio"))


@pytest.mark.parametrize("name", [installed("mlflow")])
def test_a_run_whose_tracker_was_deleted_does_not_resume_in_silence(tmp_path, name):
    from mlflow import MlflowClient

    path = tracked_config(tmp_path, "mlflow")
    run(path)
    (run_id,) = json.loads((tmp_path / "run" / IDS).read_text()).values()
    MlflowClient().delete_run(run_id)
    with pytest.raises(ConfigError, match=r"report_to: mlflow: .*deleted.*leave mlflow out of run\.report_to"):
        run(path, "run.max_steps=6", resume="auto")


@pytest.mark.parametrize("name", [installed("mlflow")])
def test_a_tracker_that_fails_in_the_middle_is_named_once_and_at_the_end(tmp_path, name):
    from mlflow import MlflowClient

    config, said = load_config(tracked_config(tmp_path, "tensorboard", "mlflow")), []
    (tmp_path / "run").mkdir()
    trackers = Trackers(config, 0, [], said.append)
    trackers.write({"step": 1, "loss": 0.5})
    MlflowClient().delete_run(json.loads((tmp_path / "run" / IDS).read_text())["mlflow"])
    for step in (2, 3):
        trackers.write({"step": step, "loss": 0.25})
    assert len(said) == 1 and said[0].startswith("warning: mlflow has no rows from step 2 on: ")
    trackers.close(failed=False)
    assert len(said) == 2 and said[1] == f"tracker lost in this run: {said[0].removeprefix('warning: ')}"
    assert _tensorboard(tmp_path)[3]["loss"] == [(1, 0.5), (2, 0.25), (3, 0.25)]


def test_a_tracker_that_does_not_end_is_not_waited_for(tmp_path, monkeypatch):
    import threading

    monkeypatch.setattr("fastrm.train.trackers.CLOSE_SECONDS", 0.1)
    config, said, forever = load_config(tracked_config(tmp_path, "tensorboard")), [], threading.Event()
    (tmp_path / "run").mkdir()
    trackers = Trackers(config, 0, [], said.append)
    monkeypatch.setattr(trackers._open["tensorboard"], "close", lambda failed: forever.wait())
    trackers.close(failed=False)
    forever.set()
    assert len(said) == 1 and "tensorboard may lack the last rows: it did not end within" in said[0]


def test_names_of_figures_are_those_that_every_tracker_takes():
    from fastrm.train.trackers import _figures

    row = {"step": 3, "loss": None, "rewards/accuracies/../a (1).jsonl": 1.0, "eval/sources": {"/data/b:c": {"n": 2}}}
    assert dict(_figures(row)) == {"rewards/accuracies/a _1_.jsonl": 1.0, "eval/sources/data/b_c/n": 2}
