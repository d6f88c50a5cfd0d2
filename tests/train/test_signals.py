"""SIGTERM and Ctrl-C end every command with exit code 75, whatever it is doing, and cost nothing that was done."""

import json
import os
import random
import signal
import time

import psutil
import pytest

from fastrm import stop as stop_module
from fastrm.stop import StopFlag
from tests.helpers.killed_runs import assert_same, outcome
from tests.helpers.runs import colour_rows, tiny_config, write_rows
from tests.helpers.waiting import PATIENCE, wait_until

MOMENTS = 50


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return colour_rows(tmp_path_factory.mktemp("data"), 24)


def make_config(folder, data, **sections):
    run = {"max_steps": 4, "log_every": 1, "save_every": 3, "eval_every": 2}
    return tiny_config(folder, data, data, run=run, data={"num_workers": 1}, **sections)


@pytest.fixture(scope="module")
def unbroken(server, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    server.start(make_config(folder, data), "no")
    assert server.wait() == 0, (folder / "config.yaml.log").read_text()
    return folder / "run"


def has_ended(pid) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def stop(server, pid, number, send) -> int:
    """Send a signal, and wait for the process and all of its children; returns the exit code."""
    children = psutil.Process(pid).children(recursive=True)
    send(pid, number)
    wait_until(lambda: has_ended(pid))
    code = server.wait()
    psutil.wait_procs(children, timeout=PATIENCE)
    assert not any(child.is_running() for child in children)
    return code


def stop_when_stuck(server, pid, log, number=signal.SIGTERM, send=os.killpg):
    """The exit code, and what the command has said last, as JSON."""
    try:
        wait_until(lambda: log.exists() and "\nstuck\n" in log.read_text())
        code = stop(server, pid, number, send)
    except AssertionError:
        os.killpg(pid, signal.SIGKILL)
        server.wait()
        raise
    return code, json.loads(log.read_text().splitlines()[-1])


@pytest.mark.parametrize(
    ("work", "said"),
    [
        ("loading", "stopped by SIGTERM before the first step; start again"),
        pytest.param("passing", "stopped by SIGTERM after step 0; checkpoint saved", marks=pytest.mark.slow),
        ("evaluating", "stopped by SIGTERM after step 2; checkpoint saved"),
        ("exporting", "stopped by SIGTERM after step 4; checkpoint saved"),
        ("swallowing", "stopped by SIGTERM, out of order; what was saved before is intact"),
    ],
)
def test_a_signal_ends_a_run_that_is_stuck_and_it_resumes_to_the_bit(server, data, unbroken, tmp_path, work, said):
    config = make_config(tmp_path, data)
    log = tmp_path / "config.yaml.log"
    code, last = stop_when_stuck(server, server.start(config, patch=f"stuck_work.{work}"), log)
    assert code == 75 and last["exit_code"] == 75 and said in last["message"], log.read_text()[-2000:]
    assert not (tmp_path / "run" / "model").exists()
    server.start(config)
    assert server.wait() == 0, log.read_text()[-2000:]
    assert_same(tmp_path / "run", outcome(unbroken))
    assert not [path for path in (tmp_path / "run").rglob("*") if ".part" in path.name or ".tmp" in path.name]


@pytest.fixture(scope="module")
def files(data):
    """The same rows in four files, which as many processes can read."""
    rows = data.read_text().splitlines()
    return [write_rows(data.with_name(f"{n}.jsonl"), rows[n::4]) for n in range(4)]


def preparation(folder, files, num_workers: int) -> list:
    sources = [{"path": str(path)} for path in files]
    config = tiny_config(folder, files[0], files[0], data={"train": sources})
    return ["data", "prepare", config, "--workers", num_workers]


@pytest.mark.parametrize("send", [pytest.param(os.kill, marks=pytest.mark.slow), os.killpg], ids=["process", "group"])
def test_a_signal_ends_a_preparation_with_processes_which_goes_on(server, files, tmp_path, send):
    arguments, log = preparation(tmp_path, files, 2), tmp_path / "log"
    code, last = stop_when_stuck(server, server.command(arguments, log, "stuck_work.reading"), log, signal.SIGINT, send)
    assert code == 75 and last["message"].startswith("stopped by SIGINT; the parts that are done are kept")
    server.command(arguments, log)
    assert server.wait() == 0, log.read_text()[-2000:]
    assert (tmp_path / "run" / "prepared" / "manifest.json").exists()


def test_a_process_that_prepares_data_and_was_not_ended_keeps_no_command_from_leaving(server, files, tmp_path):
    arguments, log = preparation(tmp_path, files, 2), tmp_path / "log"
    code, last = stop_when_stuck(server, server.command(arguments, log, "stuck_work.reading_for_ever"), log)
    assert code == 75 and last["message"].startswith("stopped by SIGTERM; the parts that are done are kept")


def test_a_library_that_no_signal_interrupts_keeps_no_command_from_leaving(server, files, tmp_path):
    arguments, log = preparation(tmp_path, files, 1), tmp_path / "log"
    code, last = stop_when_stuck(server, server.command(arguments, log, "stuck_work.reading_deaf"), log)
    assert code == 75 and last["message"] == "stopped by SIGTERM, out of order; what was saved before is intact"


def test_a_flag_that_is_left_slowly_finds_its_pipe_open_and_leaves_none(monkeypatch):
    """Its thread looks every half second; whoever writes to the pipe afterwards must not find it closed."""
    tell = StopFlag._tell
    monkeypatch.setattr(stop_module, "_NUDGE_SECONDS", 0.001)
    monkeypatch.setattr(StopFlag, "_tell", lambda *arguments: time.sleep(0.05) or tell(*arguments))
    files = len(os.listdir("/proc/self/fd"))
    with StopFlag() as flag:
        os.kill(os.getpid(), signal.SIGTERM)
    assert flag.signal == "SIGTERM"
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= files)


@pytest.mark.parametrize("command", ["score", pytest.param("eval", marks=pytest.mark.slow)])
def test_a_signal_ends_scoring_whose_worker_is_stuck_and_leaves_no_file(server, data, unbroken, tmp_path, command):
    log, out = tmp_path / "log", {"score": "--out", "eval": "--json"}[command]
    arguments = [command, unbroken / "model", data, out, tmp_path / "out", "--num-workers", "1"]
    code, last = stop_when_stuck(server, server.command(arguments, log, "stuck_work.scoring"), log)
    assert code == 75 and last["message"] == "stopped by SIGTERM; nothing was written", log.read_text()[-2000:]
    assert os.listdir(tmp_path) == ["log"]


def test_a_pack_that_its_worker_cannot_send_is_an_error_and_is_not_waited_for(server, data, tmp_path):
    config, log = make_config(tmp_path, data), tmp_path / "config.yaml.log"
    pid = server.start(config, patch="stuck_work.unsent")
    wait_until(lambda: has_ended(pid))
    assert server.wait() == 74 and "a data worker cannot send a pack" in log.read_text()
    assert "(/dev/shm; docker run --shm-size)" in json.loads(log.read_text().splitlines()[-1])["message"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_signals_at_random_moments_of_a_run_with_workers(server, data, unbroken, tmp_path, seed):
    """Ten of MOMENTS each: whatever the run is doing, it ends in ten seconds, and goes on to the bit."""
    rng, slowest = random.Random(seed), 0.0
    folder = 0
    for _ in range(MOMENTS // 5):
        here = tmp_path / str(folder)
        here.mkdir(exist_ok=True)
        config = make_config(here, data)
        pid = server.start(config)
        time.sleep(rng.uniform(0.1, 3.5))
        if not has_ended(pid):
            number, send = rng.choice([signal.SIGTERM, signal.SIGINT]), rng.choice([os.kill, os.killpg])
            began = time.monotonic()
            code = stop(server, pid, number, send)
            slowest = max(slowest, time.monotonic() - began)
        else:
            code = server.wait()
        assert code in (0, 75), (here / "config.yaml.log").read_text()[-2000:]
        if code == 0:
            assert_same(here / "run", outcome(unbroken))
            folder += 1
    server.start(config)
    assert server.wait() == 0, (here / "config.yaml.log").read_text()[-2000:]
    assert_same(here / "run", outcome(unbroken))
    print(f"slowest to leave: {slowest:.1f} s")
    assert slowest < 10
