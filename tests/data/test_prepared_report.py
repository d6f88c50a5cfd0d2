"""What a preparation counts and shows: every row once, no number cut; and what it needs of memory."""

import io
import json
import multiprocessing

import pytest
from PIL import Image
from rich.console import Console

from fastrm.config import load_config
from fastrm.data.prepared.records import read_refusals
from fastrm.data.prepared.report import draw_report, report_tables
from fastrm.data.quarantine import Quarantine
from fastrm.train.data import make_set
from fastrm.ui import Display
from tests.helpers.prepared_sets import Made, config_of, ids, in_child, mixed_sources
from tests.helpers.project import PROJECT
from tests.helpers.runs import write_rows
from tests.helpers.waiting import PATIENCE


def test_the_report_counts_every_row_and_draws_a_picture(tmp_path):
    sources = mixed_sources(tmp_path)
    made = Made(config_of(tmp_path, *sources))
    row = made.row(sources[1]["path"])
    assert (row["rows"], row["duplicates"], row["refused_reading"]) == (33, 1, {"BAD_JSON": 1})
    assert (row["records"], row["merged"], row["groups"]) == (31, 1, 30)
    assert row["held_out_groups"] == 6 == len(made.eval) and row["epoch_groups"] == 24
    total = sum(row["epoch_tokens"] for row in made.report["sources"])
    assert total == made.report["sharing"]["tokens"] == sum(group.num_tokens for group in made.train.groups)
    assert made.report["sharing"]["sharing_factor"] > 1.3 < made.report["sharing"]["predicted_speedup"]
    histogram = made.report["histograms"]["image_tokens"]
    assert sum(histogram["counts"]) == 40 and histogram["zero"] == 24
    assert row["tokens"] >= row["epoch_tokens"]
    draw_report(made.report, tmp_path / "report.png")
    assert Image.open(tmp_path / "report.png").size[0] > 1000
    assert json.loads((made.folder / "report.json").read_text())["seconds"].keys() == {
        "read", "select", "count", "index",
    }  # fmt: skip
    assert "sharing factor" in made.said


def test_every_row_is_accounted_for_and_the_set_says_how_many_records_it_holds(tmp_path):
    sources = mixed_sources(tmp_path)
    sources[1] |= {"cap": 5, "held_out": 2}
    made = Made(config_of(tmp_path, *sources))
    kept = 0
    for row in made.report["sources"]:
        removed = row["duplicates"] + row["contaminated"]["removed"]
        assert row["rows"] == sum(row["refused_reading"].values()) + removed + row["records"]
        kept += row["records"] - sum(row["refused_counting"].values()) - row["not_drawn_records"]
    assert kept == made.train.num_records + made.eval.num_records
    assert made.train.num_records == sum(map(len, ids(made.train)))
    assert made.row(sources[1]["path"])["not_drawn_records"] > 0


@pytest.mark.parametrize("width", [80, 200])
def test_the_tables_never_cut_a_number(tmp_path, width):
    row = Made(config_of(tmp_path, *mixed_sources(tmp_path))).row(str(tmp_path / "text.jsonl"))
    long = row | {
        "source": "a-source-of-an-uncommonly-long-name/and-its-subset", "rows": 2_852_000, "records": 2_852_000,
        "epoch_groups": 2_123_456, "epoch_preferences": 2_345_678, "epoch_tokens": 1_234_567_890_123,
        "duplicates": 1_234_567,
    }  # fmt: skip
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(*report_tables({"sources": [long] * 7}))
    shown = console.export_text()
    for number in ("2,852,000", "2,123,456", "2,345,678", "1,234,567,890,123", "1,234,567\n"):
        assert shown.count(number) >= 7, number
    assert "…" not in shown and max(map(len, shown.splitlines())) <= width


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path):
    import resource

    def peak(count: int, queue) -> None:
        rows = [{"id": str(n), "prompt": f"{n} " + "many words " * 60, "chosen": "yes " * 90, "rejected": "no " * 90}
                for n in range(count)]  # fmt: skip
        write_rows(tmp_path / f"{count}.jsonl", rows)
        del rows
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        config = config_of(
            tmp_path, {"path": str(tmp_path / f"{count}.jsonl")}, run={"dir": str(tmp_path / str(count))}
        )
        make_set(load_config(config), Display(silent=True), 1)
        queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

    queue = multiprocessing.get_context("fork").Queue()
    rises = []
    for count in (2_000, 30_000):
        in_child(peak, count, queue).join()
        rises.append(queue.get())
    # 28,000 rows more have 40 MB of text; their columns and one unit's buffers are a fraction of it.
    assert rises[1] - rises[0] < 30 * 1024, rises


@pytest.mark.slow
def test_the_scale_benchmark_measures_and_goes_on_with_what_is_there(tmp_path):
    import subprocess
    import sys

    script = PROJECT / "bench" / "data" / "prepared_scale.py"
    command = [sys.executable, script, "--dir", tmp_path / "work", "--rows", "1500", "--out", tmp_path / "out"]
    results = []
    for _ in range(2):
        subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
        (path,) = (tmp_path / "out").glob("*-prepared-1500.json")
        results.append(json.loads(path.read_text()))
    first, second = results
    assert first["prepare"] == second["prepare"] and first["prepare"]["memory_is_bounded"]
    assert first["start"]["groups"] > 1000 and first["plan"]["preferences_planned"] == first["start"]["preferences"]
    assert first["plan"]["groups_not_once"] == first["plan"]["packs_over_budget"] == 0


def test_a_record_that_lost_a_part_is_no_refused_row(tmp_path):
    rated = [{"response": text, "annotations": {"Helpfulness": {"Rating": rating}}} for text, rating in
             (("a cat", "5"), ("a dog", "N/A"), ("a cow", "2"))]  # fmt: skip
    rows = [{"prompt": f"What is {number}?", "completions": rated} for number in range(4)]
    path = write_rows(tmp_path / "rated.jsonl", [*rows, "{"])
    made = Made(
        config_of(tmp_path, {"path": str(path), "name": "rated"}, model={"tokenizer": {"train_vocab_size": 280}})
    )
    row = made.row("rated")
    assert (row["rows"], row["records"], row["refused_reading"]) == (5, 4, {"BAD_JSON": 1})
    assert row["parts_left_out"] == {"RATING_MISSING": 4}
    assert [line.get("partial", False) for line in made.refused] == [True] * 4 + [False]
    with Quarantine(None) as quarantine:
        for refusal in read_refusals(made.folder / "refused.jsonl"):
            refusal.add_to(quarantine)
    assert (quarantine.total, quarantine.partial_counts) == (1, {"RATING_MISSING": 4})
