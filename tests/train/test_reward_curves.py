"""Reward curves: accuracy against preferences trained on, in the page of a run and in that of several."""

import json
import re

import pytest

from fastrm.evaluate.accuracy import wilson_interval
from fastrm.train.metrics import read_rows
from fastrm.train.reward_curves import curve_points, reward_curves
from fastrm.train.run_pages import StoredRun, compare_runs
from tests.helpers.runs import run, text_rows, tiny_config, write_rows


def evaluation(step, seen, accuracy):
    return {"step": step, "preferences": seen, "eval/loss": 0.6, "eval/accuracy": accuracy, "eval/preferences": 80}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of two named sets whose last step of an epoch is short: 20 preferences in steps of 8, 8 and 4."""
    folder = tmp_path_factory.mktemp("curves")
    rows = write_rows(folder / "rows.jsonl", text_rows(20))
    files = {name: write_rows(folder / f"{name}.jsonl", text_rows(count)) for name, count in (("few", 3), ("many", 9))}
    path = tiny_config(folder, rows, run={"max_steps": 6, "eval_every": 1})
    run(path, "data.eval=" + json.dumps({name: [{"path": str(file)}] for name, file in files.items()}))
    return folder / "run"


def test_a_run_counts_the_preferences_of_its_steps_not_the_steps(folder):
    curves = curve_points(read_rows(folder / "metrics.jsonl"))
    assert set(curves) == {"", "few", "many"}
    assert [point.seen for point in curves[""]] == [8, 16, 20, 28, 36, 40]
    assert [point.seen for point in curves["few"]] == [point.seen for point in curves[""]]


def test_the_interval_is_of_the_held_out_preferences_of_each_set(folder):
    rows = read_rows(folder / "metrics.jsonl")
    last = [row for row in rows if "eval/loss" in row][-1]
    for name, place, count in (("", "eval", 12), ("few", "eval/few", 3), ("many", "eval/many", 9)):
        point, right = curve_points(rows)[name][-1], round(last[f"{place}/accuracy"] * count)
        assert last[f"{place}/preferences"] == count
        assert (point.low, point.high) == wilson_interval(right, count) and point.low <= point.accuracy <= point.high


def test_evaluations_without_the_counts_have_no_point():
    old = {"step": 4, "eval/loss": 0.6, "eval/accuracy": 0.75}
    assert curve_points([old]) == {} and reward_curves({"old": [old]}) == []
    assert curve_points([{"step": 4, "preferences": 32, "eval/loss": 0.6, "eval/mse": 0.1}]) == {}
    assert [point.seen for point in curve_points([old, evaluation(8, 64, 0.8)])[""]] == [64]


def test_the_section_has_the_name_by_which_an_address_leads_to_it(folder):
    page = (folder / "report.html").read_text()
    assert page.count('id="reward-curves"') == 1 and re.search(r"<h2[^>]*>reward-curves</h2>", page)
    # All held-out preferences, and each of the two named sets; a single named set is all there is.
    assert page.count("training preferences seen</text>") == 3
    only = evaluation(1, 8, 0.5) | {"eval/only/accuracy": 0.5, "eval/only/preferences": 80}
    assert len(reward_curves({"run": [only]})[0].blocks[0].charts) == 1


def test_runs_lie_over_one_another_in_the_page_that_compares_them(folder, tmp_path):
    copy = tmp_path / "other"
    copy.mkdir()
    for name in ("metrics.jsonl", "config.yaml"):
        (copy / name).write_bytes((folder / name).read_bytes())
    compare_runs([folder, copy], tmp_path / "compare.html")
    page = (tmp_path / "compare.html").read_text()
    section = page[page.index('id="reward-curves"') : page.index(">Curves</h2>")]
    assert [section.count(text) for text in ("<svg", ">run</text>", ">other</text>", ">chance</text>")] == [3, 3, 3, 3]


@pytest.mark.parametrize("paradigm", ["critic", "judge"])
def test_a_page_says_what_a_run_does_not_know_of_a_model_that_writes(paradigm, tmp_path):
    rows = [row | {"chosen_reason": "It is right.", "rejected_reason": "It is wrong."} for row in text_rows(16)]
    rows = write_rows(tmp_path / "rows.jsonl", rows)
    run(tiny_config(tmp_path, rows, rows, run={"max_steps": 1, "eval_every": 1}), f"paradigm={paradigm}")
    page, stored = (tmp_path / "run" / "report.html").read_text(), StoredRun.read(tmp_path / "run")
    section = page[page.index('id="reward-curves"') : page.index(">Curves</h2>")]
    assert f"A {paradigm}" in section and section.count("<svg") == (paradigm == "critic")
    figure, total = ("accuracy", "preferences") if paradigm == "critic" else ("loss", "texts")
    ((_, found),) = stored.last_eval["eval/sources"].items()
    assert f"{found[figure]:.4f} of {found[total]}<" in page and found[total] == 16
