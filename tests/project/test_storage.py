"""What is written appears whole or not at all, and a folder has one holder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastrm.errors import StorageError
from fastrm.storage import locked_folder, whole_file, whole_folder, write_whole
from tests.helpers.project import PROJECT
from tests.helpers.waiting import PATIENCE


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_whole_and_the_only_one(tmp_path):
    with whole_file(tmp_path / "rows") as write:
        write("ä\n")
        write(b"\x00")
        assert names(tmp_path) == ["rows.part"]
    assert (tmp_path / "rows").read_bytes() == "ä\n".encode() + b"\x00" and names(tmp_path) == ["rows"]


def test_after_an_error_the_older_file_stays_alone(tmp_path):
    write_whole(tmp_path / "rows", "old")
    with pytest.raises(ValueError, match="of the work"), whole_file(tmp_path / "rows") as write:
        write("new")
        raise ValueError("of the work")
    assert (tmp_path / "rows").read_text() == "old" and names(tmp_path) == ["rows"]


def test_an_error_of_the_work_is_not_taken_for_one_of_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="picture"), whole_file(tmp_path / "rows"):
        raise FileNotFoundError("picture")


def test_a_file_that_several_write_is_one_of_theirs(tmp_path):
    with whole_file(tmp_path / "rows", shared=True) as first:
        first("first")
        child = os.fork()
        if not child:
            with whole_file(tmp_path / "rows", shared=True) as second:
                second("second")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert (tmp_path / "rows").read_text() == "second"
    assert (tmp_path / "rows").read_text() == "first" and names(tmp_path) == ["rows"]


def test_a_folder_is_replaced_or_as_it_was(tmp_path, monkeypatch):
    def write(text: str) -> None:
        with whole_folder(tmp_path / "set") as folder:
            (folder / "file").write_text(text)

    write("old")
    rename = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda path, to: 1 / 0 if path.name == "set.part" else rename(path, to))
        with pytest.raises(ZeroDivisionError):
            write("new")
    assert (tmp_path / "set" / "file").read_text() == "old" and names(tmp_path) == ["set"]
    write("new")
    assert (tmp_path / "set" / "file").read_text() == "new" and names(tmp_path) == ["set"]


def test_no_other_module_gives_names_or_locks_by_itself():
    """But for a checkpoint, whose manifest seals it, and for the weights' files, which are written in place."""
    by_itself = re.compile(r"\bos\.(replace|rename|fsync)\(|\.rename\(|\bfcntl\b")
    found = {path.name for path in (PROJECT / "fastrm").rglob("*.py") if by_itself.search(path.read_text())}
    assert found == {"storage.py", "checkpoint.py", "weight_writer.py"}


def test_a_held_folder_names_its_holder_and_is_free_when_that_has_ended(tmp_path):
    code = "import sys; from pathlib import Path; from fastrm.storage import locked_folder\n"
    code += "with locked_folder(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(StorageError, match=f"in use by pid {holder.pid} on .*; wait for it"), locked_folder(tmp_path):
        pass
    holder.kill()
    holder.communicate(timeout=PATIENCE)
    with locked_folder(tmp_path):
        pass
