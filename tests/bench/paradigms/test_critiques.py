"""Critiques by rule: what they say is so, whichever response people preferred."""

from dataclasses import replace

import pytest

from bench import DATA
from bench.paradigms.critiques import MAX_CHARACTERS, agreement, breaks_off, critique, main, short_rows, with_critiques
from fastrm.data.paradigm import TextReading
from fastrm.data.sources import source_files


@pytest.mark.parametrize(
    ("response", "said"),
    [
        ("Bonsoir.", "Length: under 5 words. Faults: none."),
        ("How do you say it?", "Length: under 15 words. Faults: copies the instruction."),
        ("It is the one and it is the one and it is the one.", "Length: under 15 words. Faults: repeats itself."),
        ("The answer is bonsoir and then", "Length: under 15 words. Faults: breaks off."),
        (" ".join(f"word{n}" for n in range(39)) + ".", "Length: under 40 words. Faults: none."),
        ("say it " * 20, "Length: 40 words or more. Faults: copies the instruction, repeats itself, breaks off."),
    ],
)
def test_a_critique_says_what_can_be_read_off_the_texts(response, said):
    assert critique("How do you say it?", response) == said


def test_the_rule_does_not_know_which_response_was_preferred():
    row = {"prompt": "Say it.", "chosen": "It.", "rejected": "No, never."}
    turned = with_critiques({"prompt": "Say it.", "chosen": "No, never.", "rejected": "It."})
    assert with_critiques(row)["chosen_reason"] == turned["rejected_reason"]
    assert with_critiques(row)["rejected_reason"] == turned["chosen_reason"]


def test_agreement_counts_pairs_that_differ_and_those_whose_rejected_response_has_the_fault():
    pairs = (("a b c d e.", "a b c d e"), ("a b c d e", "a b c d e."), ("a.", "b."))
    rows = [{"prompt": "", "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    assert agreement(rows, breaks_off) == (2, 1)


@pytest.mark.skipif(not (DATA / "pandalm").is_dir(), reason="needs ../shared/data")
def test_rows_are_read_with_their_critiques_and_prompts_are_held_out_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["critiques.py", str(tmp_path)])
    main()
    train, held_out = short_rows()
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert all(len(row["prompt"] + row["chosen"] + row["rejected"]) <= MAX_CHARACTERS for row in train + held_out)
    reading = TextReading("critic", "{{ question }} {{ response }}")
    (file,) = source_files(tmp_path / "eval.jsonl")
    records = list(replace(file, reading=reading).read())
    reasons = [[row["chosen_reason"], row["rejected_reason"]] for row in held_out]
    assert [[response.text for response in record.responses] for record in records] == reasons
    assert f"{len(train):,} pairs" in capsys.readouterr().out
