"""The file in which texts are kept: what is in it stays, whosever it is."""

import json
import subprocess
import sys

import pytest

from fastrm.errors import StorageError
from fastrm.judge.questions import JudgeQuestion, Written
from fastrm.judge.store import GenerationStore

QUESTIONS = [JudgeQuestion(f"r{n}", (0, 1), "", f"Which, {n}?", (), "m", f"x:{n}") for n in range(3)]
LINES = [
    json.dumps({"id": one.id, "order": [0, 1], "text": f"text {one.id}", "key": one.key}).encode() for one in QUESTIONS
]
PRECIOUS = b'{"a": 1, "precious": true}'


def texts(path):
    store = GenerationStore(path)
    found = [one.text for one in store.generations(QUESTIONS)]
    store.close()
    return found


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (PRECIOUS, 1),
        (PRECIOUS + b"\n" + PRECIOUS, 1),
        (LINES[0] + b"\n" + PRECIOUS, 2),
        (LINES[0] + b"\n" + PRECIOUS + b"\n" + LINES[1][:30], 2),
        (LINES[0] + b"\na note, without a newline", 2),
        (LINES[0] + b'\n{"id": "r1", "text": "of another program"}', 2),
        (LINES[0][:30], 1),  # no other line says that this is a store
        (b"[" * 100_000, 1),
    ],
    ids=["one row", "two rows", "row behind ours", "row between", "note", "no key", "half alone", "deep"],
)  # fmt: skip
def test_a_file_of_something_else_is_refused_and_stays_as_it_is(tmp_path, content, line):
    path = tmp_path / "texts.jsonl"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=rf'texts.jsonl:{line}: wanted a line with "key" and "text".*--generations'):
        GenerationStore(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("half", [b"{", LINES[1][:30], LINES[1][:-1], b"\0" * 9, LINES[1][:30] + b"\0" * 9], ids=repr)
def test_half_a_line_behind_lines_of_ours_is_cut_off(tmp_path, half):
    path = tmp_path / "texts.jsonl"
    path.write_bytes(LINES[0] + b"\n" + half)
    store = GenerationStore(path)
    assert [one.id for one in store.missing(QUESTIONS)] == ["r1", "r2"]
    store.add(Written(QUESTIONS[1], "again"))
    store.close()
    assert texts(path) == ["text r0", "again"] and len(path.read_bytes().splitlines()) == 2
    path.write_bytes(path.read_bytes()[:-5])  # of a line as it is written now
    assert texts(path) == ["text r0"]


@pytest.mark.parametrize("before", [b"", LINES[0] + b"\n"], ids=["alone", "behind another"])
def test_a_whole_last_line_without_its_newline_is_kept(tmp_path, before):
    path = tmp_path / "texts.jsonl"
    path.write_bytes(before + LINES[1])
    store = GenerationStore(path)
    store.add(Written(QUESTIONS[2], "the third"))
    store.close()
    assert texts(path)[-2:] == ["text r1", "the third"]
    assert path.read_bytes().startswith(before + LINES[1] + b"\n")


def test_one_command_at_a_time_has_the_file(tmp_path):
    path = tmp_path / "texts.jsonl"
    code = "import sys; from pathlib import Path; from fastrm.judge.store import GenerationStore\n"
    code += "store = GenerationStore(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match=r"texts.jsonl: in use by another process; wait for it, or .*--generati"):
            GenerationStore(path)
        holder.stdin.close()
    assert holder.returncode == 0 and texts(path) == []
