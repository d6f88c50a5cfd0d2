"""The GPU day: whatever a stage does, the figures so far are on disk, the next stage runs and the day ends in time."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu_day
from bench.gpu import runner as gpu_runner
from bench.gpu import stages as gpu_stages
from bench.gpu.runner import Day, Stage, marked, printable
from bench.gpu.stages import faulty_stages, rehearsal, stages
from tests.helpers.project import PROJECT
from tests.helpers.waiting import PATIENCE

WRITE = "import pathlib, sys; pathlib.Path(sys.argv[1], 'figures.json').write_text('{\"a\": 1}'); print('hello')"


def python(name, code, limit=20.0, **options):
    return Stage(name, "a question", (sys.executable, "-c", code, "{out}"), limit, **options)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs stages as a day does; returns the record that is on disk, and checks what holds of every day."""
    monkeypatch.setattr(gpu_runner, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(gpu_runner, "SAVE_SECONDS", 0.1)

    def run(groups, seconds=100.0):
        out, work = tmp_path / "out", tmp_path / "work"
        day = Day(out, work, seconds, {"date": "today", "rehearsal": True}, tmp_path, dict(os.environ))
        day.run(groups)
        gpu_day.draw(day.record, out)
        names = [stage.name for group in groups for stage in group]
        assert not [pid for name in names for pid in marked(f"{os.getpid()}.{name}")], "a process is left"
        assert sorted(file.name for file in out.iterdir() if file.name != "gpu_day.log") == [
            "gpu_day.json", "gpu_day.md",
        ]  # fmt: skip
        record = json.loads((out / "gpu_day.json").read_text())
        assert [stage["name"] for stage in record["stages"]] == names
        text = (out / "gpu_day.md").read_text()
        assert all(f"| {stage['name']} " in text for stage in record["stages"])
        assert all(stage["status"].replace("|", "/") in text for stage in record["stages"])
        return {stage["name"]: stage for stage in record["stages"]}, out

    return run


def test_no_fault_of_a_stage_reaches_the_next(run, monkeypatch):
    """A hang with a child in a session of its own, no memory, SIGKILL, garbage and endless output."""
    monkeypatch.setattr(gpu_runner, "OUTPUT_BYTES", 4 << 20)
    found, out = run([[python("first", WRITE)], *faulty_stages(), [python("last", WRITE)]])
    assert {name: stage["status"] for name, stage in found.items()} == {
        "first": "done", "fault-hang": "killed: over its limit of 3 s", "fault-memory": "failed: exit 1",
        "fault-death": "died: SIGKILL", "fault-garbage": "done", "fault-flood": "killed: wrote more than 4 MiB",
        "last": "done",
    }  # fmt: skip
    assert found["first"]["results"] == found["last"]["results"] == {"figures.json": {"a": 1}}
    assert found["fault-death"]["results"] == {"before.json": [1]}, "not what a dying stage had written whole"
    assert "MemoryError" in found["fault-memory"]["tail"]
    garbage = found["fault-garbage"]["tail"]
    assert garbage and garbage == printable(garbage) and len(garbage) <= gpu_runner.TAIL_CHARACTERS
    log = (out / "gpu_day.log").read_bytes()
    assert b"hello" in log and b"bytes left out" in log
    assert len(log) < 8 * (gpu_runner.LOG_HEAD_BYTES + gpu_runner.LOG_TAIL_BYTES)


def test_output_that_grows_while_it_is_read_is_read_to_a_bound(tmp_path):
    """A stage in endless output once wrote as fast as the day read: 25 GB of disk and 20 of memory."""

    class Growing(io.BytesIO):
        def read(self, size=-1):
            assert size >= 0, "reads up to an end that does not come"
            return super().read(size)

    class Output:
        def open(self, mode):
            return Growing(b"x" * (2 << 20))

    entry = {"limit": 20.0}
    one = gpu_runner.Running(python("a", WRITE), entry, tmp_path, dict(os.environ), tmp_path)
    one._output = Output()
    one.stop("enough")
    assert len(entry["tail"]) == gpu_runner.TAIL_CHARACTERS
    assert len(one.log()) < 2 * (gpu_runner.LOG_HEAD_BYTES + gpu_runner.LOG_TAIL_BYTES)


def test_stages_of_a_group_run_side_by_side(run):
    """Each waits for the other to begin."""
    code = (
        "import pathlib, sys, time\nwork = pathlib.Path(sys.argv[1]).parents[1]\n"
        "mine, other = work / 'a.here', work / 'b.here'\n"
        "{swap}\nmine.touch()\nwhile not other.exists(): time.sleep(0.01)"
    )
    a, b = python("a", code.format(swap="")), python("b", code.format(swap="mine, other = other, mine"))
    found, _ = run([[a, b]])
    assert [stage["status"] for stage in found.values()] == ["done", "done"]


def test_the_day_ends_in_time(run, monkeypatch):
    """A stage gets what is left, and one that cannot do with it is left out."""
    monkeypatch.setattr(gpu_runner, "END_SECONDS", 1)
    sleep = "import time; time.sleep(3600)"
    start = time.monotonic()
    found, _ = run([[python("long", sleep, 500, least=1)], [python("late", WRITE, 500, least=1)]], seconds=3)
    assert time.monotonic() - start < 30
    limit = found["long"]["limit"]
    assert 0 < limit <= 2 and found["long"]["status"] == f"killed: over its limit of {limit:.0f} s"
    assert found["late"]["status"] == "left out: out of time, 0 s are left"


def test_the_budget_of_a_command_is_its_limit_less_a_margin(run):
    command = (sys.executable, "-c", "import sys; print(sys.argv[1:])", "--budget={budget}")
    stage = Stage("a", "?", command, 50, margin=8)
    found, _ = run([[stage]])
    assert "--budget=42" in found["a"]["tail"]


def test_a_training_run_hands_over_its_summary_and_no_other_file(run):
    code = (
        "import pathlib, sys; run = pathlib.Path(sys.argv[1]) / 'run'; (run / 'model').mkdir(parents=True)\n"
        "for name in ('summary.json', 'other.json', 'model/config.json'): (run / name).write_text('{}')"
    )
    found, _ = run([[python("a", code)]])
    assert found["a"]["results"] == {"summary.json": {}}


def test_without_a_required_stage_nothing_is_measured(run):
    found, _ = run([[python("facts", "print('no device'); raise SystemExit(1)", required=True)], [python("a", WRITE)]])
    assert found["facts"]["status"] == "failed: exit 1" and found["facts"]["tail"] == "no device\n"
    assert found["a"]["status"] == "left out: nothing can be measured without facts"


def test_a_command_that_cannot_be_started_is_a_failed_stage(run):
    found, _ = run([[Stage("a", "?", ("/no/such/program",), 20)], [python("b", WRITE)]])
    assert found["a"]["status"].startswith("failed: cannot be started") and found["b"]["status"] == "done"


def test_a_table_that_cannot_be_drawn_costs_no_figure(run, monkeypatch, capsys):
    monkeypatch.setattr(gpu_day, "day_lines", lambda record: 1 / 0)
    with pytest.raises(AssertionError, match=r"gpu_day.json"):  # there is no gpu_day.md
        run([[python("a", WRITE)]])
    assert "no tables: ZeroDivisionError" in capsys.readouterr().out


DAY = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from bench.gpu_day import run
from bench.gpu.runner import Stage
def python(name, code): return [Stage(name, "a question", (sys.executable, "-c", code, "{{out}}"), 300)]
slow = {write!r} + "; import time; time.sleep(3600)"
sys.exit(run([python("first", {write!r}), python("slow", slow), python("after", {write!r})], Path({out!r}), 900, True))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_a_day_that_is_ended_from_outside_keeps_its_figures(tmp_path, number):
    code = DAY.format(root=str(PROJECT), write=WRITE, out=str(tmp_path / "out"))
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # one that is killed leaves its work there
    day = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    file, deadline = tmp_path / "out" / "gpu_day.json", time.monotonic() + PATIENCE
    while "hello" not in _tail_of(file, "slow"):
        assert time.monotonic() < deadline and day.poll() is None
        time.sleep(0.05)
    day.send_signal(number)
    said, _ = day.communicate(timeout=PATIENCE)
    record = json.loads(file.read_text())
    statuses = {stage["name"]: stage["status"] for stage in record["stages"]}
    assert all(s["results"] == {"figures.json": {"a": 1}} for s in record["stages"][:2])
    if number == signal.SIGKILL:
        assert statuses == {"first": "done", "slow": "running"}
        while marked(f"{day.pid}.slow"):
            assert time.monotonic() < deadline, "the stage outlives its day"
            time.sleep(0.05)
        return
    assert day.returncode == 128 + number
    assert statuses == {
        "first": "done", "slow": f"stopped: {number.name}", "after": f"left out: the day was stopped by {number.name}",
    }  # fmt: skip
    assert "not run: --only after" in said and "# GPU day" in (tmp_path / "out" / "gpu_day.md").read_text()
    assert not marked(f"{day.pid}.slow")


def _tail_of(file, name):
    if not file.exists():
        return ""
    return next((s.get("tail", "") for s in json.loads(file.read_text())["stages"] if s["name"] == name), "")


# The stages themselves


def test_stages_can_be_chosen_by_name():
    groups = stages(Path("wheels"))
    kept = [stage.name for group in gpu_day.chosen(groups, "update,memory") for stage in group]
    assert kept == ["unpack", "facts", "update", "memory"]
    assert gpu_day.chosen(groups, None) is groups
    with pytest.raises(SystemExit, match="--only nothing: no such stage; there are unpack, facts, tests"):
        gpu_day.chosen(groups, "nothing")


def test_every_stage_has_a_script_and_names_are_file_names():
    for groups in (stages(None), rehearsal(Path("wheels"))):
        found = [stage for group in groups for stage in group]
        assert len({stage.name for stage in found}) == len(found)
        for stage in found:
            assert set(stage.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-B")
            if stage.command[1].startswith("bench/"):
                assert (PROJECT / stage.command[1]).is_file(), stage.command


def test_the_first_question_is_correctness_and_most_of_the_day_fits():
    groups = stages(Path("wheels"))
    names = [[stage.name for stage in group] for group in groups]
    assert names[:4] == [
        ["unpack"], ["facts"], ["tests", "train-defaults", "train-everything"], ["kernels-quick"],
    ]  # fmt: skip
    # The main workload is begun even where every stage before takes all of its time.
    before = sum(max(stage.limit for stage in group) for group in groups[:4])
    main = next(stage for group in groups for stage in group if stage.name == "step-7B")
    assert before + main.limit <= gpu_day.SECONDS - gpu_runner.END_SECONDS + 15


def test_gpu_tests_are_found_by_their_marker():
    assert "kernels/tests/test_tree_attention_triton.py" in gpu_stages.gpu_tests()
    assert "tests/project/test_config.py" not in gpu_stages.gpu_tests()
