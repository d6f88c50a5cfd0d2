"""Files of rows: formats, ranges of rows, damage."""

import gzip
import json
import pickle
import time
import zipfile

import pytest

from fastrm.data.quarantine import Quarantine
from fastrm.data.record import ImageRef
from fastrm.data.sources import files, read_source, source_files
from fastrm.data.sources.files import count_rows, read_rows
from fastrm.data.sources.values import unique_keys
from fastrm.errors import DataError, RecordError
from tests.helpers.source_rows import FLAT, png, read, shape, turns


def test_jsonl_goes_on_after_bad_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(FLAT).encode()
    lines = [
        b"\xef\xbb\xbf" + good, b"", b"{broken", b"   ", good, b'{"prompt": "\xff"}', good + good, b"\0\0",
        b"[" * 100_000, b'{"prompt": ' + b"1" * 5000 + b"}", good + b"\r", good,
    ]  # fmt: skip
    path.write_bytes(b"\n".join(lines))
    records, refused = read(path)
    assert [r.origin for r in records] == [f"{path}:{n}" for n in (1, 5, 11, 12)]
    codes = {3: "BAD_JSON", 6: "BAD_TEXT", 7: "BAD_JSON", 8: "BAD_JSON", 9: "BAD_JSON", 10: "BAD_JSON"}
    assert [(origin, code) for origin, code, _ in refused] == [(f"{path}:{n}", c) for n, c in codes.items()]


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n")
    for place in (path, tmp_path):
        with pytest.raises(DataError, match=r"rows\.jsonl\" is a pointer of Git LFS; run git lfs pull in its folder"):
            source_files(place)


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"version": 1, "data": rows}])
def test_json_is_a_list_or_an_object_with_one(tmp_path, wrap):
    path = tmp_path / "rows.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(wrap([FLAT, 3, FLAT])).encode())
    records, refused = read(path)
    assert [r.origin for r in records] == [f"{path}:1", f"{path}:3"]
    assert [origin for origin, _, _ in refused] == [f"{path}:2"]


@pytest.mark.parametrize(
    "content, part",
    [
        (b'{"a": [], "b": []}', "an object with 2 lists"),
        (b'{"a": 1}', "an object with 0 lists"),
        (b"3", "a number"),
        (b"[", "not JSON in UTF-8"),
        (b'["\xff"]', "not JSON in UTF-8"),
    ],
)
def test_json_of_another_shape_is_a_data_error(tmp_path, content, part):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=part):
        read(path)


GOOD = json.dumps(FLAT)
DOUBLED = {
    "its own": '{"rejected": "worse", ' + GOOD[1:],
    "equal": '{"rejected": ' + json.dumps(FLAT["rejected"]) + ", " + GOOD[1:],
    "nested": GOOD[:-1] + ', "tools": [{"function": {"name": "a", "name": "b"}}]}',
    "in text": GOOD[:-1] + ', "tools": ' + json.dumps('[{"type": "function", "type": "f"}]') + "}",
}
FILES = {
    "rows.jsonl": "\n".join,
    "lines.json": "\n".join,
    "list.json": lambda rows: f"[{', '.join(rows)}]",
    "object.json": lambda rows: f'{{"version": 1, "data": [{", ".join(rows)}]}}',
}


@pytest.mark.parametrize("name", FILES)
def test_a_key_that_stands_twice_refuses_its_row(tmp_path, name):
    """Python would take the last of them, and a row that was put together wrongly be trained on in silence."""
    path = tmp_path / name
    path.write_text(FILES[name]([*DOUBLED.values(), GOOD]))
    records, refused = read(path)
    assert [record.origin for record in records] == [f"{path}:{len(DOUBLED) + 1}"]
    keys = ("rejected", "rejected", "name", "type")
    assert [(origin, code) for origin, code, _ in refused] == [
        (f"{path}:{number}", "DUPLICATE_KEY") for number in range(1, len(DOUBLED) + 1)
    ]
    for (_, _, message), key in zip(refused, keys, strict=True):
        assert message == f'the key "{key}" stands twice in one object; keep one of them'


def test_a_list_of_rows_that_stands_twice_is_a_data_error(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(f'{{"data": [], "data": [{GOOD}]}}')
    with pytest.raises(DataError, match=r'rows.json": the key "data" stands twice'):
        read(path)


def write_parquet(path, rows, **options):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)


def test_parquet_with_embedded_images_and_null_columns(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = [{**FLAT, "image": {"bytes": png(), "path": None}}] * 40
    rows.append({"chosen": None, "messages": turns("p", "a"), "rejected_response": "b"})
    rows.append({**FLAT, "image": {"bytes": None, "path": "a.png"}, "messages": None})
    columns = sorted({key for row in rows for key in row})
    write_parquet(path, [{key: row.get(key) for key in columns} for row in rows], row_group_size=10)
    records, refused = read(path)
    assert refused == []
    assert [r.origin for r in records] == [f"{path}:{n}" for n in range(1, 43)]
    assert records[39].media == (ImageRef(data=png()),)
    assert shape(records[40], 1) == [("user", "p"), ("assistant", "b")]
    assert records[41].media == (ImageRef(path=str(tmp_path / "a.png")),)


def test_parquet_with_text_that_is_not_utf8(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    text = pyarrow.array([b"ok", b"\xff", b"ok"]).view(pyarrow.utf8())
    columns = {"prompt": text, "chosen": ["a"] * 3, "rejected": ["b"] * 3}
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    records, refused = read(path)
    assert [r.origin for r in records] == [f"{path}:1", f"{path}:3"]
    assert [(origin, code) for origin, code, _ in refused] == [(f"{path}:2", "BAD_TEXT")]


def test_damaged_parquet_is_a_data_error(tmp_path):
    path = tmp_path / "rows.parquet"
    write_parquet(path, [FLAT] * 10)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="damaged after row 0"):
        read(path)


def test_folder_is_read_in_the_order_of_names(tmp_path):
    (tmp_path / "b.jsonl").write_text(json.dumps({**FLAT, "image": "a.png"}) + "\n{")
    (tmp_path / "a.json").write_text(json.dumps([FLAT]))
    (tmp_path / ".hidden.json").write_text("{")
    (tmp_path / "notes.txt").write_text("x")
    write_parquet(tmp_path / "c.parquet", [FLAT])
    records, refused = read(tmp_path)
    assert [r.source for r in records] == ["a", "b", "c"]
    assert records[1].media == (ImageRef(path=str(tmp_path / "a.png")),)
    assert [origin for origin, _, _ in refused] == [f"{tmp_path}/b.jsonl:2"]


@pytest.mark.parametrize(
    "name, options, part",
    [
        ("absent.jsonl", {}, "does not exist; wanted one of .jsonl, .jsonl.gz, .json, .parquet"),
        ("rows.csv", {}, "is not a data file"),
        ("empty", {}, "a folder without data files"),
        ("rows.jsonl", {"format": "xml"}, 'format "xml" is unknown; wanted one of auto, '),
        ("rows.jsonl", {"format": "digits"}, "wanted digits:train or digits:eval"),
        ("rows.jsonl", {"images": "absent"}, 'images "absent" does not exist'),
        ("rows.jsonl", {"images": __file__}, "is not a folder and not a .tar or .zip"),
    ],
)
def test_source_that_cannot_be_read_is_a_data_error_at_once(tmp_path, name, options, part):
    (tmp_path / "empty").mkdir()
    for file in ("rows.csv", "rows.jsonl"):
        (tmp_path / file).write_text("")
    with pytest.raises(DataError, match=part):
        read_source(tmp_path / name, quarantine=Quarantine(None), **options)


def test_reading_12_000_flat_rows_is_fast(read_json_rows):
    rows = [{**FLAT, "id": str(i), "image": f"train/images/{i}.png"} for i in range(12_000)]
    start = time.process_time()  # which other processes do not lengthen
    records, _ = read_json_rows(*rows)
    assert len(records) == 12_000
    assert time.process_time() - start < 5  # measured 0.8 s


# Ranges of rows


def write_rows(path, count):
    """A file of `count` flat rows with one damaged line or null column, of every format."""
    rows = [{**FLAT, "id": str(number)} for number in range(count)]
    if path.suffix == ".parquet":
        write_parquet(path, rows, row_group_size=7)
    elif path.name.endswith(".json"):
        path.write_text(json.dumps(rows))
    else:
        lines = [json.dumps(row) for row in rows]
        lines[2], lines[5] = "", "{"
        text = "\n".join(lines).encode()
        if path.suffix == ".gz":
            text = gzip.compress(text)
        path.write_bytes(text)
    return str(path)


FILE_NAMES = ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.parquet"]


@pytest.mark.parametrize("name", FILE_NAMES)
def test_every_range_of_rows_is_that_of_a_whole_read(tmp_path, name, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 100)  # ranges begin inside, at and behind block ends
    file = write_rows(tmp_path / name, 20)
    whole = [(number, str(row)) for number, row in read_rows(file)]
    assert count_rows(file) == 20
    for start in range(22):
        for stop in [None, *range(start, 22)]:
            part = [(number, str(row)) for number, row in read_rows(file, start, stop)]
            assert part == [(n, row) for n, row in whole if start < n and (stop is None or n <= stop)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_rows_before_a_range_are_not_parsed(tmp_path, name, monkeypatch):
    file = write_rows(tmp_path / name, 100)
    parsed = []
    monkeypatch.setattr(files, "_parse_line", lambda line: parsed.append(line))
    monkeypatch.setattr(files, "batch_rows", lambda batch: parsed.extend(range(batch.num_rows)) or [])
    list(read_rows(file, 90, 93))
    assert len(parsed) == 3


def test_rows_behind_a_range_are_not_decoded(tmp_path, monkeypatch):
    import pyarrow.parquet

    file, decoded = write_rows(tmp_path / "rows.parquet", 200), []
    iter_batches = pyarrow.parquet.ParquetFile.iter_batches

    def counted(table, **options):
        for batch in iter_batches(table, **options):
            decoded.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(files, "PARQUET_BATCH_ROWS", 2)
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", counted)
    assert [number for number, _ in read_rows(file, 1, 4)] == [2, 3, 4]
    assert sum(decoded) == 4


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.zip!rows.jsonl"])
def test_a_range_unpacks_nothing_twice(tmp_path, name, monkeypatch):
    rows = [{"row": number, "text": "x" * 100} for number in range(100)]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(text))
    with zipfile.ZipFile(tmp_path / "rows.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.jsonl", text)
    monkeypatch.setattr(files, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(gzip.GzipFile, "seek", lambda *_: pytest.fail("went back"))
    monkeypatch.setattr(zipfile.ZipExtFile, "seek", lambda *_: pytest.fail("went back"))
    assert list(read_rows(str(tmp_path / name), 55, 57)) == [(56, rows[55]), (57, rows[56])]


def test_last_line_may_end_without_a_newline(tmp_path):
    path = tmp_path / "rows.jsonl"
    for text, count in ((b"", 0), (b"{}", 1), (b"{}\n", 1), (b"{}\n\n", 2), (b"{}\n{}", 2)):
        path.write_bytes(text)
        assert count_rows(str(path)) == count


def test_lines_of_json_in_a_json_file_are_rows(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(FLAT) + "\n" + "{\n" + json.dumps(FLAT) + "\n")
    records, refused = read(path)
    assert [r.origin for r in records] == [f"{path}:1", f"{path}:3"]
    assert [code for _, code, _ in refused] == ["BAD_JSON"]
    assert count_rows(str(path)) == 3


def test_json_document_over_many_lines_stays_one(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([FLAT, FLAT], indent=1))
    assert len(read(path)[0]) == count_rows(str(path)) == 2


def test_damaged_gzip_is_a_data_error(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(FLAT).encode() * 1000)[:-9])
    for function in (read, lambda file: count_rows(str(file))):
        with pytest.raises(DataError, match=r"rows\.jsonl\.gz"):
            function(path)


def test_file_inside_a_zip_is_read_in_place(tmp_path):
    with zipfile.ZipFile(tmp_path / "annotations.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/rows.jsonl", "".join(json.dumps({**FLAT, "id": str(i)}) + "\n" for i in range(9)))
        archive.writestr("rows.json", json.dumps([FLAT]))
    file = f"{tmp_path}/annotations.zip!x/rows.jsonl"
    assert count_rows(file) == 9
    assert [row["id"] for _, row in read_rows(file, 7)] == ["7", "8"]
    assert files.file_stem(file) == "rows"
    assert count_rows(f"{tmp_path}/annotations.zip!rows.json") == 1
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        list(read_rows(f"{tmp_path}/annotations.zip!absent.jsonl"))


def test_files_of_a_source_can_be_read_in_other_processes(tmp_path):
    file = source_files(write_rows(tmp_path / "rows.jsonl", 20))[0]
    copy = pickle.loads(pickle.dumps(file))
    assert list(copy.read(3, 9)) == list(file.read(3, 9))
    assert len(list(copy.read(3, 9))) == 6


def test_digits_have_ranges_like_files():
    (file,) = source_files("digits:eval", name="mine")
    whole = list(file.read())
    assert file.count_rows() == len(whole) == 605
    assert list(file.read(600)) + list(file.read(0, 600)) == whole[600:] + whole[:600]
    assert {record.source for record in whole} == {"mine"}


def test_a_key_that_stands_twice_is_found_in_one_pass():
    class Key(str):
        num_compared = 0
        __hash__ = str.__hash__

        def __eq__(self, other):
            Key.num_compared += 1
            return str.__eq__(self, other)

    pairs = [(Key(number), 0) for number in range(300)]
    with pytest.raises(RecordError, match='"299" stands twice'):
        unique_keys([*pairs, (Key(299), 0)])
    assert Key.num_compared < 3 * len(pairs)
