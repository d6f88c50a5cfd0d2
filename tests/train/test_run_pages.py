"""A run as a page, and runs compared: what their folders hold is shown, and what cannot be drawn costs nothing."""

import re

import pytest

from fastrm.errors import ConfigError
from fastrm.train.metrics import read_rows
from fastrm.train.run_pages import StoredRun, compare_runs, write_run_page
from tests.helpers.runs import run, text_rows, tiny_config, write_rows

BROKEN = {"prompt": "<script>alert(1)</script>", "images": ["lost.png"], "chosen": "a", "rejected": "b"}


def sourced(count):
    return [{**row, "source": "odd" if n % 2 else "even"} for n, row in enumerate(text_rows(count))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two runs that differ in their rates; the second has no evaluation."""
    found = []
    for name, evaluated, settings in (("low", True, {"lr": 1e-4}), ("high", False, {"lr": 1e-3})):
        folder = tmp_path_factory.mktemp(name)
        rows = write_rows(folder / "rows.jsonl", [*sourced(24), BROKEN])
        held_out = write_rows(folder / "held_out.jsonl", sourced(8)) if evaluated else None
        path = tiny_config(folder, rows, held_out, run={"max_steps": 4, "eval_every": 2, "name": name}, optim=settings)
        run(path)
        found.append(folder / "run")
    return found


def text_of(page) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.read_text()))


def test_a_run_leaves_a_page_of_all_that_it_has(folders):
    page = folders[0] / "report.html"
    text, summary = text_of(page), StoredRun.read(folders[0]).summary
    parts = ["Result", "reward-curves", "Curves", "Accuracy by source", "Data", "Refused rows", "Machine and versions"]
    parts += ["Configuration"]
    assert [part for part in parts if f" {part} " not in text] == []
    assert f"held-out pair accuracy {summary['eval_accuracy']:.4f}" in text
    for source in ("even", "odd"):
        figures = summary["eval_by_source"][source]
        assert f"{source} {figures['accuracy']:.4f} of {figures['preferences']:,}" in text
    assert "rows.jsonl:25 IMAGE_MISSING" in text and "max_steps: 4" in text
    assert summary["versions"]["torch"] in text and summary["hardware"]["processor"] in text
    # Each figure that is drawn, and the accuracy by source; nothing is fetched from elsewhere.
    assert page.read_text().count("<svg") == 8
    assert not re.search(r'(src|href)="(?!#|data:)', page.read_text())


def test_a_run_that_has_not_ended_has_a_page_too(folders, tmp_path):
    for name in ("metrics.jsonl", "config.yaml"):
        text = (folders[1] / name).read_text()
        (tmp_path / name).write_text(text[: text.index("\n") + 1] if name == "metrics.jsonl" else text)
    write_run_page(tmp_path)
    text = text_of(tmp_path / "report.html")
    assert "steps 1, not ended" in text and "Refused rows None." in text and "Machine" not in text


def test_runs_are_compared_in_the_terminal_and_in_a_page(folders, tmp_path, capsys):
    compare_runs(folders, tmp_path / "compare.html")
    printed, low = capsys.readouterr().out, StoredRun.read(folders[0])
    assert re.search(r"optim\.lr +0\.0001 +0\.001\n", printed), printed
    assert "data.eval.0.path" in printed and "run.dir" not in printed and "run.seed" not in printed
    assert re.search(rf"held-out pair accuracy +{low.summary['eval_accuracy']:.4f}\s", printed)
    assert re.search(r"data\.eval +none +\[\]\n", printed)
    page = (tmp_path / "compare.html").read_text()
    assert page.count("<svg") == 7 and "low, training" in page and "high, training" in page
    assert "low, held out" in page and "high, held out" not in page


def test_the_points_of_a_curve_are_those_of_the_metrics(folders):
    stored, rows = StoredRun.read(folders[0]), read_rows(folders[0] / "metrics.jsonl")
    assert stored.points("loss") == [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert [step for step, _ in stored.points("eval/accuracy")] == [2, 4]


def test_a_page_that_cannot_be_drawn_costs_a_run_nothing(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise ValueError("no fonts")

    monkeypatch.setattr("fastrm.train.run_pages.chart", fail)
    rows = write_rows(tmp_path / "rows.jsonl", text_rows(24))
    assert run(tiny_config(tmp_path, rows, run={"max_steps": 1}))["steps"] == 1
    folder = tmp_path / "run"
    assert (folder / "model" / "config.json").is_file() and (folder / "checkpoints" / "step-00000001").is_dir()
    assert not (folder / "report.html").exists()
    assert "report.html: not written: no fonts; the model is complete" in capsys.readouterr().err


def test_folders_without_runs_are_named(folders, tmp_path):
    with pytest.raises(ConfigError, match=r"holds no run: .*name folders of runs, as runs/quickstart"):
        compare_runs([folders[0], tmp_path], None)
    with pytest.raises(ConfigError, match="got one run, wanted two or more"):
        compare_runs(folders[:1], None)


def test_a_run_on_ratings_shows_what_it_has_in_place_of_accuracies(tmp_path):
    rows = [{"prompt": f"{n}?", "response": "good" if n % 2 else "bad", "rating": n % 2, "source": "ab"[n % 4 // 2]}
            for n in range(24)]  # fmt: skip
    rows = write_rows(tmp_path / "rows.jsonl", rows)
    path = tiny_config(tmp_path, rows, rows, run={"max_steps": 4, "eval_every": 2}, loss={"kind": "mse"})
    run(path, "data.train.0.pairs=ratings", "data.eval.0.pairs=ratings")
    page, last = tmp_path / "run" / "report.html", StoredRun.read(tmp_path / "run").last_eval
    text = text_of(page)
    assert f"held-out Spearman correlation {last['eval/spearman']:.4f}" in text and "held-out pair accuracy" not in text
    assert f"{last['eval/sources']['a']['spearman']:.4f} of 12" in text
    assert "Spearman correlation with ratings over the steps" in text
