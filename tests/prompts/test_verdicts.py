"""Verdicts in the forms that judges write."""

import pytest

from fastrm.prompts.spec import load_spec, shipped_names
from fastrm.prompts.verdicts import (
    PAIRWISE,
    Verdict,
    majority,
    parse_better,
    parse_better_in_answer,
    parse_boxed,
    parse_r1_reward,
    parse_score,
    write_verdict,
)

FIRST, SECOND, TIE = Verdict.FIRST, Verdict.SECOND, Verdict.TIE


@pytest.mark.parametrize(
    "parse, text, wanted",
    [
        (parse_r1_reward, "<think>2 of them...</think><answer>1</answer>", FIRST),
        (parse_r1_reward, "<think>a\nb</think>\n<answer>\n 2 \n</answer>", SECOND),
        (parse_r1_reward, "<answer>1</answer> or rather <answer>2</answer>", FIRST),
        (parse_r1_reward, "<answer>Response 1</answer>", None),
        (parse_r1_reward, "<answer>3</answer> 1", None),
        (parse_r1_reward, "<answer></answer>", None),
        (parse_r1_reward, "<answer>Tie</answer>", TIE),
        (parse_r1_reward, "Of the 2 responses I take number 1.", FIRST),
        (parse_r1_reward, "<think>1 is right<answer>2", SECOND),
        (parse_r1_reward, "I cannot judge this image.", None),
        (parse_r1_reward, "", None),
        (parse_boxed, r"Now \boxed{2}... finally \boxed{1}", FIRST),
        (parse_boxed, r"\boxed{\text{2}}", SECOND),
        (parse_boxed, r"\boxed{equal}", TIE),
        (parse_boxed, r"\boxed{first}", None),
        (parse_boxed, "1", None),
        (parse_better, "Answer 2 is better", SECOND),
        (parse_better, "At first Answer 1 is better, but all in all, **Response 2 is slightly better**.", SECOND),
        (parse_better, "Both responses are equally good.", TIE),
        (parse_better, "The two are equally good on style. Response 1 is better.", FIRST),
        (parse_better, "Answer 1 is good, answer 2 too", None),
        (parse_better, "Response 2 is not better than Response 1.", None),
        (parse_better, "Response 1 is no better. Answer 2 is never better, and Response 1 is hardly better.", None),
        (parse_better, "Response 1 is better, as Response 2 is not better in any way.", FIRST),
        (parse_better, "Response 1 isn't better than Response 2.", None),
        (parse_better, "Neither Response 1 is better nor Response 2 is better.", None),
        (parse_better, "Response 1 is neither better nor worse.", None),
        (parse_better, "Neither Response 1, which is short, nor Response 2 is better.", None),
        (parse_better, "Neither response is better. They are both equally good.", TIE),
        (parse_better, "Neither is better: both are equally good.", TIE),
        (parse_better, "Neither response is perfect, but Response 1 is better.", FIRST),
        (parse_better, "Neither answer is right but Answer 2 is much better.", SECOND),
        (parse_better, "Another Response 2 is better", SECOND),
        (parse_better_in_answer, "<think>Answer 1 is better</think><answer>Answer 2 is better</answer>", SECOND),
        (parse_better_in_answer, "Answer 2 is better", None),
        (parse_better, "It is true. The better response: [first]", FIRST),
        (parse_better, "The better response: [second].", SECOND),
        (parse_score, "Score: 7 at first. **Final Score**: 72.5/100", 72.5),
        (parse_score, "score is -1", None),
        (parse_score, "Score: -1", -1.0),
        (parse_score, "72", None),
    ],
)
def test_forms_that_judges_write(parse, text, wanted):
    assert parse(text) == wanted


@pytest.mark.parametrize(
    "votes, wanted",
    [
        ([FIRST, SECOND, FIRST], FIRST),
        ([FIRST, SECOND], TIE),
        ([None, SECOND, None], SECOND),
        ([None, None], None),
        ([TIE, TIE, FIRST], TIE),
    ],
)
def test_the_majority_of_votes_that_can_be_read_decides(votes, wanted):
    assert majority(votes) is wanted


@pytest.mark.parametrize("name", [name for name in shipped_names() if load_spec(name).kind == "pairwise"])
@pytest.mark.parametrize("thinking", ["", "{1} is \\boxed{2}\n", "<think>Response 2 names it.</think>"])
@pytest.mark.parametrize("verdict", [FIRST, SECOND])
def test_a_verdict_that_is_written_is_read_by_the_same_parser(name, thinking, verdict):
    parser = load_spec(name).parser
    assert PAIRWISE[parser](write_verdict(parser, verdict, thinking)) is verdict


def test_every_parser_has_a_form_that_is_written():
    assert {parser: write_verdict(parser, SECOND, "<think>why</think>", "Answer") for parser in PAIRWISE} == {
        "r1_reward": "<think>why</think><answer>2</answer>",
        "boxed": r"<think>why</think>\boxed{2}",
        "better": "why\nAnswer 2 is better",
        "better_in_answer": "<think>why</think><answer>Answer 2 is better</answer>",
    }


def test_every_shipped_judge_can_be_read():
    assert {"r1_reward", "unified_reward", "unified_reward_think"} <= set(shipped_names())
    for name in shipped_names():
        spec = load_spec(name)
        if spec.kind == "critic":
            assert all(mark in spec.prompt for mark in ("{{ question }}", "{{ response }}"))
            continue
        shown = ("{{ first }}", "{{ second }}") if spec.kind == "pairwise" else ("{{ response }}",)
        assert all(mark in spec.prompt for mark in ("{{ question }}", *shown))
        said = {"r1_reward": "<answer>2</answer>", "better": "Answer 2 is better", "score": "Score: 3"}
        said["better_in_answer"] = f"<answer>{said['better']}</answer>"
        assert spec.parse(said[spec.parser]) in (SECOND, 3.0)
