"""Scores of others on benchmarks, and published figures: read line by line, shown beside each other."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fastrm.errors import ConfigError, DataError, StorageError
from fastrm.evaluate.benchmarks import values_of
from fastrm.evaluate.benchmarks.published import published_rows
from fastrm.evaluate.command import evaluate, measure_scores
from fastrm.evaluate.options import ModelChoice, Outputs, RowOptions, ScoringOptions
from fastrm.limits import MediaLimits
from tests.helpers import benchmark_files as published
from tests.helpers.benchmark_files import NAMES, VL_IDS, random_rewards, small


@pytest.mark.parametrize("name", NAMES)
def test_scores_of_a_file_give_the_metrics_as_json_and_a_picture(tmp_path, capsys, name):
    benchmark, _ = small(name, tmp_path)
    rewards = random_rewards(benchmark, 1)
    scores = published.write_jsonl(tmp_path / "scores" / "mine.jsonl", [{"rewards": r, "note": 1} for r in rewards])
    outputs = Outputs(tmp_path / "out.json", tmp_path / "out.png")
    measure_scores(scores, name, str(tmp_path), outputs)
    report = json.loads(outputs.json.read_text())
    wanted = values_of(benchmark.metrics(rewards))
    assert report["benchmark"] == name and report["rows"] == report["scored"] == len(benchmark.rows)
    assert report["metrics"] == wanted and set(report["intervals"]) == set(wanted)
    assert [row["rewards"] for row in report["scores"]] == rewards
    assert outputs.png.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert f"{100 * wanted['overall']:.2f}" in printed and "mine" in printed and "Claude" in printed


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ('{"reward": [1, 2]}', '"rewards" is missing or null, wanted a list of 2 numbers'),
        ("[1, 2]", '"rewards" is a list, wanted a list of 2 numbers'),
        ('{"rewards": [1]}', '"rewards" has 1 numbers, wanted 2'),
        ('{"rewards": [1, 2, 3]}', '"rewards" has 3 numbers, wanted 2'),
        ('{"rewards": [1, NaN]}', r'"rewards\[1\]" is a number \(nan\), wanted a finite number'),
        ('{"rewards": [null, 2]}', r'"rewards\[0\]" is missing or null'),
        ('{"rewards": ["1", 2]}', r'"rewards\[0\]" is text'),
        ('{"rewards": [true, 2]}', r'"rewards\[0\]" is a boolean'),
        ('{"rewards": [1, -Infinity]}', r'"rewards\[1\]" is a number \(-inf\), wanted a finite number'),
        ('{"rewards": [1' + 400 * "0" + ", 2]}", r'"rewards\[0\]" is a number, wanted a finite number'),
    ],
)
def test_a_line_of_scores_that_is_wrong_is_named(tmp_path, line, message):
    small("vl_rewardbench", tmp_path)
    lines = ['{"rewards": [1, 2]}'] * len(VL_IDS)
    lines[4] = line
    scores = tmp_path / "s.jsonl"
    scores.write_text("\n".join(lines))
    with pytest.raises(DataError, match=f"s.jsonl:5: .*{message}"):
        measure_scores(scores, "vl_rewardbench", str(tmp_path / "data.jsonl"), Outputs())


def test_lines_of_scores_end_at_line_breaks_alone(tmp_path, capsys):
    """JSON may hold other separators, such as U+2028, as they are; blank lines, CRLF and a BOM are no rows."""
    small("vl_rewardbench", tmp_path)
    line = json.dumps({"id": "a\u2028b\x85c", "rewards": [1, 2]}, ensure_ascii=False)
    scores = tmp_path / "s.jsonl"
    scores.write_bytes(("\ufeff" + "\r\n\r\n".join([line] * len(VL_IDS)) + "\r\n").encode())
    measure_scores(scores, "vl_rewardbench", str(tmp_path / "data.jsonl"), Outputs())
    # A file that is not whole stands beside published figures under its number of rows.
    assert f"  {len(VL_IDS)} rows\n" in capsys.readouterr().out.split("beside published")[1]


def test_too_few_lines_of_scores_are_refused(tmp_path):
    small("vl_rewardbench", tmp_path)
    scores = published.write_jsonl(tmp_path / "s.jsonl", [{"rewards": [1, 2]}] * 8)
    with pytest.raises(DataError, match=r"has 8 lines of rewards, wanted 9: one for each row of .*data.jsonl"):
        measure_scores(scores, "vl_rewardbench", str(tmp_path / "data.jsonl"), Outputs())


def test_an_output_that_cannot_be_made_is_refused_before_the_work(tmp_path):
    with pytest.raises(StorageError, match="there is no folder"):
        measure_scores(tmp_path / "none", "rewardbench", None, Outputs(png=tmp_path / "none" / "a.png"))


OPTIONS = ScoringOptions(
    tokens_per_pack=2048, num_workers=0, device="cpu", dtype="fp32",
    limits=MediaLimits(10**6, 10**6),
)  # fmt: skip


@pytest.mark.parametrize(
    ("models", "data", "given", "message"),
    [
        ((), "pairs.jsonl", {}, "name a model: fastrm eval MODEL... DATA"),
        (("m",), "pairs.jsonl", {"png": Path("a.png")}, "--png is for a benchmark"),
        (("m",), "pairs.jsonl", {"bench_data": "x"}, "--data is for a benchmark"),
        ((), "pairs.jsonl", {"scores": Path("s")}, "--scores is for a benchmark"),
        (("m",), "bench:rm_bench", {"scores": Path("s")}, "--scores takes the place of models"),
        ((), "bench:rm_bench", {"scores": Path("s"), "images": "x"}, "leave them and their options out"),
    ],
    ids=["no model", "png", "data", "scores", "scores and model", "scores and images"],
)
def test_options_that_do_not_go_together_are_refused(models, data, given, message):
    options = replace(OPTIONS, rows=RowOptions(images=given.pop("images", None)))
    outputs = Outputs(png=given.pop("png", None))
    given = {"bench_data": None, "scores": None} | given
    with pytest.raises(ConfigError, match=message):
        evaluate(ModelChoice(models), data, options, outputs, **given)


@pytest.mark.parametrize("name", NAMES)
def test_published_rows_name_the_five_models_and_a_source_for_every_figure(tmp_path, name):
    benchmark, _ = small(name, tmp_path)
    rows = published_rows(name)
    models = " ".join(row.model for row in rows)
    assert all(word in models for word in ("BaseReward", "R1-Reward", "MM-RLHF-Reward", "IXC-2.5-Reward", "Claude-3.7"))
    metrics = values_of(benchmark.metrics(random_rewards(benchmark, 0)))
    assert all(set(row.figures) <= set(metrics) and bool(row.figures) == bool(row.source) for row in rows)


def test_published_figures_are_fractions_of_the_benchmarks_counts():
    """A slip of the pen in a table would hardly be a count of 170 rows or 46 ids."""
    for row in published_rows("mm_rlhf_rewardbench"):
        if row.model == "MM-RLHF-Reward":
            continue  # printed without decimals
        for metric, count in (("acc", 170), ("acc_plus", 46)):
            right = round(row.figures[metric] / 100 * count)
            assert round(100 * right / count, 2) == row.figures[metric], row
