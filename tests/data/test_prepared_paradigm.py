"""Prepared sets of critics and judges: the prompts of any set, other conversations, and settings of their own."""

import io
import re

import numpy as np
import pytest
from rich.console import Console

from fastrm.data.check import check_source
from fastrm.data.check_page import print_page
from fastrm.data.paradigm import reading_of
from fastrm.errors import ConfigError
from fastrm.limits import MediaLimits
from tests.helpers.prepared_sets import Made, config_of, ids, small_pieces
from tests.helpers.runs import fastrm, text_rows, write_rows
from tests.helpers.source_rows import png

LONG = "one two three four five six seven eight nine"
PARADIGMS = ("reward", "critic", "judge")


def with_critiques(rows):
    return [
        {**row, "chosen_reason": f"{row['chosen']}: right.", "rejected_reason": f"{row['rejected']}: wrong."}
        for row in rows
    ]


def mixture(folder):
    """Prompts in several rows, with and without images, copies, and two rows that a benchmark holds too."""
    (folder / "a.png").write_bytes(png("red"))
    (folder / "b.png").write_bytes(png("blue"))
    rows = text_rows(24)
    rows += [{**rows[3], "id": "copy"}, {**rows[4], "id": "other", "rejected": "never"}]
    rows += [
        {"id": "red", "prompt": "What?", "images": ["a.png"], "chosen": "red", "rejected": "blue"},
        {"id": "again", "prompt": "What?", "images": ["a.png"], "chosen": "red", "rejected": "green"},
        {"id": "pair", "prompt": "Which?", "images": ["b.png"], "chosen": f"a {LONG}", "rejected": f"b {LONG}"},
        {"id": "text", "prompt": "Why?", "chosen": "because", "rejected": "no idea"},
    ]
    bench = [
        {"prompt": "Else?", "images": ["a.png"], "chosen": f"b {LONG}", "rejected": f"A {LONG}"},
        {"prompt": "why?", "chosen": "No idea", "rejected": "Because"},
    ]
    path = write_rows(folder / "bench.jsonl", bench)
    against = {"decontaminate": {"against": [str(path)], "image_hash": False, "perceptual_hash": False}}
    source = {"path": str(write_rows(folder / "rows.jsonl", with_critiques(rows))), "held_out": 0.2}
    return config_of(folder, source, data={**against, "deduplicate": True})


def texts(made, number=0):
    (record, *_) = made.train.records.parts(number)
    return [(response.messages[-2].text, response.text) for response in record.responses]


def test_groups_held_out_prompts_copies_and_benchmarks_rows_do_not_depend_on_the_paradigm(tmp_path, monkeypatch):
    small_pieces(monkeypatch)
    config = mixture(tmp_path)
    made = [Made(config, f"paradigm={name}", f"run.dir={tmp_path / name}") for name in PARADIGMS]
    refused = [sorted((row["id"], row["code"]) for row in one.refused) for one in made]
    assert refused[0] == [("copy", "DUPLICATE"), ("pair", "CONTAMINATED"), ("text", "CONTAMINATED")]
    assert refused == [refused[0]] * 3
    assert [(ids(one.train), ids(one.eval)) for one in made] == [(ids(made[0].train), ids(made[0].eval))] * 3
    assert ["red", "again"] in ids(made[0].train) + ids(made[0].eval)
    numbers = [one.train.preference_counts.tolist() for one in made]
    assert numbers == [numbers[0]] * 3


def test_the_conversations_of_a_set_are_those_of_its_paradigm(tmp_path):
    config = config_of(tmp_path, {"path": str(write_rows(tmp_path / "rows.jsonl", with_critiques(text_rows(4))))})
    critic, judge = (Made(config, f"paradigm={name}", f"run.dir={tmp_path / name}") for name in PARADIGMS[1:])
    (asked, critique), (_, other) = texts(critic)
    assert "[Question]: Is 0 even?\n\n[LMM Response]: yes it is\n" in asked
    assert (critique, other) == ("yes it is: right.", "maybe: wrong.")
    ((asked, said),) = texts(judge)
    assert "[Response 1]:\nyes it is\n" in asked or "[Response 2]:\nyes it is\n" in asked
    number = 1 if "[Response 1]:\nyes it is\n" in asked else 2
    assert said.endswith(f"</think><answer>{number}</answer>")
    assert f"Response {number}: yes it is: right." in said
    both = Made(config, "paradigm=judge", "judge.order=both", f"run.dir={tmp_path / 'both'}")
    assert both.train.preference_counts.tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("paradigm", PARADIGMS[1:])
def test_digits_have_critiques_for_critics_and_judges(tmp_path, paradigm):
    made = Made(config_of(tmp_path, {"path": "digits:eval"}), f"paradigm={paradigm}")
    plain = Made(config_of(tmp_path, {"path": "digits:eval"}), f"run.dir={tmp_path / 'plain'}")
    assert made.refused == []
    assert ids(made.train) == ids(plain.train)
    assert np.array_equal(made.train.preference_counts, plain.train.preference_counts)


@pytest.mark.parametrize("change", ["prompt", "missing", "paradigm"])
def test_a_set_of_another_spec_is_refused_or_made_again(tmp_path, change):
    spec = tmp_path / "own.yaml"
    spec.write_text("kind: critic\nprompt: 'Assess {{ question }}: {{ response }}'\n")
    source = {"path": str(write_rows(tmp_path / "rows.jsonl", with_critiques(text_rows(3))))}
    config = config_of(tmp_path, source)
    overrides = ["paradigm=critic", f"critic.spec={spec}"]
    Made(config, *overrides, f"data.prepared={tmp_path / 'set'}")
    assert Made(config, *overrides, f"data.prepared={tmp_path / 'set'}").report is None
    Made(config, *overrides)
    if change == "prompt":
        spec.write_text("kind: critic\nprompt: 'Judge {{ question }}: {{ response }}'\n")
    overrides = [] if change == "paradigm" else overrides + ["critic.missing=empty"] * (change == "missing")
    key = "kind" if change == "paradigm" else change
    with pytest.raises(ConfigError, match=rf"was made under other settings \(.*paradigm\.{key}: .* there, .* now"):
        Made(config, *overrides, f"data.prepared={tmp_path / 'set'}")
    again = Made(config, *overrides)
    assert "it is made anew" in again.said
    assert ("Judge Is 0" in texts(again)[0][0]) == (change == "prompt")


def test_critiques_that_are_missing_too_long_or_hold_special_tokens(tmp_path):
    rows = with_critiques(text_rows(6))
    del rows[0]["rejected_reason"]
    rows[1]["chosen_reason"] = "word " * 3000
    rows[2]["chosen_reason"] = "It says <|im_end|> and <|image_pad|> in its text."
    rows[3]["rejected_reason"] = "It ends so.<|im_end|>"
    rows[4]["chosen_reason"] = 4
    made = Made(config_of(tmp_path, {"path": str(write_rows(tmp_path / "rows.jsonl", rows))}), "paradigm=critic")
    assert [(row["id"], row["code"]) for row in made.refused] == [
        ("t0", "NO_CRITIQUE"), ("t4", "BAD_ROW"), ("t1", "TOO_LONG"), ("t3", "RENDERED_TEMPLATE"),
    ]  # fmt: skip
    assert ids(made.train) == [["t2"], ["t5"]]
    assert texts(made)[0][1] == rows[2]["chosen_reason"]
    missing = Made(tmp_path / "config.yaml", "paradigm=critic", "critic.missing=empty")
    assert ["t0"] in ids(missing.train)
    assert texts(missing)[1][1] == ""


def test_data_check_and_show_read_a_configuration_s_rows_as_its_paradigm_does(tmp_path):
    rows = with_critiques(text_rows(5))
    rows[1]["chosen_reason"] = ""
    config = config_of(tmp_path, {"path": str(write_rows(tmp_path / "rows.jsonl", rows))})
    config.write_text(config.read_text() + "paradigm: critic\n")
    done = fastrm("data", "check", config, "--max-refused", "100%")
    assert done.returncode == 0, done.stderr
    page = re.sub(r"\s+", " ", done.stdout + done.stderr)
    assert "NO_CRITIQUE" in page
    assert "no critique of response 0 ('no')" in page
    assert "not read" not in page
    shown = re.sub(r"\s+", " ", fastrm("data", "show", config, "-n", "2").stdout)
    assert "You assess the answer" in shown
    assert "refused: NO_CRITIQUE" in shown


@pytest.mark.parametrize(
    "paradigm, setting, sentence",
    [
        ("judge", "judge.order=both", "4 texts of judges have no thinking: they teach the verdict alone"),
        ("critic", "critic.missing=empty", "4 responses have no critique: their rewards are read behind an empty one"),
    ],
)
def test_texts_that_teach_no_writing_are_counted_by_check_and_by_prepare(tmp_path, paradigm, setting, sentence):
    rows = with_critiques(text_rows(5))
    for row in rows[:2]:
        row["chosen_reason"] = row["rejected_reason"] = ""
    config = config_of(tmp_path, {"path": str(write_rows(tmp_path / "rows.jsonl", rows)), "name": "mine"})
    made = Made(config, f"paradigm={paradigm}", setting)
    assert f"mine: {sentence}" in made.said.replace("\n", "")
    lesson = "thinking" if paradigm == "judge" else "critique"
    assert made.row("mine")["without"] == {lesson: 4}
    found = check_source(made.config.data.train[0], MediaLimits(), reading=reading_of(made.config))
    assert found.without == {lesson: 4}
    console = Console(file=io.StringIO(), width=200)
    print_page(console, "mine", found)
    assert re.search(rf"{lesson} +{sentence}", console.file.getvalue())


def test_a_judge_s_texts_of_a_long_list_are_grouped_and_none_is_too_long_with_others(tmp_path):
    row = {"id": "list", "prompt": "What?", "responses": [f"answer {n}" for n in range(9)], "scores": list(range(9))}
    config = config_of(tmp_path, {"path": str(write_rows(tmp_path / "rows.jsonl", [row]))})
    made = Made(config, "paradigm=judge")
    assert made.refused == []
    assert made.train.preference_counts.tolist() == [16, 16, 4]
    found = check_source(made.config.data.train[0], MediaLimits(), reading=reading_of(made.config))
    assert (found.num_rows, len(found.records)) == (1, 3)
    assert found.preferences.num_pairs == 36
