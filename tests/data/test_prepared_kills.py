"""Preparing in several processes and lives: killed at any moment, it goes on to the same bytes."""

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from fastrm import storage
from fastrm.config import load_config
from fastrm.data.prepared import build
from fastrm.data.prepared.workers import run_pieces
from fastrm.errors import StorageError
from fastrm.train.data import make_set
from fastrm.train.encoder import prepared_folder
from fastrm.ui import Display
from tests.helpers.prepared_sets import Made, config_of, contents, in_child, mixed_sources, small_pieces
from tests.helpers.runs import text_rows, write_rows


class _Killed:
    """Renames of files count; the process ends by SIGKILL before, or after, one of them."""

    def __init__(self, monkeypatch, number: int, after: bool):
        self.left, self.after = number, after
        for owner, name in ((os, "replace"), (Path, "rename")):
            monkeypatch.setattr(owner, name, self._wrap(getattr(owner, name)))

    def _wrap(self, rename):
        def renamed(*arguments):
            self.left -= 1
            if self.left == 0 and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = rename(*arguments)
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return renamed


def test_killed_at_any_rename_it_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    small_pieces(monkeypatch, rows=40, groups=30)
    config = config_of(tmp_path, *mixed_sources(tmp_path))
    whole = contents(Made(config, f"run.dir={tmp_path / 'whole'}").folder)
    resolved = load_config(config, [f"run.dir={tmp_path / 'killed'}"])

    def child(number, after):
        with pytest.MonkeyPatch.context() as patch:
            _Killed(patch, number, after)
            make_set(resolved, Display(silent=True), 1)

    points = 0
    for number in range(1, 100):
        for after in (False, True):
            shutil.rmtree(tmp_path / "killed", ignore_errors=True)
            process = in_child(child, number, after)
            process.join()
            if process.exitcode == 0:
                assert points >= 20
                return
            assert process.exitcode == -signal.SIGKILL
            points += 1
            make_set(resolved, Display(silent=True), 1)
            assert contents(prepared_folder(resolved)) == whole, (number, after)
    raise AssertionError("the preparation has no end")


@pytest.mark.parametrize("count", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_random_moments_with_two_workers_it_goes_on_to_the_same_bytes(tmp_path, monkeypatch, count):
    small_pieces(monkeypatch)
    config = config_of(tmp_path, *mixed_sources(tmp_path))
    started = time.perf_counter()
    whole = contents(Made(config, f"run.dir={tmp_path / 'whole'}", workers=2).folder)
    usual, rng, kills = time.perf_counter() - started, random.Random(count), 0
    resolved = load_config(config, [f"run.dir={tmp_path / 'killed'}"])
    for number in itertools.count():
        if number >= count and kills:
            break
        process = in_child(make_set, resolved, Display(silent=True), 2)
        process.join(rng.uniform(0, usual) / (1 + number // count))  # a machine may have become faster
        kills += process.is_alive()
        process.kill()
        process.join()
        if rng.random() < 0.5:  # else the next one finds what this one has left, and may be killed as well
            make_set(resolved, Display(silent=True), 2)
            assert contents(prepared_folder(resolved)) == whole
            shutil.rmtree(prepared_folder(resolved))
    make_set(resolved, Display(silent=True), 2)
    assert contents(prepared_folder(resolved)) == whole and kills


def test_a_worker_that_dies_is_an_error_that_says_what_to_do():
    with pytest.raises(StorageError, match=r"a process that prepares data died.*use fewer --workers"):
        list(run_pieces(lambda piece: os.kill(os.getpid(), signal.SIGKILL), [1, 2, 3], 2))


def test_two_processes_do_not_prepare_in_one_folder(tmp_path):
    config = load_config(config_of(tmp_path, *mixed_sources(tmp_path)))
    context = multiprocessing.get_context("fork")
    held, leave = context.Event(), context.Event()

    def hold():
        with storage.locked_folder(prepared_folder(config)):
            held.set()
            leave.wait()

    process = in_child(hold)
    held.wait()
    with pytest.raises(StorageError, match="another process is preparing data there"):
        make_set(config, Display(silent=True), 1)
    leave.set()
    process.join()


def test_a_set_that_is_there_is_read_while_another_run_holds_the_folder(tmp_path):
    made = Made(config_of(tmp_path, *mixed_sources(tmp_path)), f"data.prepared={tmp_path / 'shared'}")
    context = multiprocessing.get_context("fork")
    held, leave = context.Event(), context.Event()

    def hold():
        with storage.locked_folder(made.folder):
            held.set()
            leave.wait()

    process = in_child(hold)
    held.wait()
    assert make_set(made.config, Display(silent=True), 1) is None
    leave.set()
    process.join()


def test_a_file_that_changes_between_two_attempts_is_named_and_read_again(tmp_path, monkeypatch):
    small_pieces(monkeypatch)
    config = config_of(tmp_path, *mixed_sources(tmp_path))
    resolved = load_config(config)

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "load_table", stop)
        with pytest.raises(KeyboardInterrupt):
            make_set(resolved, Display(silent=True), 1)
    write_rows(tmp_path / "text.jsonl", text_rows(20))
    made = Made(config)
    assert f"{tmp_path / 'text.jsonl'} has changed since the last time: it is read again" in made.said
    assert "parts are there already" in made.said and made.row(str(tmp_path / "text.jsonl"))["rows"] == 20
