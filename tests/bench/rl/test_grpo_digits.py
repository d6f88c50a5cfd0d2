"""The comparison of reward schemes: the page shows what the runs left."""

import json
from importlib.metadata import version

import pytest
import torch

from bench.rl import grpo_digits
from fastrm.json_files import to_json
from tests.helpers.documents import text_of

pytest.importorskip("trl")


def test_the_page_shows_the_table_of_the_results():
    results = json.loads(grpo_digits.PAGE_FILE.read_text())["schemes"]
    assert list(results) == list(grpo_digits.SCHEMES)
    assert "\n".join(grpo_digits.table_of(results)) in text_of("docs/grpo.md")


def test_all_schemes_of_a_seed_begin_with_the_same_policy():
    """The change of one scheme can then be compared with that of another, and `none` is one policy."""
    results = json.loads(grpo_digits.PAGE_FILE.read_text())["schemes"]
    for seed in map(str, grpo_digits.SEEDS):
        first, *others = [entries[seed]["before"] for entries in results.values() if seed in entries]
        assert all(other == pytest.approx(first) for other in others)


def test_results_are_collected_from_the_runs_that_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(grpo_digits, "FOLDER", tmp_path)
    monkeypatch.setattr(grpo_digits, "RESULTS", tmp_path)
    monkeypatch.setattr(grpo_digits, "device_name", lambda: "Some CPU, 3 cores")
    measured = {"accuracy": 0.5, "judge_reward": 1.0, "mean_characters": 3.0}
    training = {"steps": 4, "reward_share": 0.1, "first": {}, "last": {}, "seconds": 9}
    for seed, gain in ((0, 0.1), (1, 0.3)):
        report = {"before": measured, "after": measured | {"accuracy": 0.5 + gain}, "training": training}
        (tmp_path / f"rule-{seed}").mkdir()
        (tmp_path / f"rule-{seed}" / "report.json").write_text(to_json(report))
    file = grpo_digits.save()
    assert file == tmp_path / "some-cpu-3-cores-grpo-digits.json"
    saved = json.loads(file.read_text())
    assert saved["device"] == "Some CPU, 3 cores" and saved["date"]
    assert saved["versions"]["torch"] == torch.__version__ and saved["versions"]["trl"] == version("trl")
    lines = grpo_digits.table_of(saved["schemes"])
    assert len(lines) == 4  # the two of the heading, none, rule
    # Student's t for one degree of freedom: 12.706 times 0.1414 / sqrt(2).
    assert lines[-1].startswith("| rule | 0.700 ± 1.271 | +0.200 ± 1.271 | 1.000 ± 0.000 |")
