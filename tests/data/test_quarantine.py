"""Refused records are written at once, counted once, and survive a crash and a resume."""

import json

import pytest

from fastrm.data.quarantine import Quarantine
from fastrm.errors import StorageError


def add(quarantine, origin="a.jsonl:1", code="BAD_JSON", message="not JSON", record_id="r1"):
    quarantine.add(source="a", origin=origin, record_id=record_id, code=code, message=message)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_add_writes_one_row_at_once(tmp_path):
    path = tmp_path / "runs" / "quarantine.jsonl"
    quarantine = Quarantine(path)
    add(quarantine)
    assert rows(path) == [{"source": "a", "origin": "a.jsonl:1", "id": "r1", "code": "BAD_JSON", "message": "not JSON"}]
    quarantine.close()


def test_add_counts_each_origin_and_code_once():
    with Quarantine(None) as quarantine:
        add(quarantine)
        add(quarantine)
        add(quarantine, code="BAD_TEXT")
        add(quarantine, origin="a.jsonl:2")
        assert quarantine.counts == {"BAD_JSON": 2, "BAD_TEXT": 1}
        assert quarantine.total == 3


def test_reopened_file_knows_its_rows(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    with Quarantine(path) as first:
        add(first)
    with Quarantine(path) as resumed:
        assert resumed.counts == {"BAD_JSON": 1}
        add(resumed)
        add(resumed, origin="a.jsonl:2")
        assert resumed.total == 2
    assert [row["origin"] for row in rows(path)] == ["a.jsonl:1", "a.jsonl:2"]


def test_part_of_a_record_is_no_refused_record(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    part = {"source": "a", "origin": "a.jsonl:3", "record_id": "r3", "code": "RATING_MISSING", "message": "left out"}
    with Quarantine(path) as first:
        add(first)
        first.add(**part, partial=True)
        assert (first.total, first.counts, first.partial_counts) == (1, {"BAD_JSON": 1}, {"RATING_MISSING": 1})
    assert [row.get("partial") for row in rows(path)] == [None, True]
    with Quarantine(path) as resumed:
        resumed.add(**part, partial=True)
        assert (resumed.total, resumed.partial_counts) == (1, {"RATING_MISSING": 1})
    assert len(rows(path)) == 2


def test_torn_last_row_is_ended_and_written_again(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    with Quarantine(path) as first:
        add(first)
        add(first, origin="a.jsonl:2")
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with Quarantine(path) as resumed:
        assert resumed.total == 1
        add(resumed, origin="a.jsonl:2")
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    assert b"".join([lines[0], lines[2]]) == whole


def test_rows_of_two_writers_interleave_whole(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    with Quarantine(path) as one, Quarantine(path) as two:
        for i in range(20):
            add(one if i % 2 else two, origin=f"a:{i}", message="x" * 20_000)
    assert [row["origin"] for row in rows(path)] == [f"a:{i}" for i in range(20)]


def test_text_that_utf8_cannot_encode_is_written(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    with Quarantine(path) as quarantine:
        add(quarantine, record_id="\ud800", message="画像 \udfff")
    assert rows(path)[0]["id"] == "\ud800"


def test_unwritable_path_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot be opened.*choose a writable folder"):
        Quarantine(tmp_path / "file" / "quarantine.jsonl")
