"""Rows in memory are the rows of a file: same records, same refusals, whatever holds them."""

import io
import json

import datasets
import numpy as np
import pandas
import pytest
from PIL import Image

from fastrm.data.sources import read_source, source_files
from fastrm.data.sources.in_memory import Rows, write_rows
from fastrm.errors import DataError
from tests.helpers.runs import write_rows as write_file


class Refusals(list):
    def add(self, **about):
        self.append((about["code"], about["record_id"]))


def read(path, **options):
    refused = Refusals()
    return list(read_source(path, quarantine=refused, **options)), refused


def png(colour) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(file, "PNG")
    return file.getvalue()


ROWS = [
    {"id": "a", "prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
    {"id": "b", "prompt": "3 + 2?", "chosen": "5", "rejected": "5"},  # refused: equal responses
    {"id": "c", "prompt": "Ünï?", "chosen": "ja", "rejected": "nein", "url": "there"},
    {"id": "d", "prompt": "No answer"},  # refused: no layout
]
HOLDERS = {"list": list, "pandas": pandas.DataFrame, "datasets": datasets.Dataset.from_list}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_the_records_and_refusals_are_those_of_a_file(tmp_path, hold):
    records, refused = read(write_file(tmp_path / "rows.jsonl", ROWS))
    assert [record.id for record in records] == ["a", "c"] and len(refused) == 2
    for source in (Rows(hold(ROWS)), write_rows(hold(ROWS), tmp_path / "written")):
        found, found_refused = read(source)
        assert [(r.id, r.responses, r.preferences) for r in found] == [
            (r.id, r.responses, r.preferences) for r in records
        ]
        assert found_refused == refused
    assert found[0].origin.endswith(".jsonl:1") and read(Rows(hold(ROWS)))[0][1].origin == "rows:3"


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_ranges_together_give_all_rows(hold):
    rows = [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(7)]
    (file,) = source_files(Rows(hold(rows)))
    parts = [record.origin for start in (0, 3, 6) for record in file.read(start, start + 3)]
    assert file.count_rows() == 7 and parts == [record.origin for record in file.read()]


def test_images_in_every_form_are_the_same_in_memory_and_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "red.png").write_bytes(png("red"))
    forms = [png("red"), {"bytes": png("red"), "path": "elsewhere.png"}, "red.png", tmp_path / "red.png"]
    forms.append({"bytes": None, "path": str(tmp_path / "red.png")})
    rows = [{"prompt": "?", "images": [form], "chosen": "red", "rejected": "blue"} for form in forms]
    picture = {"prompt": "?", "images": [Image.open("red.png")], "chosen": "red", "rejected": "blue"}
    in_memory, refused = read(Rows([*rows, picture]))
    written, also_refused = read(write_rows([*rows, picture], tmp_path / "run"), images=tmp_path)
    assert not refused and not also_refused and len(in_memory) == len(written) == 6
    for record in [*in_memory, *written]:
        (ref,) = record.media
        data = ref.data or (tmp_path / ref.path).read_bytes()
        assert Image.open(io.BytesIO(data)).getpixel((0, 0)) == (255, 0, 0)


def test_images_of_a_dataset_are_read_undecoded(tmp_path):
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "image": datasets.Image(), "chosen": datasets.Value("string"),
         "rejected": datasets.Value("string")}
    )  # fmt: skip
    row = {"prompt": "?", "image": {"bytes": png("blue"), "path": None}, "chosen": "blue", "rejected": "red"}
    (record,), refused = read(Rows(datasets.Dataset.from_list([row], features=features)))
    assert not refused and record.media[0].data == png("blue")


def test_missing_values_and_arrays_of_pandas_are_those_of_json():
    frame = pandas.DataFrame(
        {
            "prompt": ["?", "!"],
            "responses": [np.array(["a", "b"]), ["c", "d"]],
            "preferences": [[[0, 1]], [np.array([1, 0])]],
            "system": ["Be brief.", np.nan],
            "id": [np.int64(3), 4],
        }
    )
    rows = [row for _, row in Rows(frame).read()]
    assert rows == json.loads(json.dumps(rows)) and rows[1]["system"] is None and rows[0]["responses"] == ["a", "b"]
    records, refused = read(Rows(frame))
    assert not refused and [record.id for record in records] == ["3", "4"]
    assert len(records[0].responses[0].messages) == len(records[1].responses[0].messages) + 1


def test_the_file_of_rows_is_named_by_its_content(tmp_path):
    first = write_rows(ROWS, tmp_path)
    written = first.stat().st_mtime_ns
    assert write_rows(pandas.DataFrame(ROWS[:1]), tmp_path) != first
    assert write_rows(ROWS, tmp_path) == first and first.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    "value, message",
    [
        (datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}), "a DatasetDict of train; name a split"),
        ("rows.jsonl", "got text, wanted a list of dicts, a DataFrame or a Dataset"),
        ({"prompt": "?"}, "got an object, wanted a list of dicts"),
        (7, "got a number, wanted a list of dicts"),
    ],
    ids=["splits", "text", "one row", "number"],
)
def test_other_things_are_refused_by_name(value, message):
    with pytest.raises(DataError, match=message):
        Rows(value)


def test_a_value_that_json_cannot_hold_is_named_with_its_row(tmp_path):
    with pytest.raises(DataError, match="rows:2: cannot be written as JSON: it holds a Python set"):
        write_rows([ROWS[0], {**ROWS[0], "tags": {"a"}}], tmp_path)
    assert list(tmp_path.iterdir()) == []
