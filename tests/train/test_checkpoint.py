"""A writer of checkpoints that is killed, or fails, at any moment leaves an intact one."""

import itertools
import json
import os
from pathlib import Path

import pytest
import torch

from fastrm.errors import StorageError
from fastrm.train import checkpoint as checkpoints
from fastrm.train.resume import find_start

NAME = "step-00000006"


class OneWeight:
    """An engine of one weight with a value."""

    def __init__(self, value: float):
        self._value = value

    def model_tensors(self):
        yield "weight", torch.full((3,), self._value)

    def optimizer_tensors(self):
        yield "exp_avg.weight", torch.full((3,), self._value)


class Killed(BaseException):
    """No Exception: nothing cleans up after it, as after SIGKILL."""


def save(folder: Path, value: float) -> None:
    checkpoints.save_checkpoint(folder, 6, OneWeight(value), {"value": value})


def value_of(checkpoint: Path) -> float:
    return json.loads((checkpoint / "state.json").read_text())["value"]


def kill_at(monkeypatch, moment: int) -> None:
    """Raise Killed in place of the change of files with this number, counted from now on."""
    numbers = itertools.count()

    def killed_at(original):
        def change(*arguments, **options):
            if next(numbers) == moment:
                raise Killed
            return original(*arguments, **options)

        return change

    for name in ("mkdir", "rename", "unlink", "rmdir", "fsync"):
        monkeypatch.setattr(os, name, killed_at(getattr(os, name)))


def test_a_writer_killed_at_any_moment_of_saving_a_step_again_leaves_an_intact_checkpoint(tmp_path, monkeypatch):
    """The same step is saved twice when its evaluation was interrupted, or comes after its checkpoint."""
    found = []
    for moment in itertools.count():
        folder = tmp_path / str(moment) / "checkpoints"
        save(folder, 1.0)
        with monkeypatch.context() as patched:
            kill_at(patched, moment)
            try:
                save(folder, 2.0)
                is_killed = False
            except Killed:
                is_killed = True
        said = []
        start = find_start(folder.parent, "auto", said.append)
        assert (start, said) == (folder / NAME, []), f"killed at change {moment}"
        assert checkpoints.verify(start) is None
        assert os.listdir(folder) == [NAME], "what the writer has left is cleaned up"
        found.append(value_of(start))
        if not is_killed:
            break
    # First the old one, from the moment of its replacement on the new one.
    assert found == sorted(found) and found.count(1.0) > 5 and found.count(2.0) > 5


def test_of_two_checkpoints_of_a_step_the_intact_one_is_found(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    save(folder, 1.0)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.shutil, "rmtree", lambda *arguments, **options: None)  # the old one stays
        save(folder, 2.0)
    assert len(os.listdir(folder)) == 2
    (folder / NAME / "model.safetensors").write_bytes(b"damaged")
    assert value_of(find_start(tmp_path, "auto", print)) == 1.0
    assert os.listdir(folder) == [NAME]


def test_a_checkpoint_that_cannot_be_renamed_into_place_leaves_the_old_one_as_it_was(tmp_path, monkeypatch):
    folder, original = tmp_path / "checkpoints", os.rename
    save(folder, 1.0)

    def rename(source, target):
        if ".tmp-" in str(source):
            raise OSError(5, "Input/output error")
        original(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", rename)
        with pytest.raises(StorageError, match="could not be written"):
            save(folder, 2.0)
    assert os.listdir(folder) == [NAME] and value_of(folder / NAME) == 1.0
    assert checkpoints.verify(folder / NAME) is None
