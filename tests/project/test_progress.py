"""What long work shows: counts while it lasts, plain lines in a file, and nothing where --quiet asks for that."""

import io
import re

import pytest

from fastrm import ui
from tests.helpers.runs import fastrm_here, text_rows, tiny_config, write_rows


@pytest.fixture
def config(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", text_rows(24))
    return tiny_config(tmp_path, rows, rows, run={"max_steps": 2})


@pytest.fixture(autouse=True)
def loud_again():
    yield
    ui.be_quiet(False)


@pytest.mark.parametrize("seconds, lines", [(1e9, 0), (0.0, 1)], ids=["brief", "long"])
def test_work_far_below_a_command_is_counted_in_its_display(monkeypatch, seconds, lines):
    monkeypatch.setattr(ui, "PLAIN_SECONDS", seconds)
    file = io.StringIO()
    with ui.Display(ui.Console(file=file, width=80)):
        assert list(ui.counted("loading weights", iter("abc"), 3)) == ["a", "b", "c"]
    assert len(re.findall(r"^loading weights: 3/3  \[", file.getvalue(), re.MULTILINE)) == lines
    assert list(ui.counted("loading weights", "ab", 2)) == ["a", "b"]  # without a display


def test_training_shows_pace_memory_and_waiting_in_a_file(config, capfd):
    code, shown = fastrm_here(capfd, "train", config)
    figures = r"training: 2/2 loss \d\.\d+  acc \d\.\d+  \S+ pairs/s  \S+ tok/s  wait \d+%  \d\.\d GiB"
    assert code == 0 and re.search(figures, shown), shown


def test_every_long_step_counts_what_it_does(config, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(ui, "PLAIN_SECONDS", 0.0)  # as if each took long
    code, shown = fastrm_here(capfd, "train", config)
    steps = ["reading rows", "counting groups", "comparing with the stock model", "training", "evaluating"]
    steps += ["writing weights"]
    ends = {name: re.search(rf"^{name}: (\d+)/\1 ", shown, re.MULTILINE) for name in steps}
    assert code == 0 and all(ends.values()), (ends, shown)
    code, shown = fastrm_here(capfd, "eval", tmp_path / "run" / "model", tmp_path / "rows.jsonl")
    ends = {name: re.search(rf"^{name}: (\d+)/\1 ", shown, re.MULTILINE) for name in ("loading weights", "evaluating")}
    assert code == 0 and all(ends.values()) and ends["evaluating"][1] == "24", (ends, shown)


def test_quiet_commands_print_nothing(config, tmp_path, capfd):
    model, rows = tmp_path / "run" / "model", tmp_path / "rows.jsonl"
    for line in (
        ["data", "prepare", config], ["train", config], ["score", model, rows, "--out", tmp_path / "rewards.jsonl"],
        ["export", model, "--out", tmp_path / "exported"],
    ):  # fmt: skip
        code, shown = fastrm_here(capfd, *line, "--quiet")
        assert (code, shown) == (0, ""), line
    code, shown = fastrm_here(capfd, "train", config, "--quiet")
    assert code == 64 and "holds a run already" in shown
