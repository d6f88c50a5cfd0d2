"""Files of benchmarks: every published layout is read, and every bad row is named."""

import json

import pytest

from fastrm.data.record import ImageRef, VideoRef
from fastrm.errors import DataError
from fastrm.evaluate.benchmarks import load_benchmark
from tests.helpers import benchmark_files as published
from tests.helpers.benchmark_files import NAMES, SMALL, small, vl_rows


def test_a_record_reads_as_its_row(tmp_path):
    benchmark, rows = small("vl_rewardbench", tmp_path)
    record = benchmark.records[3]
    assert record.id == rows[3]["id"] and record.origin.endswith("data.jsonl:4")
    assert [response.text for response in record.responses] == rows[3]["response"]
    image, text = record.responses[0].messages[0].parts
    assert isinstance(image, ImageRef) and image.path == str(tmp_path / "images" / "3.jpg")
    assert text == "What is 3?"
    assert (record.preferences[0].winner, record.preferences[0].loser) == (1, 0)


def test_vl_rewardbench_reads_the_hubs_parquet_and_the_r1_code_s_file(tmp_path):
    rows = [{**row, "image": {"bytes": b"png", "path": None}} for row in vl_rows()]
    for row in rows:
        del row["image_path"]
    published.write_parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", rows)
    hub = load_benchmark("vl_rewardbench", str(tmp_path / "hub"))
    assert hub.records[0].media[0].data == b"png"
    r1 = [
        {"id": row["id"], "prompt": row["query"], "chosen": row["response"][row["human_ranking"].index(0)],
         "rejected": row["response"][row["human_ranking"].index(1)], "image": f"vl_reward/img/image_{n}.jpg",
         "chosen_reason": "", "rejected_reason": ""}
        for n, row in enumerate(rows)
    ]  # fmt: skip
    file = published.write_jsonl(tmp_path / "r1" / "data.jsonl", r1)
    copy = load_benchmark("bench:vl_rewardbench", str(file), str(tmp_path))
    assert copy.records[2].media[0].path == str(tmp_path / "vl_reward/img/image_2.jpg")
    better = [
        [record.responses[record.preferences[0].winner].text for record in benchmark.records]
        for benchmark in (hub, copy)
    ]
    assert better[0] == better[1]


def test_images_are_found_beside_the_file_and_in_images(tmp_path):
    (tmp_path / "images" / "mcq").mkdir(parents=True)
    (tmp_path / "images" / "mcq" / "a.png").touch()
    benchmark, _ = small("mm_rlhf_rewardbench", tmp_path)
    assert benchmark.records[0].media == (ImageRef(path=str(tmp_path / "images" / "mcq" / "a.png")),)
    assert benchmark.records[5].media == (VideoRef(path=str(tmp_path / "video" / "e")),)


def test_a_path_that_leaves_the_folder_is_refused_by_row(tmp_path):
    rows = [{**vl_rows()[0], "image_path": "../../secret.png"}]
    file = published.write_jsonl(tmp_path / "data.jsonl", rows)
    with pytest.raises(DataError, match=r"data.jsonl:1: .*leaves the images folder"):
        _ = load_benchmark("vl_rewardbench", str(file)).records


@pytest.mark.parametrize("name", ["vl_rewardbench", "mm_rlhf_rewardbench", "multimodal_rewardbench"])
def test_a_row_without_its_image_is_refused_when_it_is_to_be_scored(tmp_path, name):
    """Its figures can be measured from scores; a model would judge it blind."""
    rows = SMALL[name][2]()
    for key in ("image", "image_path", "Image"):
        rows[1].pop(key, None)
    benchmark = load_benchmark(name, str(published.write_jsonl(tmp_path / "rows.jsonl", rows)))
    with pytest.raises(DataError, match=r'rows.jsonl:2: "\w+" is missing or null, wanted its path or bytes'):
        _ = benchmark.records


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vl_rewardbench", {"human_ranking": [0, 0]}, r'"human_ranking" is a list, wanted \[0, 1\] or \[1, 0\]'),
        ("vl_rewardbench", {"id": None}, '"id" is missing or null'),
        ("multimodal_rewardbench", {"Better": "both"}, '"Better" is text, wanted Output1 or Output2'),
        ("rewardbench", {"subset": "shp"}, "'shp', which belongs to no section"),
        ("rewardbench2", {"num_correct": 2}, '"num_correct" is 2, but the lists hold 1'),
        ("rewardbench2", {"subset": "Sums"}, "'Sums', wanted one of Factuality"),
        ("rm_bench", {"chosen": ["a", "b"]}, '"chosen" is a list, wanted a list of 3 texts'),
        ("rm_bench", {"domain": "art"}, "'art', wanted one of chat"),
    ],
)
def test_a_row_that_is_not_the_benchmarks_is_named(tmp_path, name, change, message):
    rows = [json.loads(json.dumps(row)) for row in SMALL[name][2]()]
    rows[1] |= change
    file = published.write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=f"rows.jsonl:2: .*{message}.*a benchmark is read whole"):
        load_benchmark(name, str(file))


def test_a_tie_that_stands_twice_is_refused(tmp_path):
    rows = published.rewardbench2_rows(1)
    file = published.write_jsonl(tmp_path / "r.jsonl", [*rows, rows[-1]])
    with pytest.raises(DataError, match="the id tied:0 stands twice"):
        load_benchmark("rewardbench2", str(file))


def test_places_without_the_benchmark_are_refused(tmp_path):
    with pytest.raises(DataError, match="there is no such benchmark; wanted one of vl_rewardbench"):
        load_benchmark("bench:vl")
    with pytest.raises(DataError, match=r"none.jsonl does not exist"):
        load_benchmark("vl_rewardbench", str(tmp_path / "none.jsonl"))
    for _ in range(2):  # a folder without data files, and one with two
        with pytest.raises(DataError, match=r"has none of data.jsonl, .* other data files; name the data file itself"):
            load_benchmark("vl_rewardbench", str(tmp_path))
        published.write_json(tmp_path / "one.json", vl_rows())
        published.write_json(tmp_path / "data" / "two.json", vl_rows())
    with pytest.raises(DataError, match="is not on the hub; name a local copy with --data"):
        load_benchmark("multimodal_rewardbench")


@pytest.mark.parametrize("name", NAMES)
def test_any_file_name_in_any_form_is_read_alike(tmp_path, name):
    """The one data file of a folder needs no published name; a .json file may hold lines, a .jsonl file CRLF."""
    rows = SMALL[name][2]()
    columns = dict.fromkeys(key for row in rows for key in row)  # of Parquet: those of all rows
    forms = [
        published.write_json(tmp_path / "a" / "my rows.json", rows),
        published.write_jsonl(tmp_path / "b" / "data" / "rows.json", rows),
        published.write_parquet(tmp_path / "c" / "rows.parquet", [columns | row for row in rows]),
        tmp_path / "rows.jsonl",
    ]
    forms[3].write_bytes(b"\r\n\r\n".join(json.dumps(row).encode() for row in rows))
    read = [load_benchmark(name, str(file)).rows for file in forms]
    read += [load_benchmark(name, str(tmp_path / folder)).rows for folder in "abc"]
    assert len(read[0]) == len(rows) and all(labels == read[0] for labels in read)


def test_the_hub_is_asked_for_the_published_files(tmp_path, monkeypatch):
    import huggingface_hub

    published.write_json(tmp_path / "total_dataset.json", published.rm_bench_rows())
    asked = []

    def download(hub_id, repo_type, allow_patterns):
        asked.append((hub_id, repo_type, "total_dataset.json" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert len(load_benchmark("rm_bench").rows) == 11
    assert len(load_benchmark("rm_bench", "somebody/mirror").rows) == 11
    assert asked == [("THU-KEG/RM-Bench", "dataset", True), ("somebody/mirror", "dataset", True)]


def test_a_hub_that_cannot_be_reached_says_what_to_do(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(DataError, match="reward-bench cannot be fetched from the hub: no route to host; download"):
        load_benchmark("rewardbench")
